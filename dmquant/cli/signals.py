"""Handles Ctrl-C and SIGTERM while a pipeline is quantized.

The first signal stops the run after the current step and saves its state; a second one stops at once.
"""

import os
import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Self

from dmquant.cli import console
from dmquant.errors import InputError, Interrupted
from dmquant.training import distributed
from dmquant.training.resume import SavedRun

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def resumable(folder: Path, line: list[str], *, resume: bool, force: bool) -> Iterator[SavedRun]:
    """Yields the saved run FOLDER.run beside the result folder, and removes it at the end of the block.

    After a signal the saved run stays. With several ranks all leave the block at the same time.

    Args:
        line: Command line without "dmquant"; the message of an interrupt repeats it.
        resume: Continue the saved run if there is one.
        force: Delete the saved run if there is one.

    Raises:
        InputError: there is a saved run, and neither `resume` nor `force` is given.
        Interrupted: a signal came; the message contains the command that continues.
    """
    folder = Path(os.path.abspath(folder))
    with StopRequest() as stop:
        run = SavedRun(folder.with_name(f"{folder.name}.run"), should_stop=stop)
        try:
            prepare_run(run, resume=resume, force=force)
            yield run
        except (KeyboardInterrupt, Interrupted) as error:
            if isinstance(error, Interrupted):
                distributed.leave_together()
            raise Interrupted(describe_interrupt(run, line)) from error
        distributed.leave_together()
        run.remove()


def prepare_run(run: SavedRun, *, resume: bool, force: bool) -> None:
    """Keeps the state of a saved run with `resume` and deletes it with `force`; raises InputError without either."""
    is_there = run.is_there()
    if resume:
        text = f"continuing the run in {run.folder}" if is_there else "nothing to resume: starting from the beginning"
        console.print_message(text)
    elif force:
        run.remove()
    elif is_there:
        raise InputError(f"{run.folder} holds an interrupted run; use --resume to continue it, or --force to start over")


def describe_interrupt(run: SavedRun, line: list[str]) -> str:
    """Returns the message of an interrupted run: the command that continues it, or that there is nothing to resume."""
    if not run.is_there():
        return "interrupted; nothing to resume"
    again = line if "--resume" in line else [*line, "--resume"]
    return f"interrupted; to continue: {shlex.join(['dmquant', *again])}"


class StopRequest:
    """Handles signals inside a `with` block; calling it returns whether a signal has come.

    Before the first call, and at a second signal, the handler raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self._is_polled, self._is_requested = False, False

    def __call__(self) -> bool:
        self._is_polled = True
        return self._is_requested

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._is_requested or not self._is_polled:
            raise KeyboardInterrupt
        self._is_requested = True
        console.print_message("stopping after this step; a second signal stops at once")
