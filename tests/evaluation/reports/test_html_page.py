"""A page shows what the table shows, stands alone, and lets no name from a file become markup."""

import base64
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from dmquant.evaluation.reports.comparison import compare
from dmquant.evaluation.reports.html_page import (
    Strip,
    choose_metric,
    draw_ranges,
    measure_variation,
    render,
    shorten,
    spread_widths,
)
from dmquant.evaluation.reports.report import LayerProfile, Protocol, Report
from dmquant.evaluation.reports.svg import COLOURS

PROTOCOL = Protocol(num_images=5000, seed=0, steps=20, sampler="ddim", batch=50, image_size=32, extractor="resnet-cifar10")
FLOAT = Report(
    model="embedded", method="float", settings={}, weight_bits=32, act_bits=32, metrics={"fd-resnet-cifar10": 10.0},
    protocol=PROTOCOL, size_bytes=8_000_000, float_size_bytes=8_000_000, bits_per_weight=32.0, ops=96e9,
    seconds_per_image=0.1, versions={"torch": "2"}, bops=7_000_000_000, attention_macs=3_000_000,
)  # fmt: skip
QUANTIZED = replace(
    FLOAT, model="out", method="lsq", weight_bits=4, act_bits=8, metrics={"fd-resnet-cifar10": 11.0, "psnr": 30.0},
    size_bytes=1_000_000, ops=12.3e9, base_model="embedded", settings={"keep": ["first", "last"], "note": "<b>"},
    curves={"cosine": {"900": 0.99, "20": 0.9}},
)  # fmt: skip
LAYERS = (
    LayerProfile("conv_in", "first", 8, 8, None, None, {"900": (-4.0, -3.0, 3.0, 4.0), "20": (-1.0, -1.0, 1.0, 1.0)}),
    LayerProfile("to_q", "attention", 4, 8, 25.5, 21.25, {"900": (-2.0, -1.0, 1.0, 2.0), "20": (-2.0, -1.0, 1.5, 2.0)}),
    LayerProfile("to_k", "attention", 4, 8, 24.5, 20.25, {"900": (-2.0, -1.0, 1.0, 2.0), "20": (-2.0, -1.0, 1.5, 2.0)}),
)
OTHER = replace(QUANTIZED, model="other", metrics={"fd-resnet-cifar10": 12.0}, curves={})


class Parser(HTMLParser):
    """Tags with their attributes, and all text, of a page whose tags must match."""

    VOID = {"meta", "img", "br", "link"}

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text, self._open = [], [], []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._open += [] if tag in self.VOID else [tag]

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parse(*reports: Report, strips=()) -> Parser:
    return Parser(render(compare(list(reports)), list(reports), strips))


def test_every_cell_and_note_of_the_table_is_on_the_page():
    page, comparison = parse(FLOAT, QUANTIZED, OTHER), compare([FLOAT, QUANTIZED, OTHER])
    for text in (*comparison.headings(), *sum(comparison.cells(), [])):
        assert text in page.text, text
    assert all(note in "".join(page.text) for note in comparison.notes)
    best = [attributes for tag, attributes in page.tags if tag == "td" and "best" in (attributes.get("class") or "")]
    assert len(best) == len(comparison.best()) > 0


def test_it_stands_alone():
    page = parse(FLOAT, QUANTIZED, strips=[Strip("embedded", b"png"), Strip("out", b"png", b"heat")])
    links = [attributes[name] for _, attributes in page.tags for name in ("src", "href") if name in attributes]
    assert len(links) == 3 and all(link.startswith("data:image/png;base64,") for link in links)
    assert base64.b64decode(links[2].split(",")[1]) == b"heat"
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}


def test_names_from_files_stay_text():
    evil = '<script>alert(1)</script>"><img src=x>'
    page = parse(replace(FLOAT, model=evil), replace(QUANTIZED, model=evil, base_model=evil), strips=[Strip(evil, note=evil)])
    assert evil in page.text and not {"script"} & {tag for tag, _ in page.tags}
    assert [attributes for tag, attributes in page.tags if tag == "img"] == []


def test_protocol_settings_and_operations_are_told():
    text = "\n".join(parse(FLOAT, QUANTIZED).text)
    for told in ("image size", "ddim", '["first", "last"]', '"<b>"', "7.000 G", "0.003 G float MACs", "torch 2"):
        assert told in text, told


def test_plots_set_the_first_distance_against_size_operations_and_bits_and_show_the_agreement():
    page = parse(FLOAT, QUANTIZED, OTHER)
    assert [a["aria-label"] for tag, a in page.tags if tag == "svg"] == [
        "FD resnet-cifar10 against size, MB", "FD resnet-cifar10 against bits/weight", "FD resnet-cifar10 against OPs, G",
        "cosine to the float denoiser's answer against timestep",
    ]
    assert not [tag for tag, _ in parse(replace(FLOAT, metrics={"psnr": 3.0})).tags if tag == "svg"]


@pytest.mark.parametrize(("metrics", "chosen"), [({"kd-x": 1.0, "sfd-x": 1.0}, "sfd-x"), ({"psnr": 1.0}, None)])
def test_a_model_is_judged_by_the_first_metric_of_which_less_is_better(metrics, chosen):
    found = choose_metric(compare([replace(FLOAT, metrics=metrics)]))
    assert (found and found.key) == chosen


def test_models_are_called_by_the_last_part_of_their_paths_where_that_tells_them_apart():
    assert shorten(["a/x", "b/y", "a/x"]) == {"a/x": "x", "b/y": "y"}
    assert shorten(["a/x", "b/x"]) == {"a/x": "a/x", "b/x": "b/x"}


def test_mixed_protocols_list_all_their_values():
    other = replace(QUANTIZED, protocol=replace(PROTOCOL, steps=50))
    page = Parser(render(compare([FLOAT, other], mixed=True), [FLOAT, other]))
    assert "20, 50" in page.text


def labels(page: Parser) -> list[str]:
    return [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]


def test_layers_show_their_errors_by_model_and_the_ranges_of_their_inputs():
    profiled = replace(QUANTIZED, layers=LAYERS)
    page = parse(FLOAT, profiled, replace(OTHER, layers=LAYERS[1:]))
    assert labels(page)[-3:] == ["layers", "range of the input of conv_in", "range of the input of to_q and 1 more"]
    hints = [text for text in page.text if ": " in text and text.startswith(("out, ", "other, "))]
    one = ["to_q: 25.5", "to_k: 24.5"]
    two = ["to_q: 21.25", "to_k: 20.25"]
    assert hints == [f"{model}, {text}" for texts in (one, two) for model in ("out", "other") for text in texts]
    assert {"SQNR alone, dB", "SQNR in its model, dB", "conv_in", "attention"} <= set(page.text)


def test_reports_that_have_looked_at_no_layer_make_a_page_without_them():
    page = parse(FLOAT, QUANTIZED)
    assert not [label for label in labels(page) if "layer" in label or "range" in label]
    assert "Layer by layer" not in page.text and "Activations from timestep to timestep" not in page.text


def test_a_profile_without_errors_shows_ranges_only():
    assert labels(parse(replace(FLOAT, layers=LAYERS[:1])))[-2:] == ["layers", "range of the input of conv_in"]


def test_the_range_that_varies_most_comes_first_and_shares_are_of_each_layers_widest():
    assert [measure_variation(layer) for layer in LAYERS] == [3.0, 1.25, 1.25]
    assert "conv_in" in draw_ranges([replace(QUANTIZED, layers=LAYERS[::-1])])[0]
    assert spread_widths(LAYERS[:2]) == {900.0: [1.0, 0.8], 20.0: [1 / 3, 1.0]}
    still = replace(LAYERS[0], ranges={"5": (0.0, 0.0, 0.0, 0.0)})
    assert measure_variation(still) == 1.0 and spread_widths([still]) == {5.0: [None]}


def test_names_of_layers_stay_text():
    evil = replace(LAYERS[1], name="<script>", role="<img>")
    page = parse(replace(QUANTIZED, layers=(evil,)))
    assert {"<script>", "<img>"} <= set(page.text) and not {"script", "img"} & {tag for tag, _ in page.tags}


def test_a_model_has_one_colour_in_all_plots():
    page = parse(FLOAT, replace(OTHER, model="first"), replace(QUANTIZED, layers=LAYERS))
    strokes = {attributes.get("stroke") for tag, attributes in page.tags if tag == "polyline"}
    assert strokes == {"currentColor", COLOURS[2]}  # the front, and the third model's cosine and layers
