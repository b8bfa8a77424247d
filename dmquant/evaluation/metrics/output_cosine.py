"""How near the denoiser's answers stay to the float model's, timestep by timestep, when both are asked the same.

The questions are those of the float model's own trajectories, so that a step is not blamed for the errors of the steps
before it; what those add up to is what PSNR and SSIM see.
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
def measure_agreement(
    target: Target, base: Target, seeds: Sequence[int], plan: SamplingPlan, *, track: Track = plain
) -> dict[float, float]:
    """Timestep -> cosine between the two denoisers' answers, mean over the trajectories of the seeds, latest noise first."""
    witness = Witness(target.denoiser)
    hook = base.denoiser.register_forward_hook(witness.note, with_kwargs=True)
    try:
        for _ in generate(base.pipeline, seeds, plan, track=track):
            pass  # the hook listens
    finally:
        hook.remove()
    return witness.means()


class Witness:
    """A forward hook on one denoiser that puts every question to another one too."""

    def __init__(self, other: nn.Module):
        self._other, self._is_asking = other, False
        self._cosines: dict[float, list[Tensor]] = defaultdict(list)

    def note(self, denoiser: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if self._is_asking:  # a model that is compared with itself
            return
        arguments = inspect.signature(denoiser.forward).bind_partial(*args, **kwargs).arguments
        answer, other = _tensor(output), self._ask(args, kwargs)
        cosines = measure_cosine(answer, other)
        timesteps = torch.as_tensor(arguments[find_timestep_name(arguments)]).reshape(-1).expand(len(answer))
        for timestep, cosine in zip(timesteps.tolist(), cosines, strict=True):
            self._cosines[float(timestep)].append(cosine)

    def _ask(self, args: tuple, kwargs: dict) -> Tensor:
        self._is_asking = True
        try:
            return _tensor(self._other(*args, **kwargs))
        finally:
            self._is_asking = False

    def means(self) -> dict[float, float]:
        return {timestep: torch.stack(self._cosines[timestep]).mean().item() for timestep in sorted(self._cosines, reverse=True)}


def measure_cosine(answers: Tensor, others: Tensor) -> Tensor:
    """Cosine of the angle between two answers (B, ...), float64 (B,) on the CPU."""
    left, right = (answer.flatten(1).cpu().double() for answer in (answers, others))
    return nn.functional.cosine_similarity(left, right, dim=1)


def _tensor(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output.sample
