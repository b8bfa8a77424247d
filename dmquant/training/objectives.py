"""."""

from dataclasses import dataclass
from typing import Protocol

import torch
from diffusers import SchedulerMixin
from torch import Tensor, nn

from dmquant.diffusion.trajectories import Samples


class Objective(Protocol):
    """What a student is trained for."""

    def loss(
        self, student: nn.Module, batch: int, *, step: int, generator: torch.Generator, device: torch.device
    ) -> Tensor:
        """Mean loss of a batch drawn with the generator. What changes during a run is a function of its step.

        An objective that is a module has a state, which an interrupted run finds again.
        """


@dataclass(frozen=True)
class Distillation:
    """Mean squared distance to the teacher's answers at recorded points of its own trajectories.

    Of the channels that its sampler uses: where a learned variance is dropped (DiT, PixArt), nothing is spent on following it.
    """

    samples: Samples
    weight: Tensor  # (N,) how much each sample counts

    def loss(
        self, student: nn.Module, batch: int, *, step: int, generator: torch.Generator, device: torch.device
    ) -> Tensor:
        index = torch.randint(len(self.samples), (batch,), generator=generator)
        part = self.samples[index].on(device)
        error = (part.call(student).float() - part.target.float()).square().flatten(1).mean(1)
        return (self.weight[index].to(device) * error).mean()


def weigh(samples: Samples, scheduler: SchedulerMixin, cap: float) -> Tensor:
    """Weight of each sample (N,): min(SNR, cap) / SNR of its timestep, for noise predictions. Min-SNR (Hang et al., 2023).

    An error at a nearly noise-free step hardly shows in the image, but rounding the inputs makes it the largest of all:
    unweighted it would drown the others. Velocity predictions divide by SNR + 1, image predictions by 1. Samplers without
    a noise schedule of this kind (flow matching) count every sample alike.
    """
    alphas, kind = getattr(scheduler, "alphas_cumprod", None), scheduler.config.get("prediction_type")
    if alphas is None or kind not in ("epsilon", "v_prediction", "sample"):
        return torch.ones(len(samples))
    alpha = alphas.cpu()[samples.timestep.long().clamp(0, len(alphas) - 1)]
    snr = alpha / (1 - alpha)
    return snr.clamp(max=cap) / {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[kind]
