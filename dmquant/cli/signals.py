"""Ctrl-C and SIGTERM while a pipeline is quantized: the first one asks, the second one insists."""

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
    """The saved run beside a result folder: continued, begun or refused; removed when the block ends well.

    `line` is the command line that a user repeats to continue. Several ranks leave the block together.
    """
    folder = Path(os.path.abspath(folder))
    with Stop() as stop:
        run = SavedRun(folder.with_name(f"{folder.name}.run"), should_stop=stop)
        try:
            choose(run, resume=resume, force=force)
            yield run
        except (KeyboardInterrupt, Interrupted) as error:
            if isinstance(error, Interrupted):
                distributed.leave_together()
            raise Interrupted(advise(run, line)) from error
        distributed.leave_together()
        run.remove()


def choose(run: SavedRun, *, resume: bool, force: bool) -> None:
    """Continue or start over: what is there is neither taken up nor thrown away unasked."""
    is_there = run.is_there()
    if resume:
        console.say(f"continuing the run in {run.folder}" if is_there else "nothing to resume: starting from the beginning")
    elif force:
        run.remove()
    elif is_there:
        raise InputError(f"{run.folder} holds an interrupted run; use --resume to continue it, or --force to start over")


def advise(run: SavedRun, line: list[str]) -> str:
    """What a user who interrupted a run wants to know."""
    if not run.is_there():
        return "interrupted; nothing to resume"
    again = line if "--resume" in line else [*line, "--resume"]
    return f"interrupted; to continue: {shlex.join(['dmquant', *again])}"


class Stop:
    """True once a signal came. Where nobody asks yet, as before the first step of a run, the signal interrupts at once."""

    def __init__(self) -> None:
        self._is_watched, self._is_asked = False, False

    def __call__(self) -> bool:
        self._is_watched = True
        return self._is_asked

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._is_asked or not self._is_watched:
            raise KeyboardInterrupt
        self._is_asked = True
        console.say("stopping after this step; once more stops now")
