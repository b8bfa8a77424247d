"""Which denoising step is running, as a tensor with one entry per sample.

A pre-hook on the denoiser's root reads its timestep argument, so nothing counts calls: samplers may call the denoiser
twice per step, skip steps or mix timesteps in one batch. The hook is a bound method: a deep copy of the denoiser carries
a clock of its own along.
"""

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

TIMESTEP_NAMES = ("timestep", "timesteps", "t", "timestep_ratio")  # most denoisers; HiDream; Z-Image; Stable Cascade


class Clock(nn.Module):
    """Calibrated timesteps (S,), any order, and `step`: for each sample of the running call the index of the nearest one."""

    def __init__(self, timesteps: Tensor):
        super().__init__()
        if timesteps.ndim != 1 or not len(timesteps):
            raise ValueError(f"timesteps must be a list of at least one value, got shape {tuple(timesteps.shape)}")
        self.register_buffer("timesteps", timesteps.float())
        self.step = torch.zeros(1, dtype=torch.long)
        self.has_warned = False

    def set(self, timestep: Tensor, batch: int) -> None:
        """Sets the step of every sample from timestep values: one for all, or one each."""
        values = torch.as_tensor(timestep, device=self.timesteps.device).float().reshape(-1).expand(batch)
        distance = (values.unsqueeze(1) - self.timesteps).abs()
        self.step = distance.argmin(1)
        if not torch.compiler.is_compiling() and not self.has_warned and bool(distance.amin(1).max() > self._tolerance()):
            self.has_warned = True
            warnings.warn("sampling at timesteps that were not calibrated: each uses the scales of the nearest one", stacklevel=2)

    def _tolerance(self) -> Tensor:
        """Distance that counts as the same step: half a timestep of 1000, or as much of a range that ends at 1."""
        return 0.5 * (self.timesteps.abs().max() / 1000).clamp(max=1)

    @contextmanager
    def at(self, timestep: Tensor, batch: int) -> Iterator[None]:
        """The step set for work outside a call of the denoiser; put back afterwards."""
        before = self.step
        try:
            self.set(timestep, batch)
            yield
        finally:
            self.step = before

    def read(self, denoiser: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook: finds sample and timestep among the call's arguments."""
        arguments = inspect.signature(denoiser.forward).bind_partial(*args, **kwargs).arguments
        self.set(arguments[find_timestep_name(arguments)], next(iter(arguments.values())).shape[0])


def attach(clock: Clock, denoiser: nn.Module) -> None:
    """Makes the clock follow the denoiser's calls; it becomes the submodule `clock`, so its timesteps are saved."""
    denoiser.add_module("clock", clock)
    denoiser.register_forward_pre_hook(clock.read, with_kwargs=True)


def find_timestep_name(arguments: dict) -> str:
    """What a denoiser calls its timestep, among its named arguments."""
    for name in TIMESTEP_NAMES:
        if arguments.get(name) is not None:
            return name
    raise ValueError(f"the denoiser was called without a timestep; its arguments are {', '.join(arguments)}")
