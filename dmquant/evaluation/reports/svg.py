"""Writes matplotlib figures as SVG elements of an HTML page.

Text is kept as text, black is replaced by the colour of the page's text, and equal figures give equal bytes.
matplotlib (the extra `plots`) is imported when a plot is drawn.
"""

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element

from dmquant.errors import MissingResource

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MISSING = "plots need matplotlib; get it with: pip install 'dmquant[plots]'"
DPI = 72  # matplotlib writes 72 SVG units per inch, so that a unit is a pixel
# Okabe and Ito (2008): most colour-blind readers tell them apart
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d1f", "#7f7f7f")
SHAPES = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼"}  # matplotlib's marker -> Unicode character of the same shape
STYLE = {
    "figure.constrained_layout.use": True, "figure.facecolor": "none", "axes.facecolor": "none", "axes.axisbelow": True,
    "axes.grid": True, "grid.color": "black", "grid.alpha": 0.15, "font.size": 12, "axes.titlesize": 12,
    "xtick.labelsize": 11, "ytick.labelsize": 11, "legend.fontsize": 11, "legend.frameon": False,
    "axes.formatter.useoffset": False, "text.parse_math": False, "svg.fonttype": "none",
}  # fmt: skip
SVG, LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
REFERENCE = re.compile(r"#([\w.-]+)")
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")  # no XML may hold these characters


@dataclass(frozen=True)
class Mark:
    """Name, colour (#rrggbb) and matplotlib marker of one model, the same in all plots of a page."""

    name: str
    colour: str
    marker: str

    @property
    def sign(self) -> str:
        """The Unicode character of the marker's shape, for a legend in HTML."""
        return SHAPES[self.marker]


def choose_marks(models: Iterable[str]) -> dict[str, Mark]:
    """Returns model -> its mark; the first 40 differ. Its name is the last part of its path if no other model has the same."""
    models = list(dict.fromkeys(models))
    names = [Path(model).name for model in models]
    names = names if len(set(names)) == len(names) else models
    marks = zip(names, cycle(COLOURS), cycle(SHAPES))
    return {model: Mark(*mark) for model, mark in zip(models, marks)}


@contextmanager
def plot_style() -> Iterator[None]:
    """Sets matplotlib's defaults and STYLE inside the block, whatever the user's own settings are.

    Raises:
        MissingResource: matplotlib is not installed.
    """
    try:
        from matplotlib import style
    except ImportError as error:
        raise MissingResource(MISSING) from error
    with style.context(["default", STYLE]):
        yield


class Canvas:
    """A matplotlib figure with a size in pixels. Its marks have hints: text that a browser shows under the pointer."""

    def __init__(self, width: float, height: float):
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
        self._hints: dict[str, Sequence[str]] = {}

    def plot(self, axes: "Axes", x: Sequence[float], y: Sequence[float], mark: Mark, hints: Sequence[str]) -> None:
        """Draws a mark with its hint at each (x, y), and a line through them; a gap where y is NaN, which has no hint."""
        group = f"marks{len(self._hints)}"
        axes.plot(x, y, color=mark.colour, marker=mark.marker, gid=group)
        self._hints[group] = hints

    def to_svg(self, title: str) -> str:
        """Returns the <svg> element. `title` describes it to a screen reader, and must be unique on a page: ids depend on it."""
        from matplotlib import rc_context

        text = io.StringIO()
        with rc_context({"svg.hashsalt": title}), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser's fonts draw the text
            self.figure.savefig(text, format="svg", metadata={"Date": None})
        root = ET.fromstring(CONTROL.sub("", text.getvalue()))
        _add_hints(root, self._hints)
        _fit_into_page(root)
        width, height = (f"{float(side):g}" for side in root.attrib["viewBox"].split()[2:])
        root.attrib |= {"xmlns": SVG[1:-1], "width": width, "height": height, "role": "img", "aria-label": title}
        return ET.tostring(root, encoding="unicode")


def _add_hints(root: Element, hints: dict[str, Sequence[str]]) -> None:
    """Gives each mark of a group its hint as a <title>, which browsers show under the pointer."""
    for group in root.iter(f"{SVG}g"):
        marks = group.iter(f"{SVG}use")
        for mark, hint in zip(marks, hints.get(group.get("id", ""), ()), strict=group.get("id") in hints):
            ET.SubElement(mark, f"{SVG}title").text = CONTROL.sub("", hint)


def _fit_into_page(root: Element) -> None:
    """Removes what several figures on one page would share (metadata, style rules, ids) and takes colour and font of the page."""
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{SVG}metadata", f"{SVG}style"):
                parent.remove(child)
    used = {name for element in root.iter() for value in element.attrib.values() for name in REFERENCE.findall(value)}
    for element in root.iter():
        element.tag = element.tag.removeprefix(SVG)
        attributes = {"href" if name == LINK else name: value for name, value in element.attrib.items()}
        if attributes.get("id") not in used:
            attributes.pop("id", None)
        if attributes.get("transform", "").startswith("rotate(-0 "):
            del attributes["transform"]
        if "style" in attributes:
            style = re.sub(r"font-family: [^;]*(; )?", "", attributes["style"])
            attributes["style"] = style.replace("#000000", "currentColor")
        element.attrib.clear()
        element.attrib.update(attributes)
    # matplotlib writes no fill where it is black, and the line joins in the style rule that was removed
    root.attrib |= {"fill": "currentColor", "stroke-linejoin": "round", "stroke-linecap": "butt"}
    root.attrib.pop("version", None)
