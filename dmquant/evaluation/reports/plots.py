"""Plots of whole models: quality against cost, and the cosine of the denoisers' outputs by timestep."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dmquant.evaluation.reports.columns import COST, Column, name_metric, sort_key
from dmquant.evaluation.reports.comparison import Comparison
from dmquant.evaluation.reports.report import Report
from dmquant.evaluation.reports.svg import Canvas, Mark, plot_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 480, 320  # pixels
LOG_RATIO = 4  # between the largest and the smallest value of an axis that is logarithmic
COSTS = tuple(column for column in COST if column.key in ("size_mb", "giga_ops", "bits_per_weight"))


@dataclass(frozen=True)
class Point:
    """One model in a plot of quality against cost."""

    x: float
    y: float
    mark: Mark
    bits: str  # of weights / activations


def draw_quality(comparison: Comparison, marks: Mapping[str, Mark]) -> list[str]:
    """Draws the first metric for which lower is better against size, bits per weight and operations.

    A plot needs at least two models.
    """
    metric = choose_metric(comparison)
    if metric is None:
        return []
    plots = []
    for cost in COSTS:
        points = [
            Point(x, y, marks[str(row["model"])], str(row["bits"]))
            for row in comparison.rows
            if isinstance(x := row[cost.key], int | float) and isinstance(y := row[metric.key], int | float)
        ]
        if len(points) > 1:
            plots.append(scatter(points, x_title=_title(cost), y_title=_title(metric)))
    return plots


def draw_cosine(reports: Sequence[Report], marks: Mapping[str, Mark]) -> str:
    """Draws the cosine between the outputs of each denoiser and of the float one by timestep; "" if no report has it."""
    found = {marks[report.model]: report.curves["cosine"] for report in reports if "cosine" in report.curves}
    curves = {mark: [(float(timestep), value) for timestep, value in curve.items()] for mark, curve in found.items()}
    return line_chart(curves, x_title="timestep", y_title="cosine to the float denoiser's output") if curves else ""


def choose_metric(comparison: Comparison) -> Column | None:
    """Returns the first metric in the table's order for which lower is better."""
    known = [name_metric(column.key) for column in comparison.columns if not column.is_change]
    return min((metric for metric in known if metric.better == "lower"), key=lambda metric: sort_key(metric.key), default=None)


@plot_style()
def scatter(points: Sequence[Point], *, x_title: str, y_title: str) -> str:
    """Draws a mark per point and a dashed line through the Pareto front: low x and low y are better."""
    canvas = Canvas(WIDTH, HEIGHT)
    axes = canvas.figure.subplots()
    front = find_front(points)
    axes.plot([point.x for point in front], [point.y for point in front], color="black", linestyle="--", linewidth=1)
    for point in points:
        hint = f"{point.mark.name} {point.bits}: {x_title} {point.x:.4g}, {y_title} {point.y:.4g}"
        canvas.plot(axes, [point.x], [point.y], point.mark, [hint])
    _choose_scale(axes, [point.x for point in points])
    axes.set(xlabel=x_title, ylabel=y_title)
    return canvas.to_svg(f"{y_title} against {x_title}")


@plot_style()
def line_chart(curves: Mapping[Mark, Sequence[tuple[float, float]]], *, x_title: str, y_title: str) -> str:
    """Draws one line per model through its (x, y)."""
    canvas = Canvas(WIDTH, HEIGHT)
    axes = canvas.figure.subplots()
    for mark, curve in curves.items():
        x, y = zip(*sorted(curve))
        canvas.plot(axes, x, y, mark, [f"{mark.name}, {x_title} {at:g}: {value:.4g}" for at, value in sorted(curve)])
    axes.set(xlabel=x_title, ylabel=y_title)
    return canvas.to_svg(f"{y_title} against {x_title}")


def find_front(points: Sequence[Point]) -> list[Point]:
    """Returns the Pareto front, sorted by x: points such that no other point is as small or smaller in both x and y."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x, point.y)):
        if not front or point.y < front[-1].y:
            front.append(point)
    return front


def _choose_scale(axes: "Axes", values: Sequence[float]) -> None:
    """Makes the x axis logarithmic if the values span more than LOG_RATIO, with plain numbers at 1, 2 and 5 of each decade."""
    if min(values) <= 0 or max(values) <= LOG_RATIO * min(values):
        return
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _title(column: Column) -> str:
    return column.title + (f", {column.unit}" if column.unit else "")
