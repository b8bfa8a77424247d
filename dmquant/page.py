"""Reports -> one HTML page that stands alone: table, protocol, plots, samples, settings. No script, nothing fetched."""

import base64
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dmquant import __version__
from dmquant.columns import COST, IDENTITY, Column, name_metric, rank
from dmquant.comparison import Comparison
from dmquant.plot import Point, lines, scatter
from dmquant.report import Report

TEMPLATE = Path(__file__).parent / "assets" / "page.html"
COSTS = tuple(column for column in COST if column.key in ("size_mb", "giga_ops", "bits_per_weight"))


@dataclass(frozen=True)
class Strip:
    """One model's images of the seeds that all models share, as PNG."""

    model: str
    images: bytes | None = None
    differences: bytes | None = None  # to the float model's images
    note: str = ""  # why there are none


@dataclass(frozen=True)
class Cell:
    text: str
    is_best: bool
    is_number: bool


@dataclass(frozen=True)
class Run:
    """What a reader wants to know of one report beyond its row."""

    model: str
    facts: dict[str, str]
    settings: dict[str, str]


def render(comparison: Comparison, reports: Sequence[Report], strips: Sequence[Strip] = ()) -> str:
    """The page's text. `reports` are those of the comparison; `strips` their samples, where some were drawn."""
    environment = Environment(loader=FileSystemLoader(TEMPLATE.parent), autoescape=True, undefined=StrictUndefined)
    return environment.get_template(TEMPLATE.name).render(
        version=__version__, headings=comparison.headings(), rows=lay_out(comparison), notes=comparison.notes,
        protocol=describe_protocol(reports), plots=[Markup(plot) for plot in draw_plots(comparison, reports)],
        strips=[{**asdict(strip), "images": _embed(strip.images), "differences": _embed(strip.differences)} for strip in strips],
        runs=[describe_run(report) for report in reports],
    )


def lay_out(comparison: Comparison) -> list[list[Cell]]:
    best = comparison.best()
    return [
        [
            Cell(text, (number, column.key) in best, column not in IDENTITY)
            for column, text in zip(comparison.columns, line, strict=True)
        ]
        for number, line in enumerate(comparison.cells())
    ]


def describe_protocol(reports: Sequence[Report]) -> dict[str, str]:
    """Every field of the protocols: one value where they agree, else all there are."""
    protocols = [asdict(report.protocol) for report in reports]
    found = {name: list(dict.fromkeys(str(protocol[name]) for protocol in protocols)) for name in protocols[0]}
    return {name.replace("_", " "): ", ".join(values) for name, values in found.items() if values != ["None"]}


def draw_plots(comparison: Comparison, reports: Sequence[Report]) -> list[str]:
    """The first distance against what it costs, and the agreement with the float denoiser over the timesteps."""
    plots, metric, short = [], choose_metric(comparison), shorten([report.model for report in reports])
    for cost in COSTS if metric else ():
        rows = [row for row in comparison.rows if None not in (row[cost.key], row[metric.key])]
        points = [Point(row[cost.key], row[metric.key], f"{short[row['model']]} {row['bits']}") for row in rows]
        if len(points) > 1:
            plots.append(scatter(points, x_title=_title(cost), y_title=_title(metric)))
    shown = {short[report.model]: report.curves["cosine"] for report in reports if "cosine" in report.curves}
    curves = {name: [(float(timestep), value) for timestep, value in curve.items()] for name, curve in shown.items()}
    if curves:
        plots.append(lines(curves, x_title="timestep", y_title="cosine to the float denoiser's answer"))
    return plots


def shorten(models: Sequence[str]) -> dict[str, str]:
    """The last parts of paths, where they tell the models apart."""
    names = {model: Path(model).name for model in models}
    return names if len(set(names.values())) == len(names) else {model: model for model in models}


def choose_metric(comparison: Comparison) -> Column | None:
    """The metric that a model is judged by first: the first one of which less is better."""
    known = [name_metric(column.key) for column in comparison.columns if not column.is_change]
    return min((metric for metric in known if metric.better == "lower"), key=lambda metric: rank(metric.key), default=None)


def describe_run(report: Report) -> Run:
    versions = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    facts = {
        "method": report.method, "weight / activation bits": f"{report.weight_bits} / {report.act_bits}",
        "made from": report.base_model or "-", "denoiser": f"{report.size_bytes / 1e6:.3f} MB",
        "BOPs": _giga(report.bops, "G"), "attention": _giga(report.attention_macs, "G float MACs, in no other count"),
        "versions": versions,
    }
    return Run(report.model, facts, {key: json.dumps(value) for key, value in report.settings.items()})


def _giga(count: int | None, unit: str) -> str:
    return "-" if count is None else f"{count / 1e9:,.3f} {unit}"


def _title(column: Column) -> str:
    return column.title + (f", {column.unit}" if column.unit else "")


def _embed(picture: bytes | None) -> str | None:
    return picture and "data:image/png;base64," + base64.b64encode(picture).decode()
