"""Layers side by side as SVG: panels over one row of layers in the order in which they run, and one layer's range by timestep."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

from dmquant.evaluation.reports.labels import LETTER
from dmquant.evaluation.reports.svg import COLOURS, LEFT, RIGHT, draw_frame, draw_heights, draw_line, make_axis, wrap, write

WIDTH = 1268  # pixels
PANEL, MAP, GAP = 210, 170, 22  # heights of a panel of curves and of the map, and between two
STRIP = 8  # height of the strip of roles
LINE = 18  # of a legend
MIN_PITCH = 12  # between two names of layers
SMALL_WIDTH, SMALL_HEIGHT = 412, 240
MAX_ROWS = 25  # of the map
GROUPS = ("#999999", "#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#8c6d1f", "#0072b2", "#d55e00", "#f0e442")

Values = Sequence[float | None]  # of all layers, None where there is none


@dataclass(frozen=True)
class Band:
    """What one layer reads at one timestep: the ends of the range, and of its bulk within."""

    timestep: float
    least: float
    low: float
    high: float
    largest: float


@dataclass(frozen=True)
class Row:
    """The layers from left to right, and what they do."""

    names: Sequence[str]
    roles: Sequence[str]

    @property
    def pitch(self) -> float:
        return (WIDTH - LEFT - RIGHT) / len(self.names)

    def place(self, number: float) -> float:
        return LEFT + (number + 0.5) * self.pitch


def draw_layers(
    row: Row, panels: Mapping[str, Mapping[str, Values]], heat: Mapping[float, Values], colours: Mapping[str, str]
) -> str:
    """A panel of curves per title, one curve per model, over a map of the shares (0 to 1) by timestep, if there are any."""
    models = list(dict.fromkeys(model for curves in panels.values() for model in curves))
    legend, top = draw_legend({model: colours[model] for model in models}, 0)
    parts = [legend]
    for title, curves in panels.items():
        parts.append(draw_panel(row, title, curves, colours, top))
        top += PANEL + GAP
    if heat:
        parts.append(draw_map(row, heat, top))
        top += MAP + GAP
    strip, top = draw_roles(row, top - GAP + 4)
    names, top = draw_names(row, top)
    scale, top = draw_scale(heat, top) if heat else ("", top)
    return wrap([*parts, strip, names, scale], "layers", WIDTH, round(top))


def draw_legend(entries: Mapping[str, str], top: float) -> tuple[str, float]:
    """Names with their colours, from left to right in as many lines as they need; and where they end."""
    parts, x = [], float(LEFT)
    for name, colour in entries.items():
        width = 30 + LETTER * len(name)
        if x > LEFT and x + width > WIDTH - RIGHT:
            x, top = LEFT, top + LINE
        parts.append(f'<circle cx="{x + 5:.1f}" cy="{top + 10}" r="5" fill="{colour}"/>{write(x + 14, top + 14, name, "start")}')
        x += width
    return "".join(parts), top + LINE + 6


def draw_panel(row: Row, title: str, curves: Mapping[str, Values], colours: Mapping[str, str], top: float) -> str:
    """Curves broken where a layer has no value, a mark with its value and name at each layer."""
    known = [value for values in curves.values() for value in values if value is not None]
    axis = make_axis(title, known or [0.0, 1.0], top + PANEL, top, may_be_log=False)
    parts = [draw_heights(axis, LEFT, WIDTH - RIGHT)]
    for model, values in curves.items():
        places = [(row.place(number), value) for number, value in enumerate(values)]
        for is_known, piece in groupby(places, key=lambda place: place[1] is not None):
            if is_known:
                parts.append(draw_line([(x, axis.place(value)) for x, value in piece], colours[model]))
        for name, (x, value) in zip(row.names, places):
            if value is not None:
                hint = f"<title>{escape(f'{model}, {name}: {value:.4g}')}</title>"
                parts.append(f'<circle cx="{x:.1f}" cy="{axis.place(value):.1f}" r="3" fill="{colours[model]}">{hint}</circle>')
    return "".join(parts)


def draw_map(row: Row, heat: Mapping[float, Values], top: float) -> str:
    """A cell per layer and timestep, the earliest of sampling above: blank for the least share of all, full for 1."""
    timesteps = sorted(heat, reverse=True)
    timesteps = timesteps[:: -(-len(timesteps) // MAX_ROWS)]
    height, middle = MAP / len(timesteps), top + MAP / 2
    every, least = -(-15 // height), find_least(heat)
    parts = [f'<g transform="rotate(-90 16 {middle})">{write(16, middle, "timestep", "middle")}</g>']
    for line, timestep in enumerate(timesteps):
        y = top + line * height
        if line % every == 0:
            parts.append(write(LEFT - 8, y + height / 2 + 4, f"{timestep:.6g}", "end"))
        for number, share in enumerate(heat[timestep]):
            if share is not None:
                place = f'x="{row.place(number - 0.5):.1f}" y="{y:.1f}" width="{row.pitch:.2f}" height="{height:.2f}"'
                parts.append(f'<rect {place} fill="{COLOURS[0]}" fill-opacity="{shade(share, least):.2f}"/>')
    box = f'x="{LEFT}" y="{top}" width="{WIDTH - LEFT - RIGHT}" height="{MAP}"'
    return "".join([*parts, f'<rect {box} fill="none" stroke="currentColor"/>'])


def find_least(heat: Mapping[float, Values]) -> float:
    return min((share for shares in heat.values() for share in shares if share is not None), default=0.0)


def shade(share: float, least: float) -> float:
    """Opacity of a share: 0 for the least, 1 for 1."""
    return (share - least) / (1 - least) if least < 1 else 1.0


def draw_scale(heat: Mapping[float, Values], top: float) -> tuple[str, float]:
    """What the shades of the map mean."""
    least, said = find_least(heat), "range of a layer's input, as a share of its widest:"
    x = LEFT + LETTER * len(said)
    cells = [
        f'<rect x="{x + 44 + 14 * step:.0f}" y="{top + 4}" width="14" height="12" fill="{COLOURS[0]}"'
        f' fill-opacity="{step / 9:.2f}"/>'
        for step in range(10)
    ]
    ends = write(x + 38, top + 14, f"{least:.0%}", "end") + write(x + 190, top + 14, "100%", "start")
    return "".join([write(LEFT, top + 14, said, "start"), *cells, ends]), top + LINE + 6


def draw_roles(row: Row, top: float) -> tuple[str, float]:
    """A strip with a colour per role, under the layers that have it."""
    colours = paint_roles(row)
    return "".join(
        f'<rect x="{row.place(number - 0.5) + 0.5:.1f}" y="{top}" width="{max(1, row.pitch - 1):.1f}" height="{STRIP}"'
        f' fill="{colours[role]}"><title>{escape(role)}</title></rect>'
        for number, role in enumerate(row.roles)
    ), top + STRIP


def paint_roles(row: Row) -> dict[str, str]:
    return {role: GROUPS[number % len(GROUPS)] for number, role in enumerate(dict.fromkeys(row.roles))}


def draw_names(row: Row, top: float) -> tuple[str, float]:
    """The names of the layers, upright, of as many as have room, over the legend of their roles."""
    every = max(1, round(-(-MIN_PITCH // row.pitch)))
    shown = list(enumerate(row.names))[::every]
    parts = [
        f'<g transform="translate({row.place(number) + 4:.1f} {top + 6:.1f}) rotate(-90)">{write(0, 0, name, "end")}</g>'
        for number, name in shown
    ]
    legend, bottom = draw_legend(paint_roles(row), top + 14 + LETTER * max(len(name) for _, name in shown))
    return "".join([*parts, legend]), bottom


def draw_bands(bands: Sequence[Band], title: str) -> str:
    """What a layer reads from timestep to timestep: the whole range, and in it stronger the bulk."""
    bands = sorted(bands, key=lambda band: band.timestep)
    x_axis = make_axis("timestep", [band.timestep for band in bands], LEFT - 16, SMALL_WIDTH - 20, may_be_log=False)
    ends = [value for band in bands for value in (band.least, band.largest)]
    y_axis = make_axis("", ends, SMALL_HEIGHT - 46, 24, may_be_log=False)
    parts = [draw_frame(x_axis, y_axis), write(LEFT - 16, 15, title, "start")]
    for low, high, opacity in (("least", "largest", 0.3), ("low", "high", 0.6)):
        edge = [(band.timestep, getattr(band, high)) for band in bands]
        edge += [(band.timestep, getattr(band, low)) for band in reversed(bands)]
        path = " ".join(f"{x_axis.place(x):.1f},{y_axis.place(y):.1f}" for x, y in edge)
        parts.append(f'<polygon points="{path}" fill="{COLOURS[0]}" fill-opacity="{opacity}"/>')
    return wrap(parts, f"range of the input of {title}", SMALL_WIDTH, SMALL_HEIGHT)
