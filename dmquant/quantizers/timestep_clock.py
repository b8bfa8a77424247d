"""`Clock`: the denoising step of the running call, as a tensor with one entry per sample.

A forward pre-hook on the denoiser reads its timestep argument. Nothing counts calls: samplers may call the denoiser twice per
step, skip steps or mix timesteps in one batch.

State: the clock is the denoiser's submodule `clock`, and each `Timed` module refers to it. A layer deep inside a model of
diffusers gets no timestep as an argument, so it has to read it elsewhere. The hook is a bound method and the clock a submodule,
so a deep copy of the denoiser has a clock of its own. `attach_clock` adds clock and hook, `detach_clock` removes both, and
`reconnect_clock` points modules that were made elsewhere to the clock of their denoiser.
"""

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dmquant.quantizers.base import Float32Buffers

TIMESTEP_NAMES = ("timestep", "timesteps", "t", "timestep_ratio")  # most denoisers; HiDream; Z-Image; Stable Cascade
Place = tuple[int, int, float]  # entries before and after, share of the latter
NEAREST, LINEAR = LOOKUPS = ("nearest", "linear")  # how a timestep that was not calibrated reads a table over steps


class Clock(Float32Buffers):
    """Calibrated timesteps (S,) in any order, and `step` (B,): the index of the nearest one for each sample of the running call.

    Between two calibrated timesteps a table is read at the nearest step, or with lookup "linear" interpolated.
    """

    timesteps: Tensor  # float32 in every model: bfloat16 cannot represent 999

    def __init__(self, timesteps: Tensor, lookup: str = NEAREST):
        super().__init__()
        if timesteps.ndim != 1 or not len(timesteps):
            raise ValueError(f"timesteps must be a list of at least one value, got shape {tuple(timesteps.shape)}")
        if lookup not in LOOKUPS:
            raise ValueError(f"lookup must be one of {', '.join(LOOKUPS)}, got {lookup!r}")
        self.register_buffer("timesteps", timesteps.float())
        self.lookup = lookup
        self.step = torch.zeros(1, dtype=torch.long)
        self.neighbours: tuple[Tensor, Tensor, Tensor] | None = None  # steps before and after, share of the latter; (B,) each
        self.has_warned = False
        self._shared: tuple[Tensor | None, Place | None] = None, None  # `step`, and the place that all its samples share

    def set(self, timestep: Tensor, batch: int) -> None:
        """Sets the step of each sample from timestep values: one for all samples, or one per sample."""
        values = torch.as_tensor(timestep, device=self.timesteps.device).float().reshape(-1).expand(batch)
        distance = (values.unsqueeze(1) - self.timesteps).abs()
        self.step = distance.argmin(1)
        self.neighbours = self._find_neighbours(values) if self.lookup == LINEAR and len(self.timesteps) > 1 else None
        # training on images draws any timestep: no warning there
        is_told = self.has_warned or torch.compiler.is_compiling() or torch.is_grad_enabled()
        if not is_told and bool(distance.amin(1).max() > self._tolerance()):
            self.has_warned = True
            use = "each uses the scales of the nearest one" if self.lookup == NEAREST else "scales are interpolated"
            warnings.warn(f"sampling at timesteps that were not calibrated: {use}", stacklevel=2)

    def read_table(self, table: Tensor, count: int) -> Tensor:
        """Returns the entries (count,) of a table (S,) for the rows of a layer's input.

        An input has one row per sample, several rows per sample, or one row for all samples, which gets the first entry. Raises
        ValueError for other counts.
        """
        if self.neighbours is None:
            entries = table[self.step.to(table.device)]
        else:
            before, after, share = (part.to(table.device) for part in self.neighbours)
            entries = torch.lerp(table[before], table[after], share.to(table.dtype))
        if count == len(entries):
            return entries
        if count % len(entries) and count > 1:
            raise ValueError(f"{count} rows cannot be told apart as {len(entries)} samples")
        return entries[:1] if count == 1 else entries.repeat_interleave(count // len(entries))

    def read_shared(self, table: Tensor) -> Tensor | None:
        """Returns the entry (1,) of a table (S,) if all samples of the running call read the same one; faster than read_table.

        None if they read several, and on a GPU, where the comparison would wait for the device.
        """
        if self._shared[0] is not self.step:
            self._shared = self.step, self._find_shared()
        place = self._shared[1]
        if place is None:
            return None
        before, after, share = place
        entry = table[before : before + 1]
        return entry if before == after else torch.lerp(entry, table[after : after + 1], share)

    def _find_shared(self) -> Place | None:
        """Returns the place in a table that all samples of the running call read; None if they differ, and on a GPU."""
        before, after, share = parts = self.neighbours or (self.step, self.step, torch.zeros(1))
        if self.step.device.type != "cpu" or any(bool((part != part[0]).any()) for part in parts):
            return None
        if share[0] in (0, 1):  # at a calibrated timestep
            before = after = after if share[0] else before
        return int(before[0]), int(after[0]), float(share[0])

    def _find_neighbours(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ordered, order = self.timesteps.sort()
        above = torch.searchsorted(ordered, values.contiguous()).clamp(1, len(ordered) - 1)
        low, high = ordered[above - 1], ordered[above]
        share = ((values - low) / (high - low).clamp(min=torch.finfo(low.dtype).tiny)).clamp(0, 1)
        return order[above - 1], order[above], share

    def _tolerance(self) -> Tensor:
        """Returns the distance that counts as the same step: 0.5, or 0.0005 for timesteps up to 1."""
        return 0.5 * (self.timesteps.abs().max() / 1000).clamp(max=1)

    @contextmanager
    def at(self, timestep: Tensor, batch: int) -> Iterator[None]:
        """Sets the step for work outside a call of the denoiser and restores it afterwards."""
        before = self.step, self.neighbours
        try:
            self.set(timestep, batch)
            yield
        finally:
            self.step, self.neighbours = before

    def read(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: finds the sample and the timestep among the arguments of the call and sets the step."""
        arguments = inspect.signature(denoiser.forward).bind_partial(*args, **kwargs).arguments
        self.set(arguments[find_timestep_name(arguments)], next(iter(arguments.values())).shape[0])


class Timed(nn.Module):
    """A module that reads the clock of its denoiser. The clock is no submodule of it: timesteps are saved once."""

    clock: Clock

    def follow(self, clock: Clock) -> None:
        vars(self)["clock"] = clock  # not a submodule


def attach_clock(clock: Clock, denoiser: nn.Module) -> None:
    """Makes the clock the denoiser's submodule `clock`, in place of any other, and has it follow the denoiser's calls."""
    detach_clock(denoiser)
    denoiser.add_module("clock", clock)
    denoiser.register_forward_pre_hook(clock.read, with_kwargs=True)
    reconnect_clock(denoiser)


def reconnect_clock(denoiser: nn.Module) -> None:
    """Makes every timed module inside follow the denoiser's own clock."""
    for module in denoiser.modules():
        if isinstance(module, Timed):
            module.follow(find_clock(denoiser))


def find_clock(denoiser: nn.Module) -> Clock:
    """Returns the clock that was attached to the denoiser."""
    clock = denoiser.get_submodule("clock")
    assert isinstance(clock, Clock)
    return clock


def detach_clock(denoiser: nn.Module) -> None:
    """Removes the clock of a denoiser and its hook, if it has one."""
    clock = denoiser._modules.pop("clock", None)
    for key, hook in list(denoiser._forward_pre_hooks.items()):
        if clock is not None and getattr(hook, "__self__", None) is clock:
            del denoiser._forward_pre_hooks[key], denoiser._forward_pre_hooks_with_kwargs[key]


def find_timestep_name(arguments: dict[str, Any]) -> str:
    """Returns the name of the timestep among the arguments of a denoiser. Raises ValueError if there is none."""
    for name in TIMESTEP_NAMES:
        if arguments.get(name) is not None:
            return name
    raise ValueError(f"the denoiser was called without a timestep; its arguments are {', '.join(arguments)}")
