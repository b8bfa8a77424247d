"""Reports -> one HTML page that stands alone: table, protocol, plots, samples, settings. No script, nothing fetched."""

import base64
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dmquant import __version__
from dmquant.assets import ASSETS
from dmquant.evaluation.reports.columns import COST, IDENTITY, Column, name_metric, rank
from dmquant.evaluation.reports.comparison import Comparison
from dmquant.evaluation.reports.layer_plots import Band, Row, draw_bands, draw_layers
from dmquant.evaluation.reports.report import LayerProfile, Report
from dmquant.evaluation.reports.svg import COLOURS, Point, lines, pale, scatter

TEMPLATE = ASSETS / "page.html"
NUM_BANDS = 6  # layers whose ranges are drawn one by one
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
        agreement=Markup(draw_agreement(reports)), layers=Markup(draw_profiles(reports)),
        bands=[Markup(plot) for plot in draw_ranges(reports)],
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
    """The first distance against what it costs."""
    plots, metric, short = [], choose_metric(comparison), shorten([report.model for report in reports])
    colours = paint(short.values())
    for cost in COSTS if metric else ():
        rows = [row for row in comparison.rows if None not in (row[cost.key], row[metric.key])]
        points = [
            Point(row[cost.key], row[metric.key], f"{short[row['model']]} {row['bits']}", colours[short[row["model"]]])
            for row in rows
        ]
        if len(points) > 1:
            plots.append(scatter(points, x_title=_title(cost), y_title=_title(metric)))
    return plots


def draw_agreement(reports: Sequence[Report]) -> str:
    """How near the denoisers' answers are to the float one's over the timesteps; nothing where no report says it."""
    short = shorten([report.model for report in reports])
    shown = {short[report.model]: report.curves["cosine"] for report in reports if "cosine" in report.curves}
    curves = {name: [(float(timestep), value) for timestep, value in curve.items()] for name, curve in shown.items()}
    if not curves:
        return ""
    return lines(curves, paint(short.values()), x_title="timestep", y_title="cosine to the float denoiser's answer")


def shorten(models: Sequence[str]) -> dict[str, str]:
    """The last parts of paths, where they tell the models apart."""
    names = {model: Path(model).name for model in models}
    return names if len(set(names.values())) == len(names) else {model: model for model in models}


def paint(names: Iterable[str]) -> dict[str, str]:
    """A colour for each model, the same in all plots; from the ninth on they are paler, from the 17th on they come again."""
    colours = [*COLOURS, *(pale(colour) for colour in COLOURS)]
    return {name: colours[number % len(colours)] for number, name in enumerate(dict.fromkeys(names))}


def draw_profiles(reports: Sequence[Report]) -> str:
    """The errors of all layers over the widths of their inputs' ranges; nothing where no report has looked at layers."""
    known = {layer.name: layer for report in reports for layer in reversed(report.layers)}
    if not known:
        return ""
    first, short = next(report.layers for report in reports if report.layers), shorten([report.model for report in reports])
    layers = [*first, *(layer for layer in known.values() if layer.name not in {layer.name for layer in first})]
    profiles = {short[report.model]: {layer.name: layer for layer in report.layers} for report in reports if report.layers}
    panels = {
        title: {
            model: [getattr(found.get(layer.name), key, None) for layer in layers]
            for model, found in profiles.items() if any(getattr(layer, key) is not None for layer in found.values())
        }
        for title, key in (("SQNR alone, dB", "local_db"), ("SQNR in its model, dB", "total_db"))
    }  # fmt: skip
    heat = spread_widths(layers)
    row = Row([layer.name for layer in layers], [layer.role.replace("_", " ") for layer in layers])
    return draw_layers(row, {title: curves for title, curves in panels.items() if curves}, heat, paint(short.values()))


def spread_widths(layers: Sequence[LayerProfile]) -> dict[float, list[float | None]]:
    """Timestep -> for each layer the width of its input's bulk, as a share of the widest one that it has at any timestep."""
    widths = [measure_widths(layer) for layer in layers]
    timesteps = {timestep for found in widths for timestep in found}
    widest = [max(found.values(), default=0.0) for found in widths]
    return {at: [found[at] / most if most and at in found else None for found, most in zip(widths, widest)] for at in timesteps}


def measure_widths(layer: LayerProfile) -> dict[float, float]:
    """Timestep -> distance between the 0.1 % and the 99.9 % quantile of the input."""
    return {float(timestep): high - low for timestep, (_, low, high, _) in layer.ranges.items()}


def draw_ranges(reports: Sequence[Report]) -> list[str]:
    """The inputs whose range varies most from timestep to timestep; layers that read the same are drawn once."""
    readers: dict[str, list[LayerProfile]] = {}
    for layer in next((report.layers for report in reports if report.layers), ()):
        readers.setdefault(str(layer.ranges), []).append(layer)
    plots = []
    for alike in sorted(readers.values(), key=lambda alike: -measure_variation(alike[0]))[:NUM_BANDS]:
        more = f" and {len(alike) - 1} more" if len(alike) > 1 else ""
        bands = [Band(float(timestep), *found) for timestep, found in alike[0].ranges.items()]
        plots.append(draw_bands(bands, alike[0].name + more))
    return plots


def measure_variation(layer: LayerProfile) -> float:
    """How many times as wide the bulk of the input is at one timestep as at another; 1 for one that is nothing anywhere."""
    widths = [width for width in measure_widths(layer).values() if width > 0]
    return max(widths, default=1.0) / min(widths, default=1.0)


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
