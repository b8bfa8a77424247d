"""Several trainings in sequence, which are saved, resumed and displayed as a single run."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from dmquant.progress import Track
from dmquant.training import trainer
from dmquant.training.resume import Part, Run, Step


class StagedRun:
    """A run of `count` stages with `length` steps each. It saves the whole student and the state of the current stage."""

    def __init__(self, run: Run, student: nn.Module, *, count: int, length: int, track: Track):
        self.run, self.length = run, length
        self.parts: dict[str, Part] = {"student": student}
        device = next(student.parameters()).device
        # restored before the first stage: the inputs of the stage that is resumed depend on the saved student
        begin = run.restore(self.parts, device)
        self.first = begin // length
        steps = [trainer.Step(number) for number in range(begin, count * length)]
        self.steps = iter(run.keep(track(steps, "fine-tune"), self.parts))

    def finish(self) -> None:
        """Exhausts the iterator of steps, so that the progress display shows the last step."""
        next(self.steps, None)


class Stage(Run):
    """One training of a staged run, passed to its training loop as the run."""

    def __init__(self, staged_run: StagedRun, index: int):
        self._staged_run, self._index = staged_run, index

    def restore(self, parts: Mapping[str, Part], device: torch.device) -> int:
        """Loads the parts if the run is resumed in this stage. Returns the stage's first step that is still to be done."""
        self._set_parts(parts)
        if self._index != self._staged_run.first:
            return 0
        begin = self._staged_run.run.restore(self._staged_run.parts, device)
        return max(0, begin - self._index * self._staged_run.length)

    def keep(self, steps: Iterable[Step], parts: Mapping[str, Part]) -> Iterator[Step]:
        """Yields the stage's steps, and advances the whole run by one step with each."""
        self._set_parts(parts)
        for step in steps:
            shown = next(self._staged_run.steps)
            yield step
            shown.loss = step.loss

    def _set_parts(self, parts: Mapping[str, Part]) -> None:
        """Makes these the parts that are saved, with the whole student instead of the stage's."""
        whole = self._staged_run.parts["student"]
        self._staged_run.parts.clear()
        self._staged_run.parts.update({**parts, "student": whole})
