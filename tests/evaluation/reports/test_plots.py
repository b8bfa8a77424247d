"""Tests of the plots of models: every point is drawn at its values in its model's colour."""

import xml.etree.ElementTree as ET

import pytest

from dmquant.evaluation.reports.plots import Point, find_front, line_chart, scatter
from dmquant.evaluation.reports.svg import choose_marks

SVG = "{http://www.w3.org/2000/svg}"
MARKS = choose_marks(["float", "w4", "w1 <&>", "beaten"])
VALUES = {"float": (10.0, 5.0), "w4": (2.0, 6.0), "w1 <&>": (1.0, 9.0), "beaten": (3.0, 7.0)}
POINTS = [Point(x, y, MARKS[name], "4/8") for name, (x, y) in VALUES.items()]


def draw(points: list[Point] = POINTS) -> ET.Element:
    return ET.fromstring(scatter(points, x_title="size, MB", y_title="FID"))


def marks(tree: ET.Element) -> dict[str, tuple[float, float, str]]:
    """Returns hint of each mark -> its position in pixels, y downwards, and its style."""
    found = [mark for mark in tree.iter(f"{SVG}use") if mark.find(f"{SVG}title") is not None]
    return {m.find(f"{SVG}title").text: (float(m.get("x")), float(m.get("y")), m.get("style")) for m in found}


def ticks(tree: ET.Element) -> set[str]:
    return {text.text for text in tree.iter(f"{SVG}text")}


def test_a_scatter_plot_says_name_bits_and_values_of_every_point_whatever_its_name():
    found, texts = marks(draw()), ticks(draw())
    assert {"size, MB", "FID"} <= texts
    assert list(found) == [f"{name} 4/8: size, MB {x:.4g}, FID {y:.4g}" for name, (x, y) in VALUES.items()]
    assert all(mark.colour in style for mark, (_, _, style) in zip(MARKS.values(), found.values(), strict=True))


def test_smaller_is_left_and_lower():
    places = list(marks(draw()).values())
    by_x = sorted(range(len(POINTS)), key=lambda number: POINTS[number].x)
    by_y = sorted(range(len(POINTS)), key=lambda number: -POINTS[number].y)
    assert sorted(by_x, key=lambda number: places[number][0]) == by_x
    assert sorted(by_y, key=lambda number: places[number][1]) == by_y


def test_no_point_is_better_than_one_of_the_front_in_both_quantities():
    assert [point.mark.name for point in find_front(POINTS)] == ["w1 <&>", "w4", "float"]
    mark = MARKS["w4"]
    alike = [Point(1.0, 1.0, mark, "a"), Point(1.0, 2.0, mark, "b"), Point(2.0, 1.0, mark, "c")]
    assert find_front(alike) == alike[:1]


def test_an_axis_is_logarithmic_over_a_wide_span_only():
    def place(values: list[float]) -> list[float]:
        points = [Point(x, 1.0 + x, MARKS["w4"], str(x)) for x in values]
        return [x for x, _, _ in marks(draw(points)).values()]

    wide, narrow, signed = place([1.0, 10.0, 100.0]), place([1.0, 2.0, 3.0]), place([-1.0, 0.0, 1.0])
    for left, middle, right in (wide, narrow, signed):
        assert middle - left == pytest.approx(right - middle, abs=0.01)
    points = [Point(x, 1.0, MARKS["w4"], "") for x in (0.9, 60.0)]
    assert {"1", "2", "5", "10", "20", "50"} <= ticks(draw(points))


@pytest.mark.parametrize("value", [0.0, 5.0, -3.0])
def test_points_that_are_all_in_one_place_have_axes_too(value):
    points = [Point(value, value, MARKS[name], "4/8") for name in ("float", "w4")]
    (one, other) = marks(draw(points)).values()
    assert one[:2] == other[:2] and 0 < one[0] < 480 and 0 < one[1] < 320


def test_a_line_per_curve_with_its_name_and_values():
    curves = {MARKS["float"]: [(1.0, 0.5), (0.0, 0.9)], MARKS["w1 <&>"]: [(0.0, 0.1), (1.0, 0.2)]}
    tree = ET.fromstring(line_chart(curves, x_title="t", y_title="c"))
    found = marks(tree)
    assert list(found) == ["float, t 0: 0.9", "float, t 1: 0.5", "w1 <&>, t 0: 0.1", "w1 <&>, t 1: 0.2"]
    assert [x for x, _, _ in found.values()] == [x for x, _, _ in list(found.values())[:2]] * 2
    paths = [path.get("style") for path in tree.iter(f"{SVG}path") if "fill: none; stroke: #" in path.get("style", "")]
    assert [mark.colour in style for mark, style in zip(curves, paths, strict=True)] == [True, True]
