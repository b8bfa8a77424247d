"""Tests of the plots of layers: every layer has its column."""

import base64
import io
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from dmquant.evaluation.reports.layer_plots import (
    MAX_ROWS,
    WIDTH,
    Band,
    Row,
    draw_bands,
    draw_layers,
    measure_variation,
    relative_widths,
)
from dmquant.evaluation.reports.report import LayerProfile
from dmquant.evaluation.reports.svg import choose_marks

SVG = "{http://www.w3.org/2000/svg}"
ROW = Row(["in", "a.<b>", "c", "out"], ["first", "body", "body", "last"])
W4, W8 = choose_marks(["w4 <&>", "w8"]).values()
PANELS = {
    "alone": {W4: [10.0, None, 30.0, 20.0], W8: [40.0, 50.0, 45.0, None]},
    "total": {W4: [10.0, 5.0, 6.0, 7.0]},
}
HEAT = {900.0: [1.0, 0.6, 0.6, None], 20.0: [0.2, 1.0, 1.0, 1.0]}


def draw(row=ROW, panels=PANELS, heat=HEAT):
    return ET.fromstring(draw_layers(row, panels, heat))


def texts(tree):
    return [text.text for text in tree.iter(f"{SVG}text")]


def marks(tree, name):
    """Returns position and style of the marks whose hint names the layer."""
    found = [mark for mark in tree.iter(f"{SVG}use") if mark.find(f"{SVG}title") is not None]
    return [(float(m.get("x")), m.get("style")) for m in found if f", {name}: " in m.find(f"{SVG}title").text]


def upright(text):
    """Returns the position of a text that is rotated by 90 degrees."""
    x, angle = re.fullmatch(r"translate\((\S+) \S+\) rotate\((\S+)\)", text.get("transform")).groups()
    assert float(angle) == -90
    return float(x)


def opacities(tree):
    """Returns the opacity (0 to 255) of the map's cells (timesteps, layers)."""
    (image,) = tree.iter(f"{SVG}image")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image.get("href").split(",")[1]))))[..., 3]


def test_every_value_is_a_mark_above_its_layers_name_in_its_models_colour_whatever_the_names():
    tree = draw()
    assert {*ROW.names, *ROW.roles, *PANELS, "900", "20"} <= set(texts(tree))
    names = {text.text: text for text in tree.iter(f"{SVG}text")}
    columns = []
    for number, name in enumerate(ROW.names):
        expected = [mark for curves in PANELS.values() for mark, values in curves.items() if values[number] is not None]
        assert all(mark.colour in style for mark, (_, style) in zip(expected, marks(tree, name), strict=True))
        (column,) = {x for x, _ in marks(tree, name)}
        columns.append(column)
    pitch = columns[1] - columns[0]
    assert np.allclose(np.diff(columns), pitch) and pitch > 0
    assert np.allclose([upright(names[name]) for name in ROW.names], columns, atol=5)


def test_a_curve_breaks_at_a_layer_without_a_value():
    paths = [path.get("d") for path in draw(heat={}).iter(f"{SVG}path") if "stroke-width: 1.5" in path.get("style", "")]
    pieces = [[piece.count("L") + 1 for piece in path.split("M")[1:]] for path in paths]
    assert pieces == [[1, 2], [3], [4]]


def test_the_map_is_transparent_for_the_smallest_share_and_opaque_for_the_widest():
    shown = opacities(draw(panels={}))
    assert shown[0].tolist() == [255, 127, 127, 0] and shown[1].tolist() == [0, 255, 255, 255]  # 900 above 20
    assert opacities(draw(panels={}, heat={1.0: [1.0, 1.0, 1.0, None]})).tolist() == [[255, 255, 255, 0]]


def test_hundreds_of_layers_and_timesteps_stay_inside_with_fewer_names():
    many = Row([f"layer.{number}" for number in range(400)], ["body"] * 400)
    panels, heat = {"dB": {W8: [float(number) for number in range(400)]}}, {float(t): [1.0] * 400 for t in range(90)}
    tree = draw(many, panels, heat)
    names = [text for text in texts(tree) if text.startswith("layer.")]
    assert 50 < len(names) < 120 and len(marks(tree, "layer.399")) == 1 and marks(tree, "layer.399")[0][0] < WIDTH
    assert opacities(tree).shape[0] <= MAX_ROWS and opacities(tree).shape[1] == 400


def extent(tree, opacity):
    """Returns the lowest and highest point, in pixels from below, of the area with this opacity."""
    (area,) = [use for use in tree.iter(f"{SVG}use") if f"fill-opacity: {opacity}" in use.get("style")]
    (path,) = [path.get("d") for path in tree.iter(f"{SVG}path") if f"#{path.get('id')}" == area.get("href")]
    heights = [-float(y) for y in re.findall(r"[ML] \S+ (\S+)", path)]
    return min(heights), max(heights)


def test_bands_show_the_range_and_the_quantiles_of_all_timesteps():
    tree = ET.fromstring(draw_bands([Band(900, -2, -1, 1, 2), Band(0, -4, -3, 3, 4)], "a.<b>"))
    assert {"a.<b>", "timestep", "−4", "4"} <= set(texts(tree)) and "a.<b>" in tree.get("aria-label")
    (least, largest), (low, high) = extent(tree, 0.3), extent(tree, 0.6)
    pixel = (largest - least) / 8
    assert (low - least, largest - high) == (pytest.approx(pixel), pytest.approx(pixel))


def test_control_characters_of_layers_are_left_out():
    tree = draw(Row(["a\x01", "b"], ["c", "c"]), {"dB": {W4: [1.0, 2.0]}}, {})
    assert {"a", "b"} <= set(texts(tree)) and len(marks(tree, "a")) == 1


def test_a_band_of_one_timestep_at_which_all_is_zero_is_drawn_too():
    assert "timestep" in texts(ET.fromstring(draw_bands([Band(5, 0, 0, 0, 0)], "still")))


def test_the_variation_and_the_relative_widths_are_those_between_the_quantiles():
    first = LayerProfile("a", "first", 8, 8, None, None, {"900": (-4.0, -3.0, 3.0, 4.0), "20": (-1.0, -1.0, 1.0, 1.0)})
    other = LayerProfile("b", "body", 4, 8, 25.5, 21.25, {"900": (-2.0, -1.0, 1.0, 2.0), "20": (-2.0, -1.0, 1.5, 2.0)})
    still = LayerProfile("c", "body", 4, 8, None, None, {"5": (0.0, 0.0, 0.0, 0.0)})
    assert [measure_variation(layer) for layer in (first, other, still)] == [3.0, 1.25, 1.0]
    assert relative_widths([first, other]) == {900.0: [1.0, 0.8], 20.0: [1 / 3, 1.0]}
    assert relative_widths([still]) == {5.0: [None]}
