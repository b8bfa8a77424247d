"""Panels are SVG that a browser reads, with every layer above its name."""

from xml.etree import ElementTree

import pytest

from dmquant.evaluation.reports.layer_plots import MAX_ROWS, WIDTH, Band, Row, draw_bands, draw_layers, draw_legend, shade

SVG = "{http://www.w3.org/2000/svg}"
ROW = Row(["in", "a.<b>", "c", "out"], ["first", "body", "body", "last"])
COLOURS = {"w4 <&>": "#111111", "w8": "#222222"}
PANELS = {
    "alone": {"w4 <&>": [10.0, None, 30.0, 20.0], "w8": [40.0, 50.0, 45.0, None]},
    "total": {"w4 <&>": [10.0, 5.0, 6.0, 7.0]},
}
HEAT = {900.0: [1.0, 0.6, 0.6, None], 20.0: [0.2, 1.0, 1.0, 1.0]}


def draw(row=ROW, panels=PANELS, heat=HEAT):
    return ElementTree.fromstring(draw_layers(row, panels, heat, COLOURS))


def marks(tree, name):
    """Places and colours of the marks whose hint names the layer."""
    circles = [c for c in tree.iter(f"{SVG}circle") if c.find(f"{SVG}title") is not None]
    return [(float(c.get("cx")), c.get("fill")) for c in circles if f", {name}: " in c.find(f"{SVG}title").text]


def test_every_value_is_a_mark_above_its_layers_name_in_its_models_colour_whatever_the_names():
    tree = draw()
    texts = {text.text for text in tree.iter(f"{SVG}text")}
    assert {*ROW.names, *ROW.roles, *COLOURS, *PANELS, "900", "20"} <= texts
    for number, name in enumerate(ROW.names):
        shown = [model for curves in PANELS.values() for model, values in curves.items() if values[number] is not None]
        expected = [COLOURS[model] for model in shown]
        assert [colour for _, colour in marks(tree, name)] == expected
        assert {x for x, _ in marks(tree, name)} == {round(ROW.place(number), 1)}


def test_a_curve_breaks_where_a_layer_has_no_value():
    lines = [len(line.get("points").split()) for line in draw(heat={}).iter(f"{SVG}polyline")]
    assert lines == [1, 2, 3, 4]


def test_the_map_is_blank_for_the_least_share_and_full_for_the_widest():
    cells = [float(rect.get("fill-opacity")) for rect in draw(panels={}).iter(f"{SVG}rect") if rect.get("fill-opacity")]
    assert cells[:7] == [1.0, 0.5, 0.5, 0.0, 1.0, 1.0, 1.0]  # 900 above 20; no cell where nothing is known
    assert shade(0.7, 1.0) == 1.0


def test_hundreds_of_layers_and_timesteps_stay_inside_with_fewer_names():
    many = Row([f"layer.{number}" for number in range(400)], ["body"] * 400)
    tree = draw(many, {"dB": {"w8": [float(number) for number in range(400)]}}, {float(t): [1.0] * 400 for t in range(90)})
    names = [text.text for text in tree.iter(f"{SVG}text") if text.text.startswith("layer.")]
    assert 50 < len(names) < 120 and len(marks(tree, "layer.399")) == 1 and marks(tree, "layer.399")[0][0] < WIDTH
    cells = [rect for rect in tree.iter(f"{SVG}rect") if rect.get("fill-opacity") == "1.00"]
    assert 400 < len(cells) <= 400 * MAX_ROWS + 1


def test_a_legend_takes_as_many_lines_as_it_needs():
    short, long = draw_legend({"a": "#111", "b": "#222"}, 0), draw_legend({"x" * 100: "#111", "y" * 100: "#222"}, 0)
    assert short[1] < long[1]


@pytest.mark.parametrize("flat", [False, True])
def test_bands_hold_the_range_and_the_bulk_at_every_timestep(flat):
    bands = [Band(900, -2, -1, 1, 2), Band(0, -4, -3, 3, 4)] if not flat else [Band(5, 0, 0, 0, 0)]
    tree = ElementTree.fromstring(draw_bands(bands, "a.<b>"))
    outer, inner = ([tuple(map(float, p.split(","))) for p in g.get("points").split()] for g in tree.iter(f"{SVG}polygon"))
    assert len(outer) == len(inner) == 2 * len(bands) and "a.<b>" in {text.text for text in tree.iter(f"{SVG}text")}
    assert outer[0][0] == min(x for x, _ in outer)
    if not flat:  # the first two corners are the upper ends, from the least timestep on; up is less
        assert outer[0][1] < inner[0][1] < inner[3][1] < outer[3][1] and outer[0][1] < outer[1][1]
