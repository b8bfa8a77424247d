"""Many trainings, one after the other, as a single run: saved, continued and shown as one."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from dmquant.progress import Track
from dmquant.training import trainer
from dmquant.training.resume import Part, Run, Step


class Relay:
    """`count` legs of `length` steps each. Saved are the whole student and what the leg under way consists of."""

    def __init__(self, run: Run, student: nn.Module, *, count: int, length: int, track: Track):
        self.run, self.length = run, length
        self.parts: dict[str, Part] = {"student": student}
        device = next(student.parameters()).device
        begin = run.restore(self.parts, device)  # now: the inputs of the leg to continue are those of the student as it was
        self.first = begin // length
        steps = [trainer.Step(number) for number in range(begin, count * length)]
        self.steps = iter(run.keep(track(steps, "fine-tune"), self.parts))

    def finish(self) -> None:
        """Ends the one run, so that whoever shows it sees its last step."""
        next(self.steps, None)


class Leg(Run):
    """One training of a relay, as its loop sees it."""

    def __init__(self, relay: Relay, index: int):
        self._relay, self._index = relay, index

    def restore(self, parts: Mapping[str, Part], device: torch.device) -> int:
        self._enter(parts)
        if self._index != self._relay.first:
            return 0
        return max(0, self._relay.run.restore(self._relay.parts, device) - self._index * self._relay.length)

    def keep(self, steps: Iterable[Step], parts: Mapping[str, Part]) -> Iterator[Step]:
        self._enter(parts)
        for step in steps:
            shown = next(self._relay.steps)
            yield step
            shown.loss = step.loss

    def _enter(self, parts: Mapping[str, Part]) -> None:
        """From now on these are saved, but always with the whole student."""
        whole = self._relay.parts["student"]
        self._relay.parts.clear()
        self._relay.parts.update({**parts, "student": whole})
