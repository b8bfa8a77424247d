"""Block-wise distillation: link by link the student learns to answer as the teacher does, behind what is quantized already."""

import math
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from dmquant.blocks import Block
from dmquant.distill import Training, fit
from dmquant.methods.dilatequant.chain import Link, find_links, trace
from dmquant.methods.dilatequant.relay import Leg, Relay
from dmquant.progress import Track
from dmquant.runs import Run
from dmquant.samples import Samples


def reconstruct(
    student: nn.Module, teacher: nn.Module, samples: Samples, weight: Tensor, training: Training, *, cache_bytes: int,
    seed: int, run: Run, track: Track,
) -> None:  # fmt: skip
    """Trains the links of the student in place, one after the other, max_steps each, and freezes everything else.

    DilateQuant, eq. 15. `weight` (N,) says how much each sample counts.
    """
    links = find_links(student, samples)
    relay = Relay(run, student, count=len(links), length=training.max_steps, track=track)
    for index in range(relay.first, len(links)):
        link = Link(student, links[index], samples)
        memory = Memory(student, teacher, links[index], link, samples, weight, cache_bytes=cache_bytes, batch=training.batch)
        fit(link, Reconstruction(memory, training.max_steps), training, seed=seed, run=Leg(relay, index))
    relay.finish()
    student.requires_grad_(False)
    for name in (name for link in links for name in link.modules):
        student.get_submodule(name).requires_grad_(True)


class Memory:
    """What a link reads behind the quantized part of the student, and what the teacher's answers to what it reads itself.

    Samples that do not fit into `cache_bytes` at once come in rounds.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, block: Block, link: Link, samples: Samples, weight: Tensor, *,
        cache_bytes: int, batch: int,
    ):  # fmt: skip
        self._student, self._teacher, self._block, self._link = student, teacher, block, link
        self._samples, self._weight, self._batch = samples, weight, batch
        self.clock = getattr(student, "clock", None)
        rows, answers = self._call(samples[:1])
        sample_bytes = sum(tensor.nbytes for tensor in (*rows, *answers))
        # a batch at least, whatever the budget
        self.num_rounds = math.ceil(len(samples) / max(batch, cache_bytes // max(1, sample_bytes)))
        self._round: int | None = None

    def enter(self, number: int) -> None:
        """Makes this round's inputs and answers those that `draw` reads."""
        if number == self._round:
            return
        self._round, self.rows, self.answers = number, [], []  # the old ones go first
        turn = slice(number, None, self.num_rounds)
        samples, self.timestep, self.weight = self._samples[turn], self._samples.timestep[turn], self._weight[turn]
        start = 0
        for part in samples.split(self._batch):
            rows, answers = self._call(part)
            if not start:
                self.rows, self.answers = ([_room(t, len(samples)) for t in tensors] for tensors in (rows, answers))
            for room, tensor in zip((*self.rows, *self.answers), (*rows, *answers)):
                room[start : start + len(part)] = tensor
            start += len(part)

    def _call(self, part: Samples) -> tuple[list[Tensor], list[Tensor]]:
        part = part.on(next(self._student.parameters()).device)
        rows = self._link.rows_of(trace(self._student, self._block, part))
        return rows, self._link.answers_of(trace(self._teacher, self._block, part))


class Reconstruction:
    """Mean squared distance of a link's answers to the teacher's; the round is a function of the step."""

    def __init__(self, memory: Memory, max_steps: int):
        self._memory, self._max_steps = memory, max_steps

    def loss(
        self, student: nn.Module, batch: int, *, step: int, generator: torch.Generator, device: torch.device
    ) -> Tensor:
        memory = self._memory
        memory.enter(step * memory.num_rounds // self._max_steps)
        index = torch.randint(len(memory.weight), (batch,), generator=generator)
        timestep = memory.timestep[index].to(device)
        with nullcontext() if memory.clock is None else memory.clock.at(timestep, batch):
            answers = student(*(rows[index].to(device) for rows in memory.rows))
        targets = (answers[index].to(device) for answers in memory.answers)
        error = sum((ours.float() - theirs.float()).square().flatten(1).mean(1) for ours, theirs in zip(answers, targets))
        return (memory.weight[index].to(device) * error).mean()


def _room(tensor: Tensor, count: int) -> Tensor:
    return torch.empty(count, *tensor.shape[1:], dtype=tensor.dtype)
