"""Block-wise distillation: link by link the student learns to answer as the teacher does, behind what is quantized already."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from dmquant.diffusion.blocks import Block, find_blocks
from dmquant.diffusion.trajectories import Samples
from dmquant.methods.dilatequant.activation_cache import Entry, Shelf
from dmquant.methods.dilatequant.block_runner import Link, find_links, trace
from dmquant.methods.dilatequant.disk_tensor import Stack
from dmquant.methods.dilatequant.staged_run import Leg, Relay
from dmquant.progress import Track
from dmquant.training.resume import Run
from dmquant.training.trainer import Training, fit


def reconstruct(
    student: nn.Module, teacher: nn.Module, samples: Samples, weight: Tensor, training: Training, *, cache_bytes: int,
    seed: int, run: Run, track: Track,
) -> None:  # fmt: skip
    """Trains the links of the student in place, one after the other, max_steps each, and freezes everything else.

    DilateQuant, eq. 15. `weight` (N,) says how much each sample counts. Half of the cache is for the link under way, half for
    what finished blocks answered. In a run that is continued they are found again; those that are not answer once more.
    """
    links, blocks = find_links(student, samples), find_blocks(student)
    relay = Relay(run, student, count=len(links), length=training.max_steps, track=track)
    with run.storeroom() as folder:
        shelf = Shelf(folder, cache_bytes // 2)
        for index, block in enumerate(links):
            is_finished, is_shelved = index < relay.first, block in blocks  # other layers may run more than once in a call
            if is_finished and not is_shelved:
                continue
            link = Link(student, block, samples)
            if is_finished and shelf.recall(block, link):
                continue
            shelf.forget(block)
            room = cache_bytes // 2
            with Memory(
                student, teacher, block, link, samples, weight, shelf=shelf, cache_bytes=room, batch=training.batch
            ) as memory:
                if not is_finished:
                    fit(link, Reconstruction(memory, training.max_steps), training, seed=seed, run=Leg(relay, index))
                if is_shelved and memory.num_rounds == 1:
                    memory.put_away()
        relay.finish()
    student.requires_grad_(False)
    for name in (name for link in links for name in link.modules):
        student.get_submodule(name).requires_grad_(True)


class Memory:
    """What a link reads behind the quantized part of the student, and what the teacher's answers to what it reads itself.

    Both lie in the shelf's folder until the link is done. Samples that do not fit into `cache_bytes` at once come in rounds.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, block: Block, link: Link, samples: Samples, weight: Tensor, *,
        shelf: Shelf, cache_bytes: int, batch: int,
    ):  # fmt: skip
        self._student, self._teacher, self._block, self._link = student, teacher, block, link
        self._samples, self._weight, self._shelf, self._batch = samples, weight, shelf, batch
        self._clock = getattr(student, "clock", None)
        rows, answers = self._call(torch.tensor([0]))
        sample_bytes = sum(tensor.nbytes for tensor in (*rows, *answers))
        # a batch at least, whatever the budget
        self.num_rounds = math.ceil(len(samples) / max(batch, cache_bytes // max(1, sample_bytes)))
        self._round: int | None = None
        self.rows: list[Stack] = []
        self.answers: list[Stack] = []

    def __enter__(self) -> "Memory":
        return self

    def __exit__(self, *error: object) -> None:
        self._clear()

    def enter(self, number: int) -> None:
        """Makes this round's inputs and answers those that are there."""
        if number == self._round:
            return
        self._clear()
        self._round, turn = number, torch.arange(number, len(self._samples), self.num_rounds)
        self.timestep, self.weight = self._samples.timestep[turn], self._weight[turn]
        for place in range(0, len(turn), self._batch):
            rows, answers = self._call(turn[place : place + self._batch])
            if not place:
                self.rows, self.answers = self._stack("rows", rows), self._stack("theirs", answers)
            _write(rows, self.rows, place)
            _write(answers, self.answers, place)

    @torch.no_grad()
    def put_away(self) -> None:
        """Shelves the answers of the link, as it is now, and the teacher's; if there is room."""
        self.enter(0)
        if not self._shelf.has_room(self.answers):
            return
        ours = self._stack("ours", self.answers)
        for place in range(0, len(self.timestep), self._batch):
            index = torch.arange(place, min(place + self._batch, len(self.timestep)))
            _write(self.answer(self._link, index), ours, place)
        self._shelf.add(Entry(self._block, self._link, ours, self.answers))
        self.answers = []  # the shelf's from now on

    def answer(self, link: nn.Module, index: Tensor) -> Sequence[Tensor]:
        """What a link answers to the rows of this index, its clock at their timesteps."""
        device = next(self._student.parameters()).device
        with self._at(index):
            return link(*(rows[index].to(device) for rows in self.rows))

    def _clear(self) -> None:
        for stack in (*self.rows, *self.answers):
            stack.remove()
        self.rows, self.answers = [], []

    def _stack(self, kind: str, like: Sequence[Tensor | Stack]) -> list[Stack]:
        """Room for what is of the form of these, for each sample of the round."""
        name, count = f"{self._block.name}-{kind}", len(self.timestep)
        return [
            Stack(self._shelf.folder / f"{name}-{number}", (count, *one.shape[1:]), one.dtype) for number, one in enumerate(like)
        ]

    def _at(self, index: Tensor) -> AbstractContextManager[None]:
        return nullcontext() if self._clock is None else self._clock.at(self.timestep[index], len(index))

    def _call(self, index: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        part = self._samples[index].on(next(self._student.parameters()).device)
        with self._shelf.standing_in(self._student, index, is_teacher=False):
            rows = self._link.rows_of(trace(self._student, self._block, part, with_answers=False))
        with self._shelf.standing_in(self._teacher, index, is_teacher=True):
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
        targets = (answers[index].to(device) for answers in memory.answers)
        pairs = zip(memory.answer(student, index), targets, strict=True)
        error = sum((ours.float() - theirs.float()).square().flatten(1).mean(1) for ours, theirs in pairs)
        return (memory.weight[index].to(device) * error).mean()


def _write(parts: Sequence[Tensor], stacks: Sequence[Stack], place: int) -> None:
    for part, stack in zip(parts, stacks, strict=True):
        stack.write(place, part)
