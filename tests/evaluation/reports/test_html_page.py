"""Tests of the HTML page: it shows the whole table, loads nothing, and escapes names from files."""

import base64
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmquant.errors import MissingResource
from dmquant.evaluation.reports.comparison import compare
from dmquant.evaluation.reports.html_page import LARGE_TILE, SMALL_TILE, Figures, Strip, draw_figures, render, tile_size
from dmquant.evaluation.reports.layer_plots import draw_ranges
from dmquant.evaluation.reports.plots import choose_metric
from dmquant.evaluation.reports.report import LayerProfile, Protocol, Report
from dmquant.evaluation.reports.svg import choose_marks

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
PROFILED = replace(QUANTIZED, layers=LAYERS)
SAMPLES = {"size": (32, 32), "first_seed": 7}
STRIPS = [Strip("embedded", (b"a", b"b"), **SAMPLES), Strip("out", (b"c", b"d"), (b"heat", b"cold"), **SAMPLES)]


class Parser(HTMLParser):
    """Collects the tags with their attributes and the text of a page; fails if an end tag does not match its start tag."""

    VOID = frozenset({"meta", "img", "br", "link"})

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

    def places(self, tag: str, **attributes: str) -> list[int]:
        """Returns the indices of the tags that have these attributes."""
        wanted = attributes.items()
        return [number for number, (name, found) in enumerate(self.tags) if name == tag and wanted <= found.items()]


def write(*reports: Report, strips=(), has_plots: bool = False) -> str:
    table = compare(list(reports))
    figures = draw_figures(table, reports) if has_plots else Figures()
    return render(table, reports, figures=figures, strips=strips)


def parse(*reports: Report, strips=(), has_plots: bool = False) -> Parser:
    return Parser(write(*reports, strips=strips, has_plots=has_plots))


@pytest.fixture(scope="module")
def whole() -> str:
    """Returns a page with all parts; the table has the float model first."""
    return write(PROFILED, replace(OTHER, layers=LAYERS), FLOAT, strips=STRIPS, has_plots=True)


def test_every_cell_and_note_of_the_table_is_on_the_page():
    page, comparison = parse(FLOAT, QUANTIZED, OTHER), compare([FLOAT, QUANTIZED, OTHER])
    for text in (*comparison.headings(), *chain.from_iterable(comparison.cells())):
        assert text in page.text, text
    assert all(note in "".join(page.text) for note in comparison.notes)
    best = [attributes for tag, attributes in page.tags if tag == "td" and "best" in (attributes.get("class") or "")]
    assert len(best) == len(comparison.best()) > 0


def test_the_page_loads_nothing(whole):
    links = [attributes[name] for _, attributes in Parser(whole).tags for name in ("src", "href") if name in attributes]
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in links)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in Parser(whole).tags}
    assert not [word for word in ("@import", "url(http", "url(//") if word in whole]
    assert set(re.findall(r"\w+://[^\"]*", whole)) == {"http://www.w3.org/2000/svg"}  # a name, not fetched


def test_samples_come_before_the_table_the_table_before_the_plots_and_hashes_are_folded_away_at_the_end(whole):
    page = Parser(whole)
    images, (table, *_), plots = page.places("img"), page.places("table"), page.places("svg")
    folded = page.places("details")
    assert images[0] < table < plots[0] < plots[-1] < folded[1]
    assert [tag for tag, _ in page.tags[folded[1] :]].count("dl") == 1 and page.places("dl")[0] > folded[1]


def test_every_sample_is_shown_with_its_seed_as_it_was_drawn():
    page = parse(FLOAT, QUANTIZED, strips=STRIPS)
    shown = [attributes for tag, attributes in page.tags if tag == "img"]
    pictures = [base64.b64decode(attributes["src"].removeprefix("data:image/png;base64,")) for attributes in shown]
    assert pictures == [b"a", b"b", b"c", b"d", b"heat", b"cold"]
    assert [attributes["alt"] for attributes in shown] == [
        "sample of embedded, seed 7", "sample of embedded, seed 8", "sample of out, seed 7", "sample of out, seed 8",
        "difference of out, seed 7", "difference of out, seed 8",
    ]  # fmt: skip
    assert {(found["width"], found["height"], found["class"]) for found in shown} == {("128", "128", "enlarged")}


@given(st.integers(1, 2048), st.integers(1, 2048))
def test_a_tile_is_at_least_96_pixels_wide_and_high_and_a_small_image_is_enlarged_by_a_whole_number(width, height):
    shown = tile_size(width, height)
    assert min(shown) >= SMALL_TILE >= 96
    if min(width, height) < SMALL_TILE:
        assert shown[0] % width == shown[1] % height == 0 and shown[0] // width == shown[1] // height
    elif min(width, height) * LARGE_TILE >= max(width, height) * SMALL_TILE:
        assert max(shown) <= LARGE_TILE


def test_small_images_are_enlarged_without_interpolation_and_large_ones_are_not():
    def classes(side: int) -> set[str | None]:
        strips = [Strip("embedded", (b"png",), size=(side, side))]
        return {attributes.get("class") for tag, attributes in parse(FLOAT, strips=strips).tags if tag == "img"}

    assert classes(32) == {"enlarged"} and classes(512) == {None}
    assert ".enlarged { image-rendering: pixelated; }" in write(FLOAT)


def test_light_and_dark_follow_the_readers_setting():
    text = write(FLOAT)
    assert "color-scheme: light dark" in text and "@media (prefers-color-scheme: dark)" in text


def test_headers_of_the_table_have_a_scope():
    page = parse(FLOAT, QUANTIZED)
    table = compare([FLOAT, QUANTIZED])
    assert len(page.places("th", scope="col")) == len(table.headings())
    assert len(page.places("th", scope="row")) > len(table.rows) and not page.places("th", scope="")
    assert dict(page.tags)["html"] == {"lang": "en"}


def test_all_ids_of_a_page_differ(whole):
    ids = [attributes["id"] for _, attributes in Parser(whole).tags if "id" in attributes]
    assert len(ids) == len(set(ids)) > 4


def test_without_matplotlib_a_page_says_how_to_get_it_and_has_all_the_rest(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    reports = [FLOAT, QUANTIZED]
    with pytest.raises(MissingResource) as caught:
        draw_figures(compare(reports), reports)
    page = Parser(render(compare(reports), reports, figures=Figures(note=str(caught.value)), strips=STRIPS))
    assert "plots need matplotlib; get it with: pip install 'dmquant[plots]'" in page.text
    assert page.places("table") and page.places("img") and not page.places("svg")


def test_reports_without_anything_to_draw_need_no_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert draw_figures(compare([FLOAT]), [FLOAT]) == Figures()


def test_names_from_files_are_escaped():
    evil = '<script>alert(1)</script>"><img src=x>'
    reports = [replace(FLOAT, model=evil), replace(QUANTIZED, model=evil + "2", base_model=evil)]
    page = parse(*reports, strips=[Strip(evil, note=evil)], has_plots=True)
    assert evil in page.text and not {"script"} & {tag for tag, _ in page.tags}
    assert [attributes for tag, attributes in page.tags if tag == "img"] == []


def test_the_page_shows_protocol_settings_and_operations():
    text = "\n".join(parse(FLOAT, QUANTIZED).text)
    for told in ("image size", "ddim", '["first", "last"]', '"<b>"', "7.000 G", "0.003 G float MACs", "torch 2"):
        assert told in text, told


def test_plots_show_the_first_distance_against_size_operations_and_bits_and_the_cosine():
    page = parse(FLOAT, QUANTIZED, OTHER, has_plots=True)
    assert [a["aria-label"] for tag, a in page.tags if tag == "svg"] == [
        "FD resnet-cifar10 against size, MB", "FD resnet-cifar10 against bits/weight", "FD resnet-cifar10 against OPs, G",
        "cosine to the float denoiser's output against timestep",
    ]  # fmt: skip
    assert not [tag for tag, _ in parse(replace(FLOAT, metrics={"psnr": 3.0}), has_plots=True).tags if tag == "svg"]


@pytest.mark.parametrize("metrics, chosen", [({"kd-x": 1.0, "sfd-x": 1.0}, "sfd-x"), ({"psnr": 1.0}, None)])
def test_quality_plots_use_the_first_metric_for_which_lower_is_better(metrics, chosen):
    found = choose_metric(compare([replace(FLOAT, metrics=metrics)]))
    assert (found and found.key) == chosen


def test_mixed_protocols_list_all_their_values():
    other = replace(QUANTIZED, protocol=replace(PROTOCOL, steps=50))
    page = Parser(render(compare([FLOAT, other], mixed=True), [FLOAT, other]))
    assert "20, 50" in page.text


def labels(page: Parser) -> list[str]:
    return [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]


def test_layers_show_their_errors_by_model_and_the_ranges_of_their_inputs():
    page = parse(FLOAT, PROFILED, replace(OTHER, layers=LAYERS[1:]), has_plots=True)
    one, *others = labels(page)[-3:]
    assert one == "errors and input ranges of all layers"
    assert others == ["range of the input of conv_in", "range of the input of to_q and 1 more"]
    hints = [text for text in page.text if ": " in text and ", to_" in text]
    one = ["to_q: 25.5", "to_k: 24.5"]
    two = ["to_q: 21.25", "to_k: 20.25"]
    assert hints == [f"{model}, {text}" for texts in (one, two) for model in ("out", "other") for text in texts]
    assert {"SQNR alone, dB", "SQNR in its model, dB", "conv_in", "attention"} <= set(page.text)


def test_reports_without_layers_make_a_page_without_layer_plots():
    page = parse(FLOAT, QUANTIZED, has_plots=True)
    assert not [label for label in labels(page) if "layer" in label or "range" in label]
    assert "Layer by layer" not in page.text and "Activations from timestep to timestep" not in page.text


def test_a_profile_without_errors_shows_ranges_only():
    page = parse(replace(FLOAT, layers=LAYERS[:1]), has_plots=True)
    assert labels(page)[-2:] == ["errors and input ranges of all layers", "range of the input of conv_in"]


def test_the_range_that_varies_most_comes_first():
    assert "conv_in" in draw_ranges([replace(QUANTIZED, layers=LAYERS[::-1])])[0]


def test_names_of_layers_are_escaped():
    evil = replace(LAYERS[1], name="<script>", role="<img>")
    page = parse(replace(QUANTIZED, layers=(evil,)), has_plots=True)
    assert {"<script>", "<img>"} <= set(page.text) and not {"script", "img"} & {tag for tag, _ in page.tags}


def test_a_model_has_one_mark_in_all_plots_and_in_the_legend_whatever_the_order_of_the_reports(whole):
    marks = choose_marks(["embedded", "out", "other"])
    found = re.findall(r'<use [^>]*style="fill: (#\w+);[^>]*><title>(\w+)[ ,]', whole)
    assert len(found) > 3 * len(marks)
    assert set(found) == {(mark.colour, name) for name, mark in marks.items()}
    signs = [attributes["style"] for tag, attributes in Parser(whole).tags if tag == "span"]
    assert signs == [f"color: {mark.colour}" for mark in marks.values()] * 2  # over the plots, and over the layers
