"""Plots as SVG text, without a plotting library: what a page needs and no more.

Colours are those of Okabe and Ito (2008), told apart by most eyes; frame and text take the colour of the page around.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from dmquant.evaluation.reports.labels import HEIGHT as LABEL
from dmquant.evaluation.reports.labels import RADIUS, Box, place_labels

WIDTH, HEIGHT = 620, 380  # pixels
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 16, 48
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d1f", "#7f7f7f")
NUM_TICKS = 6
ENTRY = 14  # pixels between two names of a legend


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    label: str
    colour: str = COLOURS[0]


@dataclass(frozen=True)
class Axis:
    """Values -> pixels."""

    title: str
    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def place(self, value: float) -> float:
        low, high, value = (math.log10(v) for v in (self.low, self.high, value)) if self.is_log else (self.low, self.high, value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        if not self.is_log:
            return nice_ticks(self.low, self.high)
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        fine = [factor * 10.0**decade for decade in decades for factor in (1, 2, 5)]
        return [tick for tick in fine if self.low <= tick <= self.high]


def scatter(points: Sequence[Point], *, x_title: str, y_title: str) -> str:
    """Labelled points, x on a logarithmic axis where it spans a factor of 4; a line joins those that nothing beats in both."""
    x_axis = make_axis(x_title, [point.x for point in points], LEFT, WIDTH - RIGHT)
    y_axis = make_axis(y_title, [point.y for point in points], HEIGHT - BOTTOM, TOP, may_be_log=False)
    front = [(x_axis.place(point.x), y_axis.place(point.y)) for point in find_front(points)]
    parts = [draw_frame(x_axis, y_axis), draw_line(front, "currentColor", dash="4 4")]
    ordered = sorted(points, key=lambda point: (point.y, point.x))
    places = [(x_axis.place(point.x), y_axis.place(point.y)) for point in ordered]
    boxes = place_labels(places, [point.label for point in ordered], Box(LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM))
    for point, (x, y), box in zip(ordered, places, boxes):
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{RADIUS}" fill="{point.colour}"/>')
        is_left = box.right < x
        edge, middle = box.right if is_left else box.left, (box.top + box.bottom) / 2
        if abs(middle - y) > LABEL:  # not at once plain whose label it is
            parts.append(f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{edge:.1f}" y2="{middle:.1f}" stroke="{point.colour}"/>')
        parts.append(write(edge, box.bottom - 3, point.label, "end" if is_left else "start"))
    return wrap(parts, f"{y_title} against {x_title}")


def lines(
    curves: Mapping[str, Sequence[tuple[float, float]]], colours: Mapping[str, str], *, x_title: str, y_title: str
) -> str:
    """One line per name through its (x, y), with a legend in the frame's lower right corner."""
    x_axis = make_axis(x_title, [x for curve in curves.values() for x, _ in curve], LEFT, WIDTH - RIGHT, may_be_log=False)
    y_axis = make_axis(y_title, [y for curve in curves.values() for _, y in curve], HEIGHT - BOTTOM, TOP, may_be_log=False)
    parts = [draw_frame(x_axis, y_axis)]
    for number, (name, curve) in enumerate(curves.items()):
        parts.append(draw_line([(x_axis.place(x), y_axis.place(y)) for x, y in sorted(curve)], colours[name]))
        height = HEIGHT - BOTTOM - 12 - ENTRY * (len(curves) - 1 - number)
        parts.append(f'<circle cx="{WIDTH - RIGHT - 12}" cy="{height - 4}" r="4" fill="{colours[name]}"/>')
        parts.append(write(WIDTH - RIGHT - 22, height, name, "end"))
    return wrap(parts, f"{y_title} against {x_title}")


def find_front(points: Sequence[Point]) -> list[Point]:
    """The points that no other one is at most as large as in both, from left to right."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x, point.y)):
        if not front or point.y < front[-1].y:
            front.append(point)
    return front


def make_axis(title: str, values: Sequence[float], start: float, end: float, *, may_be_log: bool = True) -> Axis:
    low, high = min(values), max(values)
    if may_be_log and low > 0 and high > 4 * low:
        return Axis(title, low / 1.25, high * 1.25, start, end, is_log=True)
    margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return Axis(title, low - margin, high + margin, start, end)


def nice_ticks(low: float, high: float) -> list[float]:
    """Round numbers between the two, some six of them."""
    rough = (high - low) / NUM_TICKS
    scale = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * scale for factor in (1, 2, 5, 10) if factor * scale >= rough)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [number * step for number in range(first, last + 1)]


def draw_frame(x_axis: Axis, y_axis: Axis) -> str:
    """A box with ticks and titles; the axes say where it stands."""
    left, right, top, bottom = x_axis.start, x_axis.end, y_axis.end, y_axis.start
    parts = []
    for tick in x_axis.ticks():
        x = x_axis.place(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{bottom}"/>')
        parts.append(write(x, bottom + 16, f"{tick:.6g}", "middle"))
    parts.append(write((left + right) / 2, bottom + 38, x_axis.title, "middle"))
    return "".join([*parts, draw_heights(y_axis, left, right)])


def draw_heights(axis: Axis, left: float, right: float) -> str:
    """A box with the ticks of its y axis only, and its title."""
    parts = []
    for tick in axis.ticks():
        y = axis.place(tick)
        parts.append(f'<line class="grid" x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
        parts.append(write(left - 8, y + 4, f"{tick:.6g}", "end"))
    middle = (axis.start + axis.end) / 2
    parts.append(f'<g transform="rotate(-90 {left - 54} {middle})">{write(left - 54, middle, axis.title, "middle")}</g>')
    box = f'x="{left}" y="{axis.end}" width="{right - left}" height="{axis.start - axis.end}"'
    return "".join([*parts, f'<rect {box} fill="none" stroke="currentColor"/>'])


def pale(colour: str) -> str:
    """A colour #rrggbb half-way to white."""
    return "#" + "".join(f"{(int(colour[place : place + 2], 16) + 255) // 2:02x}" for place in (1, 3, 5))


def draw_line(places: Sequence[tuple[float, float]], colour: str, *, dash: str = "none") -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5" stroke-dasharray="{dash}"/>'


def write(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def wrap(parts: Sequence[str], title: str, width: float = WIDTH, height: float = HEIGHT) -> str:
    head = f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="{escape(title)}"'
    return f'{head} xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
