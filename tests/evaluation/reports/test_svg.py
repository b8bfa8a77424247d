"""Tests of figures as SVG elements, several of which are on one page."""

import re
import sys
import xml.etree.ElementTree as ET

import pytest

from dmquant.errors import MissingResource
from dmquant.evaluation.reports.svg import COLOURS, SHAPES, Canvas, Mark, choose_marks, plot_style

SVG = "{http://www.w3.org/2000/svg}"
MARK = Mark("w4", COLOURS[1], "s")


@plot_style()
def draw(title: str = "a plot", hints: tuple[str, ...] = ("one", "<&>"), y: tuple[float, ...] = (3.0, 4.0)) -> str:
    canvas = Canvas(300, 200)
    axes = canvas.figure.subplots()
    canvas.plot(axes, range(len(y)), y, MARK, hints)
    axes.set_xlabel("$x_1$, <MB>")
    return canvas.to_svg(title)


def ids(svg: str) -> set[str]:
    return set(re.findall(r' id="([^"]*)"', svg))


def test_an_svg_has_the_size_in_pixels_and_a_description():
    root = ET.fromstring(draw("a <title>"))
    assert root.tag == f"{SVG}svg" and root.get("viewBox") == "0 0 300 200"
    assert (root.get("width"), root.get("height"), root.get("role"), root.get("aria-label")) == ("300", "200", "img", "a <title>")


def test_text_is_kept_as_text():
    texts = {text.text for text in ET.fromstring(draw()).iter(f"{SVG}text")}
    assert "$x_1$, <MB>" in texts and "3.0" in texts


def test_control_characters_of_names_are_left_out():
    hints = [title.text for title in ET.fromstring(draw(hints=("a\x1b[1m", "b"))).iter(f"{SVG}title")]
    assert hints == ["a[1m", "b"]


def test_every_mark_shows_its_hint_and_a_gap_has_none():
    for y, hints in (((3.0, 4.0), ("one", "<&>")), ((3.0, float("nan"), 4.0), ("one", "three"))):
        marks = list(ET.fromstring(draw(hints=hints, y=y)).iter(f"{SVG}use"))
        assert [mark.find(f"{SVG}title").text for mark in marks if "d55e00" in mark.get("style")] == list(hints)


def test_marks_without_a_hint_each_are_a_mistake():
    with pytest.raises(ValueError, match="shorter"):
        draw(hints=("one",))


def test_frame_and_text_take_the_colour_and_the_font_of_the_page():
    svg = draw()
    assert "#000000" not in svg and "font-family" not in svg and "stroke: currentColor" in svg
    assert ET.fromstring(svg).get("fill") == "currentColor" and COLOURS[1] in svg


def test_the_same_figure_gives_the_same_bytes_and_two_figures_share_no_id():
    assert draw() == draw()
    one, other = draw("one"), draw("other")
    assert ids(one) and not ids(one) & ids(other)
    assert all(f"#{name}" in one for name in ids(one)), "an id that nothing refers to"


def test_an_svg_has_no_style_rules_and_loads_nothing():
    svg = draw()
    assert "<style" not in svg and "metadata" not in svg and "xlink" not in svg
    assert svg.count("://") == 1 and svg.startswith("<svg") and SVG[1:-1] in svg  # the name of the SVG namespace


def test_a_users_own_settings_of_matplotlib_change_nothing_and_stay():
    import matplotlib as mpl

    expected = draw()
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path"}):
        assert draw() == expected
        assert mpl.rcParams["font.size"] == 30 and mpl.rcParams["svg.hashsalt"] is None


def test_without_matplotlib_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingResource) as caught:
        draw()
    assert "pip install 'dmquant[plots]'" in str(caught.value) and "\n" not in str(caught.value)


def test_forty_models_have_marks_that_differ_and_a_model_named_twice_has_one():
    marks = choose_marks([*map(str, range(40)), "3"])
    assert len({(mark.colour, mark.marker) for mark in marks.values()}) == len(marks) == 40
    assert {mark.sign for mark in marks.values()} == set(SHAPES.values())


def test_models_are_called_by_the_last_part_of_their_paths_if_that_tells_them_apart():
    def names(*models: str) -> dict[str, str]:
        return {model: mark.name for model, mark in choose_marks(models).items()}

    assert names("a/x", "b/y", "a/x") == {"a/x": "x", "b/y": "y"}
    assert names("a/x", "b/x") == {"a/x": "a/x", "b/x": "b/x"}
