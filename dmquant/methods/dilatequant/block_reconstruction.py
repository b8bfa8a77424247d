"""Block-wise knowledge distillation: trains the student unit by unit, each on the outputs of the quantized units before."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from dmquant.diffusion.blocks import Block, find_blocks
from dmquant.diffusion.trajectories import Samples
from dmquant.methods.dilatequant.activation_cache import ActivationCache, CachedBlock
from dmquant.methods.dilatequant.block_runner import BlockRunner, find_units, trace_unit
from dmquant.methods.dilatequant.disk_tensor import DiskTensor
from dmquant.methods.dilatequant.staged_run import Stage, StagedRun
from dmquant.progress import Track
from dmquant.training.resume import Run
from dmquant.training.trainer import Training, fit


def reconstruct(
    student: nn.Module, teacher: nn.Module, samples: Samples, weight: Tensor, training: Training, *, cache_bytes: int,
    seed: int, run: Run, track: Track,
) -> None:  # fmt: skip
    """Trains the units of the student in place, one after the other, and freezes all other parameters. DilateQuant, eq. 15.

    Each unit is trained for max_steps. A resumed run reloads the cached outputs of finished blocks; those that were not cached
    are computed again.

    Args:
        weight: Weights (N,) of the samples in the loss.
        cache_bytes: Size limit on disk. Half is for the data of the current unit, half for the outputs of finished blocks.
    """
    units, blocks = find_units(student, samples), find_blocks(student)
    staged_run = StagedRun(run, student, count=len(units), length=training.max_steps, track=track)
    with run.storeroom() as folder:
        cache = ActivationCache(folder, cache_bytes // 2)
        for index, unit in enumerate(units):
            # single layers may run more than once in a call of the network, so that their outputs are not cached
            is_finished, is_cacheable = index < staged_run.first, unit in blocks
            if is_finished and not is_cacheable:
                continue
            runner = BlockRunner(student, unit, samples)
            if is_finished and cache.reload(unit, runner):
                continue
            cache.discard(unit)
            with UnitData(
                student, teacher, unit, runner, samples, weight, cache=cache, max_bytes=cache_bytes // 2, batch=training.batch
            ) as data:
                if not is_finished:
                    objective = ReconstructionObjective(data, training.max_steps)
                    fit(runner, objective, training, seed=seed, run=Stage(staged_run, index))
                if is_cacheable and data.num_rounds == 1:
                    data.cache_outputs()
        staged_run.finish()
    student.requires_grad_(False)
    for name in (name for unit in units for name in unit.modules):
        student.get_submodule(name).requires_grad_(True)


class UnitData:
    """Training data of one unit: its inputs behind the quantized part of the student, and the teacher's outputs as targets.

    The teacher's outputs are those for its own inputs. Both are stored in the cache's folder until the unit is trained. Samples
    that do not fit into `max_bytes` at once are split into rounds, but a round holds at least one batch.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, unit: Block, runner: BlockRunner, samples: Samples, weight: Tensor, *,
        cache: ActivationCache, max_bytes: int, batch: int,
    ):  # fmt: skip
        self._student, self._teacher, self._unit, self._runner = student, teacher, unit, runner
        self._samples, self._weight, self._cache, self._batch = samples, weight, cache, batch
        self._clock = getattr(student, "clock", None)
        inputs, targets = self._compute(torch.tensor([0]))
        sample_bytes = sum(tensor.nbytes for tensor in (*inputs, *targets))
        self.num_rounds = math.ceil(len(samples) / max(batch, max_bytes // max(1, sample_bytes)))
        self._round: int | None = None
        self.inputs: list[DiskTensor] = []
        self.targets: list[DiskTensor] = []

    def __enter__(self) -> "UnitData":
        return self

    def __exit__(self, *error: object) -> None:
        self._clear()

    def load_round(self, number: int) -> None:
        """Computes the inputs and targets of every num_rounds-th sample, from sample `number` on."""
        if number == self._round:
            return
        self._clear()
        self._round, members = number, torch.arange(number, len(self._samples), self.num_rounds)
        self.timestep, self.weight = self._samples.timestep[members], self._weight[members]
        for start in range(0, len(members), self._batch):
            inputs, targets = self._compute(members[start : start + self._batch])
            if not start:
                self.inputs, self.targets = self._allocate("rows", inputs), self._allocate("theirs", targets)
            _write(inputs, self.inputs, start)
            _write(targets, self.targets, start)

    @torch.no_grad()
    def cache_outputs(self) -> None:
        """Adds the outputs of the trained unit and of the teacher's to the cache, if they fit."""
        self.load_round(0)
        if not self._cache.fits(self.targets):
            return
        outputs = self._allocate("ours", self.targets)
        for start in range(0, len(self.timestep), self._batch):
            index = torch.arange(start, min(start + self._batch, len(self.timestep)))
            _write(self.run_unit(self._runner, index), outputs, start)
        self._cache.add(CachedBlock(self._unit, self._runner, outputs, self.targets))
        self.targets = []  # owned by the cache from here on

    def run_unit(self, runner: nn.Module, index: Tensor) -> Sequence[Tensor]:
        """Returns the unit's outputs for the samples `index` (K,) of the round, at their timesteps."""
        device = next(self._student.parameters()).device
        with self._at_timesteps(index):
            return runner(*(inputs[index].to(device) for inputs in self.inputs))

    def _clear(self) -> None:
        for tensor in (*self.inputs, *self.targets):
            tensor.remove()
        self.inputs, self.targets = [], []

    def _allocate(self, kind: str, like: Sequence[Tensor | DiskTensor]) -> list[DiskTensor]:
        """Creates tensors on disk with one row, shaped as in `like`, for each sample of the round."""
        name, count = f"{self._unit.name}-{kind}", len(self.timestep)
        return [
            DiskTensor(self._cache.folder / f"{name}-{number}", (count, *one.shape[1:]), one.dtype)
            for number, one in enumerate(like)
        ]

    def _at_timesteps(self, index: Tensor) -> AbstractContextManager[None]:
        return nullcontext() if self._clock is None else self._clock.at(self.timestep[index], len(index))

    def _compute(self, index: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the unit's inputs in the student and its outputs in the teacher, for the samples `index` (K,)."""
        part = self._samples[index].on(next(self._student.parameters()).device)
        with self._cache.replaying(self._student, index, is_teacher=False):
            inputs = self._runner.inputs_from(trace_unit(self._student, self._unit, part, with_outputs=False))
        with self._cache.replaying(self._teacher, index, is_teacher=True):
            return inputs, self._runner.outputs_from(trace_unit(self._teacher, self._unit, part))


class ReconstructionObjective:
    """Mean squared error between the outputs of a unit and the teacher's. The round is a function of the step."""

    def __init__(self, data: UnitData, max_steps: int):
        self._data, self._max_steps = data, max_steps

    def loss(self, student: nn.Module, batch: int, *, step: int, generator: torch.Generator, device: torch.device) -> Tensor:
        data = self._data
        data.load_round(step * data.num_rounds // self._max_steps)
        index = torch.randint(len(data.weight), (batch,), generator=generator)
        targets = (target[index].to(device) for target in data.targets)
        pairs = zip(data.run_unit(student, index), targets, strict=True)
        error = sum((ours.float() - theirs.float()).square().flatten(1).mean(1) for ours, theirs in pairs)
        return (data.weight[index].to(device) * error).mean()


def _write(parts: Sequence[Tensor], tensors: Sequence[DiskTensor], start: int) -> None:
    for part, tensor in zip(parts, tensors, strict=True):
        tensor.write(start, part)
