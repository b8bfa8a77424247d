"""Cosine between the outputs of the denoiser and of the float model, by timestep.

Both get the inputs of the float model's own trajectories, so that a timestep is not affected by the errors of the timesteps
before it. The accumulated error is measured by PSNR and SSIM.
"""

import inspect
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dmquant.diffusion.pipeline import Target
from dmquant.diffusion.sampling import SamplingPlan, generate
from dmquant.progress import Track, plain
from dmquant.quantizers.timestep_clock import find_timestep_name

NAME = "cosine"


@torch.no_grad()
def measure_output_cosine(
    target: Target, base: Target, seeds: Sequence[int], plan: SamplingPlan, *, track: Track = plain
) -> dict[float, float]:
    """Returns, by timestep, the mean cosine between both denoisers' outputs over the seeds; highest timestep first."""
    comparison = OutputComparison(target.denoiser)
    hook = base.denoiser.register_forward_hook(comparison.compare, with_kwargs=True)
    try:
        for _ in generate(base.pipeline, seeds, plan, track=track):
            pass  # the hook compares the outputs
    finally:
        hook.remove()
    return comparison.means()


class OutputComparison:
    """A forward hook on one denoiser that calls another one with the same inputs, and records the cosines."""

    def __init__(self, other: nn.Module):
        self._other, self._is_calling = other, False
        self._cosines: dict[float, list[Tensor]] = defaultdict(list)

    def compare(self, denoiser: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if self._is_calling:  # a call by this hook: a model is compared with itself
            return
        arguments = inspect.signature(denoiser.forward).bind_partial(*args, **kwargs).arguments
        output, other = _tensor(output), self._call_other(args, kwargs)
        cosines = cosine_of(output, other)
        timesteps = torch.as_tensor(arguments[find_timestep_name(arguments)]).reshape(-1).expand(len(output))
        for timestep, cosine in zip(timesteps.tolist(), cosines, strict=True):
            self._cosines[float(timestep)].append(cosine)

    def _call_other(self, args: tuple, kwargs: dict) -> Tensor:
        self._is_calling = True
        try:
            return _tensor(self._other(*args, **kwargs))
        finally:
            self._is_calling = False

    def means(self) -> dict[float, float]:
        """Returns the mean cosine by timestep, highest timestep first."""
        return {timestep: torch.stack(self._cosines[timestep]).mean().item() for timestep in sorted(self._cosines, reverse=True)}


def cosine_of(outputs: Tensor, others: Tensor) -> Tensor:
    """Returns the cosines between outputs (B, ...) of two denoisers, float64 (B,) on the CPU."""
    left, right = (output.flatten(1).cpu().double() for output in (outputs, others))
    return nn.functional.cosine_similarity(left, right, dim=1)


def _tensor(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output.sample
