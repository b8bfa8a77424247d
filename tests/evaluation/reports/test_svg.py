"""Plots are SVG that a browser reads, with every point in its place."""

from xml.etree import ElementTree

import pytest

from dmquant.evaluation.reports.svg import Axis, Point, find_front, lines, make_axis, nice_ticks, pale, scatter

SVG = "{http://www.w3.org/2000/svg}"
POINTS = [Point(10.0, 5.0, "float"), Point(2.0, 6.0, "w4"), Point(1.0, 9.0, "w1 <&>"), Point(3.0, 7.0, "beaten")]


def test_a_scatter_plot_is_well_formed_and_labels_every_point_whatever_its_name():
    tree = ElementTree.fromstring(scatter(POINTS, x_title="size, MB", y_title="FID"))
    texts = [text.text for text in tree.iter(f"{SVG}text")]
    assert {"size, MB", "FID", *(point.label for point in POINTS)} <= set(texts)
    assert len(list(tree.iter(f"{SVG}circle"))) == len(POINTS)


def test_smaller_is_left_and_lower():
    tree = ElementTree.fromstring(scatter(POINTS, x_title="x", y_title="y"))
    places = [(float(c.get("cx")), float(c.get("cy"))) for c in tree.iter(f"{SVG}circle")]  # in the order of y
    values = sorted(POINTS, key=lambda point: point.y)
    assert [y for _, y in places] == sorted((y for _, y in places), reverse=True)
    by_x = sorted(zip(values, places), key=lambda pair: pair[0].x)
    assert [x for _, (x, _) in by_x] == sorted(x for x, _ in places)


def test_the_front_is_what_nothing_beats_in_both():
    assert [point.label for point in find_front(POINTS)] == ["w1 <&>", "w4", "float"]
    assert find_front([Point(1.0, 1.0, "a"), Point(1.0, 2.0, "b"), Point(2.0, 1.0, "c")]) == [Point(1.0, 1.0, "a")]


def test_an_axis_holds_all_its_values_and_is_logarithmic_over_a_wide_span():
    wide, narrow = make_axis("x", [1.0, 100.0], 0, 300), make_axis("x", [1.0, 2.0], 0, 300)
    assert wide.is_log and not narrow.is_log
    for axis, values in ((wide, (1.0, 100.0)), (narrow, (1.0, 2.0))):
        assert 0 <= axis.place(values[0]) < axis.place(values[1]) <= 300 and len(axis.ticks()) > 2
    assert wide.place(10.0) == pytest.approx(150)


def test_values_that_are_all_the_same_have_an_axis_too():
    for value in (0.0, 5.0, -3.0):
        axis = make_axis("x", [value, value], 0, 100)
        assert axis.place(value) == pytest.approx(50) and axis.ticks()


def test_ticks_are_round_and_lie_inside():
    assert nice_ticks(0.0, 6.2) == [0, 2, 4, 6]
    assert Axis("x", 0.9, 60, 0, 1, is_log=True).ticks() == [1, 2, 5, 10, 20, 50]


def test_a_line_per_curve_with_its_name():
    curves = {"a": [(1.0, 0.5), (0.0, 0.9)], "b<": [(0.0, 0.1), (1.0, 0.2)]}
    tree = ElementTree.fromstring(lines(curves, {"a": "#111", "b<": "#222"}, x_title="t", y_title="c"))
    assert [line.get("stroke") for line in tree.iter(f"{SVG}polyline")] == ["#111", "#222"]
    assert {"a", "b<"} <= {text.text for text in tree.iter(f"{SVG}text")}


def test_a_pale_colour_is_half_way_to_white():
    assert pale("#000000") == "#7f7f7f" and pale("#ffffff") == "#ffffff" and pale("#0072b2") == "#7fb8d8"
