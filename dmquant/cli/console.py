"""The only module that prints. Results go to stdout; talk, progress, warnings and errors go to stderr.

A table that is piped keeps its full width: squeezed into 80 columns it would lose digits. Text from users and files is
never read as markup, and its control characters are dropped, so that a file name cannot drive the terminal. Of several
ranks only the first speaks, except of errors. A closed stream takes what comes and keeps nothing.
"""

import io
import operator
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from typing import TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from dmquant.evaluation.reports.columns import IDENTITY
from dmquant.evaluation.reports.comparison import Comparison
from dmquant.training import distributed

PIPED_WIDTH = 100_000  # columns; nothing is cut or wrapped
QUIET_PERIOD_S = 10.0
PLAIN_SIGNS = str.maketrans({"↓": "v", "↑": "^", "–": "-", "─": "-"})


def show(text: str) -> None:
    """A result on stdout."""
    _write(clean(text.rstrip("\n")) + "\n")


def show_table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, align: str, notes: Iterable[str] = ()) -> None:
    """A table on stdout; `align` has one letter per column, l for text and r for numbers. Notes follow, a line each."""
    _show(_make_table(headings, rows, align), notes)


def show_comparison(comparison: Comparison) -> None:
    """The comparison's table with its notes; on a terminal too narrow for it, one column per model."""
    headings, cells = comparison.headings(), comparison.cells(mark="*{}".format)
    notes = ["* the best of the quantized models"] if comparison.best() else []
    align = "".join("l" if column in IDENTITY else "r" for column in comparison.columns)
    table, console = _make_table(headings, cells, align), _console(sys.stdout)
    if console.measure(table, options=console.options.update(width=PIPED_WIDTH)).maximum > console.width:
        first, *others = zip(headings, *cells)
        table = _make_table(first, others, "l" + "r" * len(cells))
    _show(table, ["", *notes, *comparison.notes])


def say(text: str) -> None:
    """Talk: one line on stderr."""
    if distributed.is_first():
        _talk(text)


def fail(text: str) -> None:
    """An error: one line on stderr, whatever the message holds. A rank that fails alone is heard too."""
    _talk(("error: " if distributed.is_first() else f"error: rank {distributed.number()}: ") + " ".join(text.split()))


def show_warnings() -> None:
    """From now on Python warnings are one line of talk, without the source line that raised them."""
    warnings.showwarning = lambda message, *_, **__: say("warning: " + " ".join(str(message).split()))


def clean(text: str) -> str:
    """Text without control characters: line feeds and tabs stay, escape sequences lose their lead-in."""
    return "".join(char for char in text if char in "\n\t" or char.isprintable())


class Tracker:
    """The progress seam's printer: bars with an ETA on a terminal, else a line every `period_s` seconds.

    Where the work's items have a `loss`, it is shown.
    """

    def __init__(self, *, period_s: float = QUIET_PERIOD_S):
        self._period_s = period_s
        self._console = _console(sys.stderr)
        self._bars: Progress | None = None

    def __call__(self, work: Iterable, label: str) -> Iterator:
        if not distributed.is_first():
            return iter(work)
        total = operator.length_hint(work) or None
        return self._draw(work, clean(label), total) if self._console.is_terminal else self._report(work, clean(label), total)

    def _draw(self, work: Iterable, label: str, total: int | None) -> Iterator:
        is_outermost = self._bars is None
        if self._bars is None:
            self._bars = _make_bars(self._console)
            self._bars.start()
        bars, task = self._bars, self._bars.add_task(label, total=total, loss="")
        try:
            for item in work:
                yield item
                bars.update(task, advance=1, loss=_describe_loss(item))
        finally:
            bars.stop_task(task)
            if is_outermost:
                bars.stop()
                self._bars = None
            else:
                bars.remove_task(task)

    def _report(self, work: Iterable, label: str, total: int | None) -> Iterator:
        start = last = time.monotonic()
        for done, item in zip(count(1), work):
            yield item
            now = time.monotonic()
            if now - last >= self._period_s and done != total:
                say(_describe_progress(label, done, total, now - start, item))
                last = now
        if time.monotonic() - start >= min(self._period_s, 1.0):
            say(f"{label}: done in {_format_seconds(time.monotonic() - start)}")


def _make_table(headings: Sequence[str], rows: Iterable[Sequence[str]], align: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="")
    for heading, side in zip(headings, align, strict=True):
        # fold, not ellipsis: a narrow terminal may break a number but never drop its digits
        table.add_column(Text(clean(heading)), justify="left" if side == "l" else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(clean(cell)) for cell in row))
    return table


def _show(table: Table, notes: Iterable[str]) -> None:
    console = _console(sys.stdout)
    with console.capture() as capture:
        console.print(table)
    # rich pads every line to the table's width
    lines = [line.rstrip() for line in capture.get().splitlines()]
    _write("\n".join([*lines, *map(clean, notes)]) + "\n")


def _make_bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _describe_progress(label: str, done: int, total: int | None, elapsed_s: float, item: object) -> str:
    parts = [f"{label}: {done}/{total}" if total else f"{label}: {done}", _describe_loss(item)]
    if total:
        parts.append(f"{_format_seconds(elapsed_s / done * (total - done))} left")
    return ", ".join(part for part in parts if part)


def _describe_loss(item: object) -> str:
    loss = getattr(item, "loss", None)
    return f"loss {loss:.4g}" if isinstance(loss, float) else ""


def _format_seconds(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _talk(text: str) -> None:
    _console(sys.stderr).print(Text(clean(text)), soft_wrap=True)


def _console(stream: TextIO | None) -> Console:
    stream = stream or io.StringIO()
    console = Console(file=stream, markup=False, highlight=False, emoji=False)
    return console if console.is_terminal else Console(file=stream, markup=False, highlight=False, emoji=False, width=PIPED_WIDTH)


def _write(text: str) -> None:
    """To stdout and out of the buffer, so that a closed pipe shows here and not at exit."""
    if sys.stdout is None or not distributed.is_first():
        return
    encoding = sys.stdout.encoding or "ascii"
    if not encoding.lower().startswith("utf"):
        text = text.translate(PLAIN_SIGNS)
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()
