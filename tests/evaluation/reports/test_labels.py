"""Labels stand beside their points and cover nothing."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmquant.evaluation.reports.labels import RADIUS, Box, place_labels

FRAME = Box(0, 0, 600, 360)
PLACES = st.tuples(st.floats(10, 590), st.floats(10, 350))


@given(st.lists(PLACES, min_size=1, max_size=6))
def test_few_labels_cover_neither_each_other_nor_a_point_and_stay_inside(points):
    boxes = place_labels(points, ["w4a4 4/4"] * len(points), FRAME)
    assert not any(one.meets(other) for one, other in combinations(boxes, 2))
    assert all(FRAME.holds(box) for box in boxes)
    marks = [Box(x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS) for x, y in points]
    assert not any(box.meets(mark) for box in boxes for mark in marks)


def test_a_lonely_label_is_right_of_its_point_and_left_of_one_at_the_right_edge():
    (right,), (left,) = (place_labels([(x, 100.0)], ["binarydm"], FRAME) for x in (100.0, 590.0))
    assert right.left > 100 and left.right < 590
    assert (right.top + right.bottom) / 2 == pytest.approx(100)


def test_sixteen_points_in_one_spot_and_one_label_wider_than_the_frame_are_placed_too():
    assert len({box.top for box in place_labels([(300.0, 180.0)] * 16, ["lsq-w4a4"] * 16, FRAME)}) > 7
    assert len(place_labels([(300.0, 180.0)], ["a" * 200], FRAME)) == 1
