"""Training objectives, and the weights of recorded samples in the distillation loss."""

from dataclasses import dataclass
from typing import Protocol

import torch
from diffusers import SchedulerMixin
from torch import Tensor, nn

from dmquant.diffusion.trajectories import Samples


class Objective(Protocol):
    """A loss that a student is trained on."""

    def loss(self, student: nn.Module, batch: int, *, step: int, generator: torch.Generator, device: torch.device) -> Tensor:
        """Returns the mean loss of a random batch drawn with the generator, a scalar.

        Whatever changes during a run depends on `step` only. An objective that is a module is saved with an interrupted run.
        """


@dataclass(frozen=True)
class Distillation:
    """Weighted mean squared error to the teacher's outputs at recorded points of its own trajectories.

    Only the channels that the sampler uses count; a learned variance that the pipeline drops (DiT, PixArt) is left out.
    """

    samples: Samples
    weight: Tensor  # (N,) weight of each sample in the loss

    def loss(self, student: nn.Module, batch: int, *, step: int, generator: torch.Generator, device: torch.device) -> Tensor:
        index = torch.randint(len(self.samples), (batch,), generator=generator)
        part = self.samples[index].on(device)
        error = (part.call(student).float() - part.target.float()).square().flatten(1).mean(1)
        return (self.weight[index].to(device) * error).mean()


def min_snr_weights(samples: Samples, scheduler: SchedulerMixin, cap: float) -> Tensor:
    """Returns the weight of each sample (N,): min(SNR, cap) / SNR of its timestep, for noise predictions.

    The loss at nearly noise-free steps is the largest after rounding, although such errors hardly show in the image; without
    weights it would dominate. Velocity predictions divide by SNR + 1, image predictions by 1. Samplers without alphas_cumprod
    (flow matching) give each sample weight 1. Min-SNR (Hang et al., 2023).
    """
    alphas, kind = getattr(scheduler, "alphas_cumprod", None), scheduler.config.get("prediction_type")
    if alphas is None or kind not in ("epsilon", "v_prediction", "sample"):
        return torch.ones(len(samples))
    alpha = alphas.cpu()[samples.timestep.long().clamp(0, len(alphas) - 1)]
    snr = alpha / (1 - alpha)
    return snr.clamp(max=cap) / {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[kind]
