"""Plots of layers: the errors of all layers, the widths of their input ranges, and one layer's input range by timestep."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dmquant.evaluation.reports.report import LayerProfile, Report
from dmquant.evaluation.reports.svg import COLOURS, Canvas, Mark, plot_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 1168  # pixels, the width of the page
PANEL, MAP, STRIP, GAP = 200, 160, 10, 24  # heights in pixels: a panel of curves, the map, the strip of roles, a gap
LETTER = 7  # approximate width of a letter of a layer's name in pixels
MIN_PITCH = 14  # pixels between the names of two layers
MAX_ROWS = 25  # of the map
SMALL_WIDTH, SMALL_HEIGHT = 412, 240
NUM_BANDS = 6  # layers whose ranges are drawn
ROLE_COLOURS = ("#999999", "#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#8c6d1f", "#0072b2", "#d55e00", "#f0e442")
ERRORS = {"SQNR alone, dB": "local_db", "SQNR in its model, dB": "total_db"}

Values = Sequence[float | None]  # one per layer; None: no value


@dataclass(frozen=True)
class Band:
    """Range of a layer's input at one timestep: smallest and largest value, and the 0.1 % and 99.9 % quantiles."""

    timestep: float
    least: float
    low: float
    high: float
    largest: float


@dataclass(frozen=True)
class Row:
    """Names and roles of the layers from left to right."""

    names: Sequence[str]
    roles: Sequence[str]


def draw_profiles(reports: Sequence[Report], marks: Mapping[str, Mark]) -> str:
    """Draws the errors of all layers and the widths of their inputs' ranges; "" if no report has profiled layers."""
    layers = list({layer.name: layer for report in reports for layer in report.layers}.values())
    if not layers:
        return ""
    panels = {}
    for title, key in ERRORS.items():
        errors = {marks[report.model]: {layer.name: getattr(layer, key) for layer in report.layers} for report in reports}
        curves = {mark: [found.get(layer.name) for layer in layers] for mark, found in errors.items()}
        panels[title] = {mark: curve for mark, curve in curves.items() if any(value is not None for value in curve)}
    row = Row([layer.name for layer in layers], [layer.role.replace("_", " ") for layer in layers])
    shown = {title: curves for title, curves in panels.items() if curves}
    return draw_layers(row, shown, relative_widths(layers))


def draw_ranges(reports: Sequence[Report]) -> list[str]:
    """Draws the NUM_BANDS inputs whose range varies most between timesteps; layers with the same input share a plot."""
    readers: dict[str, list[LayerProfile]] = {}
    for layer in next((report.layers for report in reports if report.layers), ()):
        readers.setdefault(str(layer.ranges), []).append(layer)
    plots = []
    for alike in sorted(readers.values(), key=lambda alike: -measure_variation(alike[0]))[:NUM_BANDS]:
        more = f" and {len(alike) - 1} more" if len(alike) > 1 else ""
        bands = [Band(float(timestep), *found) for timestep, found in alike[0].ranges.items()]
        plots.append(draw_bands(bands, alike[0].name + more))
    return plots


@plot_style()
def draw_layers(row: Row, panels: Mapping[str, Mapping[Mark, Values]], heat: Mapping[float, Values]) -> str:
    """Draws, one below the other and with the layers from left to right: errors, widths of the inputs' ranges, roles.

    Args:
        panels: title -> mark of a model -> a value per layer; one panel of curves per title.
        heat: timestep -> width of each layer's input range as a share (0 to 1) of its widest; {} draws no map.
    """
    heights = [PANEL] * len(panels) + [MAP] * bool(heat) + [STRIP]
    names = LETTER * max(map(len, row.names))
    canvas = Canvas(WIDTH, sum(heights) + GAP * len(heights) + names + GAP)
    ratios = {"height_ratios": heights}
    *places, strip = canvas.figure.subplots(len(heights), 1, sharex=True, squeeze=False, gridspec_kw=ratios)[:, 0]
    for axes, (title, curves) in zip(places, panels.items()):
        _draw_panel(canvas, axes, row, title, curves)
    if heat:
        _draw_map(canvas, places[-1], heat)
    _draw_roles(canvas, strip, row)
    return canvas.to_svg("errors and input ranges of all layers")


def _draw_panel(canvas: Canvas, axes: "Axes", row: Row, title: str, curves: Mapping[Mark, Values]) -> None:
    """Draws a curve per model, with gaps where a layer has no value."""
    for mark, values in curves.items():
        hints = [f"{mark.name}, {name}: {value:.4g}" for name, value in zip(row.names, values) if value is not None]
        known = [math.nan if value is None else value for value in values]
        canvas.plot(axes, range(len(known)), known, mark, hints)
    axes.set_ylabel(title)


def _draw_map(canvas: Canvas, axes: "Axes", heat: Mapping[float, Values]) -> None:
    """Draws a cell per layer and timestep, largest timestep on top; transparent for the smallest share of all, opaque for 1."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    timesteps = sorted(heat, reverse=True)
    timesteps = timesteps[:: -(-len(timesteps) // MAX_ROWS)]
    shares = [[math.nan if share is None else share for share in heat[timestep]] for timestep in timesteps]
    least = min((share for line in shares for share in line if not math.isnan(share)), default=0.0)
    scale = Normalize(least if least < 1 else 0.0, 1.0)
    colours = LinearSegmentedColormap.from_list("share", [COLOURS[0] + "00", COLOURS[0] + "ff"])
    axes.imshow(shares, cmap=colours, norm=scale, aspect="auto", interpolation="none")
    every = -(-len(timesteps) // 10)
    axes.set_yticks(range(0, len(timesteps), every), [f"{timestep:g}" for timestep in timesteps[::every]])
    axes.set_ylabel("timestep")
    axes.grid(visible=False)
    bar = canvas.figure.colorbar(ScalarMappable(scale, colours.resampled(10)), ax=axes, pad=0.01)
    bar.ax.set_ylabel("range / widest range")


def _draw_roles(canvas: Canvas, axes: "Axes", row: Row) -> None:
    """Draws a strip with a colour per role, below it the names of every n-th layer so that they do not overlap, and a legend."""
    from matplotlib.patches import Patch

    roles = dict.fromkeys(row.roles)
    colours = {role: ROLE_COLOURS[number % len(ROLE_COLOURS)] for number, role in enumerate(roles)}
    count = len(row.names)
    axes.bar(range(count), [1] * count, width=0.9, color=[colours[role] for role in row.roles])
    axes.set(xlim=(-0.5, count - 0.5), ylim=(0, 1), yticks=[])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    every = max(1, -(-MIN_PITCH * count // WIDTH))
    axes.set_xticks(range(0, count, every), row.names[::every], rotation=90)
    axes.tick_params(length=0)
    patches = [Patch(color=colour) for colour in colours.values()]
    canvas.figure.legend(patches, colours, loc="outside lower left", ncols=len(colours), handlelength=1, columnspacing=1.5)


@plot_style()
def draw_bands(bands: Sequence[Band], title: str) -> str:
    """Draws the range of a layer's input by timestep: smallest to largest value light, 0.1 % to 99.9 % quantile dark."""
    bands = sorted(bands, key=lambda band: band.timestep)
    timesteps = [band.timestep for band in bands]
    canvas = Canvas(SMALL_WIDTH, SMALL_HEIGHT)
    axes = canvas.figure.subplots()
    for low, high, opacity in (("least", "largest", 0.3), ("low", "high", 0.6)):
        lower, upper = ([getattr(band, name) for band in bands] for name in (low, high))
        axes.fill_between(timesteps, lower, upper, color=COLOURS[0], alpha=opacity, linewidth=0)
    axes.set_title(title, loc="left")
    axes.set_xlabel("timestep")
    return canvas.to_svg(f"range of the input of {title}")


def relative_widths(layers: Sequence[LayerProfile]) -> dict[float, list[float | None]]:
    """Returns timestep -> the width of each layer's input range as a share (0 to 1) of its largest width at any timestep."""
    widths = [measure_widths(layer) for layer in layers]
    timesteps = {timestep for found in widths for timestep in found}
    widest = [max(found.values(), default=0.0) for found in widths]
    return {at: [found[at] / most if most and at in found else None for found, most in zip(widths, widest)] for at in timesteps}


def measure_widths(layer: LayerProfile) -> dict[float, float]:
    """Returns timestep -> distance between the 0.1 % and the 99.9 % quantile of the layer's input."""
    return {float(timestep): high - low for timestep, (_, low, high, _) in layer.ranges.items()}


def measure_variation(layer: LayerProfile) -> float:
    """Returns the ratio of the input's largest range width to its smallest over the timesteps; 1 if the input is constant."""
    widths = [width for width in measure_widths(layer).values() if width > 0]
    return max(widths, default=1.0) / min(widths, default=1.0)
