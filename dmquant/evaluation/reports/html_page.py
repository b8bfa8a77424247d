"""Renders reports as one HTML file: samples, table, plots, protocol, settings. The file has no script and loads nothing."""

import base64
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dmquant import __version__
from dmquant.assets import ASSETS
from dmquant.evaluation.reports.columns import IDENTITY
from dmquant.evaluation.reports.comparison import Comparison
from dmquant.evaluation.reports.layer_plots import draw_profiles, draw_ranges
from dmquant.evaluation.reports.plots import draw_cosine, draw_quality
from dmquant.evaluation.reports.report import Report
from dmquant.evaluation.reports.svg import Mark, choose_marks

TEMPLATE = ASSETS / "page.html"
SMALL_TILE, LARGE_TILE = 128, 256  # pixels: smaller images are enlarged to the first, larger ones reduced to the second


@dataclass(frozen=True)
class Strip:
    """One model's images of the seeds that all models share, each one a PNG."""

    model: str
    images: tuple[bytes, ...] = ()
    differences: tuple[bytes, ...] = ()  # to the float model's images
    size: tuple[int, int] = (0, 0)  # width and height of an image in pixels
    first_seed: int = 0
    note: str = ""  # why there are no images


@dataclass(frozen=True)
class Figures:
    """Plots of a page as SVG elements."""

    quality: tuple[str, ...] = ()
    cosine: str = ""
    layers: str = ""
    ranges: tuple[str, ...] = ()
    note: str = ""  # why plots are missing


@dataclass(frozen=True)
class Cell:
    """One cell of the table."""

    text: str
    is_best: bool
    is_number: bool


@dataclass(frozen=True)
class ReportDetails:
    """Facts and settings of one report that the table does not show."""

    model: str
    facts: dict[str, str]
    settings: dict[str, str]


def draw_figures(comparison: Comparison, reports: Sequence[Report]) -> Figures:
    """Draws all plots for which the reports have values.

    Raises:
        MissingResource: there are plots to draw and matplotlib is not installed.
    """
    marks = choose_table_marks(comparison)
    quality, cosine = draw_quality(comparison, marks), draw_cosine(reports, marks)
    return Figures(tuple(quality), cosine, draw_profiles(reports, marks), tuple(draw_ranges(reports)))


def render(
    comparison: Comparison, reports: Sequence[Report], *, figures: Figures = Figures(), strips: Sequence[Strip] = ()
) -> str:
    """Returns the HTML text. `reports` are those of the comparison; `strips` holds the samples of some of them."""
    environment = Environment(loader=FileSystemLoader(TEMPLATE.parent), autoescape=True, undefined=StrictUndefined)
    return environment.get_template(TEMPLATE.name).render(
        version=__version__, headings=comparison.headings(), rows=make_rows(comparison), notes=comparison.notes,
        protocol=describe_protocol(reports), runs=[describe_report(report) for report in reports],
        quality=[Markup(plot) for plot in figures.quality], cosine=Markup(figures.cosine), layers=Markup(figures.layers),
        ranges=[Markup(plot) for plot in figures.ranges], plots_note=figures.note, legend=make_legend(comparison),
        samples=[format_strip(strip) for strip in strips],
    )  # fmt: skip


def make_rows(comparison: Comparison) -> list[list[Cell]]:
    """Returns the rows of the table as cells."""
    best = comparison.best()
    return [
        [
            Cell(text, (number, column.key) in best, column not in IDENTITY)
            for column, text in zip(comparison.columns, line, strict=True)
        ]
        for number, line in enumerate(comparison.cells())
    ]


def make_legend(comparison: Comparison) -> dict[str, Mark]:
    """Returns name and bits of each model -> its mark in all plots."""
    marks = choose_table_marks(comparison)
    return {f"{marks[str(row['model'])].name} {row['bits']}": marks[str(row["model"])] for row in comparison.rows}


def choose_table_marks(comparison: Comparison) -> dict[str, Mark]:
    """Returns model -> its mark, in the order of the table."""
    return choose_marks(str(row["model"]) for row in comparison.rows)


def format_strip(strip: Strip) -> dict[str, object]:
    """Returns the values of a strip for the template: images as data URIs, with the size at which a page shows them."""
    width, height = strip.size
    shown = tile_size(width, height) if strip.images else strip.size
    pictures = {name: [_embed(picture) for picture in getattr(strip, name)] for name in ("images", "differences")}
    return {**asdict(strip), **pictures, "width": shown[0], "height": shown[1], "is_enlarged": shown[0] > width}


def tile_size(width: int, height: int) -> tuple[int, int]:
    """Returns the size at which a page shows an image: each pixel of a small one as a square of whole pixels."""
    if min(width, height) < SMALL_TILE:
        zoom = -(-SMALL_TILE // min(width, height))
        return width * zoom, height * zoom
    scale = max(SMALL_TILE / min(width, height), min(1.0, LARGE_TILE / max(width, height)))
    return round(width * scale), round(height * scale)


def describe_protocol(reports: Sequence[Report]) -> dict[str, str]:
    """Returns field -> value of the protocols; all values of a field in which the reports differ."""
    protocols = [asdict(report.protocol) for report in reports]
    found = {name: list(dict.fromkeys(str(protocol[name]) for protocol in protocols)) for name in protocols[0]}
    return {name.replace("_", " "): ", ".join(values) for name, values in found.items() if values != ["None"]}


def describe_report(report: Report) -> ReportDetails:
    """Returns the facts and settings that the page lists under the plots."""
    versions = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    facts = {
        "method": report.method, "weight / activation bits": f"{report.weight_bits} / {report.act_bits}",
        "made from": report.base_model or "-", "denoiser": f"{report.size_bytes / 1e6:.3f} MB",
        "BOPs": _giga(report.bops, "G"), "attention": _giga(report.attention_macs, "G float MACs, in no other count"),
        "versions": versions,
    }  # fmt: skip
    return ReportDetails(report.model, facts, {key: json.dumps(value) for key, value in report.settings.items()})


def _giga(count: int | None, unit: str) -> str:
    return "-" if count is None else f"{count / 1e9:,.3f} {unit}"


def _embed(picture: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(picture).decode()
