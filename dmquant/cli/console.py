"""The only module that prints. Results go to stdout; messages, progress, warnings and errors go to stderr.

A table that is not printed on a terminal keeps its full width: in 80 columns it would lose digits. Text from users and files
is not parsed as markup, and its control characters are removed, so that a file name cannot control the terminal. With several
ranks only the first prints; errors are printed by all. Text for a closed stream is dropped.
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

PIPED_WIDTH = 100_000  # columns; wide enough that nothing is cut or wrapped
QUIET_PERIOD_S = 10.0
PLAIN_SIGNS = str.maketrans({"↓": "v", "↑": "^", "–": "-", "─": "-"})


def print_result(text: str) -> None:
    """Prints a result on stdout."""
    _write(clean(text.rstrip("\n")) + "\n")


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, align: str, notes: Iterable[str] = ()) -> None:
    """Prints a table on stdout, and each note as a line below it.

    Args:
        align: One letter per column: l (left, for text) or r (right, for numbers).
    """
    _print_with_notes(_make_table(headings, rows, align), notes)


def print_comparison(comparison: Comparison) -> None:
    """Prints a comparison with its notes; if the terminal is too narrow, with one column per model instead of one row."""
    headings, cells = comparison.headings(), comparison.cells(mark="*{}".format)
    notes = ["* best of the quantized models"] if comparison.best() else []
    align = "".join("l" if column in IDENTITY else "r" for column in comparison.columns)
    table, console = _make_table(headings, cells, align), _console(sys.stdout)
    if console.measure(table, options=console.options.update(width=PIPED_WIDTH)).maximum > console.width:
        first, *others = zip(headings, *cells)
        table = _make_table(first, others, "l" + "r" * len(cells))
    _print_with_notes(table, ["", *notes, *comparison.notes])


def print_message(text: str) -> None:
    """Prints a message as one line on stderr."""
    if distributed.is_first():
        _print_to_stderr(text)


def print_error(text: str) -> None:
    """Prints an error as one line on stderr, on every rank; line breaks of the message become spaces."""
    _print_to_stderr(("error: " if distributed.is_first() else f"error: rank {distributed.number()}: ") + " ".join(text.split()))


def show_warnings() -> None:
    """Makes Python print warnings as one line on stderr, without the source line that raised them."""
    warnings.showwarning = lambda message, *_, **__: print_message("warning: " + " ".join(str(message).split()))


def clean(text: str) -> str:
    """Returns the text without control characters except line feeds and tabs; of escape sequences the ESC is removed."""
    return "".join(char for char in text if char in "\n\t" or char.isprintable())


class Tracker:
    """Shows the progress of an iterable: a bar on a terminal, else a line every `period_s` seconds, with the time left.

    If items have an attribute `loss`, it is shown.
    """

    def __init__(self, *, period_s: float = QUIET_PERIOD_S):
        self._period_s = period_s
        self._console = _console(sys.stderr)
        self._bars: Progress | None = None

    def __call__(self, work: Iterable, label: str) -> Iterator:
        if not distributed.is_first():
            return iter(work)
        total = operator.length_hint(work) or None
        show = self._show_bar if self._console.is_terminal else self._print_lines
        return show(work, clean(label), total)

    def _show_bar(self, work: Iterable, label: str, total: int | None) -> Iterator:
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

    def _print_lines(self, work: Iterable, label: str, total: int | None) -> Iterator:
        start = last = time.monotonic()
        for done, item in zip(count(1), work):
            yield item
            now = time.monotonic()
            if now - last >= self._period_s and done != total:
                print_message(_describe_progress(label, done, total, now - start, item))
                last = now
        if time.monotonic() - start >= min(self._period_s, 1.0):
            print_message(f"{label}: done in {_format_seconds(time.monotonic() - start)}")


def _make_table(headings: Sequence[str], rows: Iterable[Sequence[str]], align: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="")
    for heading, side in zip(headings, align, strict=True):
        # fold, not ellipsis: on a narrow terminal a number is broken into lines and keeps all digits
        table.add_column(Text(clean(heading)), justify="left" if side == "l" else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(clean(cell)) for cell in row))
    return table


def _print_with_notes(table: Table, notes: Iterable[str]) -> None:
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


def _print_to_stderr(text: str) -> None:
    _console(sys.stderr).print(Text(clean(text)), soft_wrap=True)


def _console(stream: TextIO | None) -> Console:
    stream = stream or io.StringIO()
    console = Console(file=stream, markup=False, highlight=False, emoji=False)
    return console if console.is_terminal else Console(file=stream, markup=False, highlight=False, emoji=False, width=PIPED_WIDTH)


def _write(text: str) -> None:
    """Writes to stdout and flushes, so that a closed pipe raises here and not at exit."""
    if sys.stdout is None or not distributed.is_first():
        return
    encoding = sys.stdout.encoding or "ascii"
    if not encoding.lower().startswith("utf"):
        text = text.translate(PLAIN_SIGNS)
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()
