"""Distillation on the teacher's recorded outputs, where outputs are combined by classifier-free guidance before comparison.

Under guidance the denoiser is called on the same input with and without the condition, and the sampler uses a linear
combination of both outputs. Errors that cancel in this combination do not change images, so the combination is compared.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dmquant.diffusion.trajectories import Samples
from dmquant.training import distributed


@dataclass(frozen=True)
class GuidedDistillation:
    """Squared distance between outputs of student and teacher, after guidance if the recording was guided. EfficientDM, eq. 7.

    The paper takes a sum over pixels, we take a weighted mean; Adam is invariant to the factor between them.
    """

    samples: Samples
    weight: Tensor  # (N,) weight of each sample in the loss
    calls: Tensor  # (P, k) indices of the k samples, 1 or 2, whose outputs are combined
    coefficients: tuple[float, ...]  # (k,) of the samples in the combination
    sequence: tuple[Tensor, ...] = ()  # indices of the calls at each sampling step, in order; empty: drawn at random

    def loss(self, student: nn.Module, batch: int, *, step: int, generator: torch.Generator, device: torch.device) -> Tensor:
        rows = self.calls[self.choose_calls(max(1, batch // len(self.coefficients)), step, generator)]
        part = self.samples[rows.flatten()].on(device)
        error = (part.call(student).float() - part.target.float()).unflatten(0, rows.shape)  # (B, k, ...)
        terms = (coefficient * error[:, index] for index, coefficient in enumerate(self.coefficients))
        guided = sum(terms, start=error.new_zeros(()))
        return (self.weight[rows[:, 0]].to(device) * guided.square().flatten(1).mean(1)).mean()

    def choose_calls(self, count: int, step: int, generator: torch.Generator) -> Tensor:
        """Returns indices (count,) of the calls of a training step. In sequence, each one takes the next sampling step."""
        if not self.sequence:
            return torch.randint(len(self.calls), (count,), generator=generator)
        round_number, sampling_step = divmod(step, len(self.sequence))
        candidates = self.sequence[sampling_step]
        first = (round_number * distributed.count() + distributed.number()) * count
        return candidates[(first + torch.arange(count)) % len(candidates)]


def make_guided_distillation(samples: Samples, weight: Tensor, *, in_sequence: bool) -> GuidedDistillation:
    """Returns the objective for a recording, with the guidance scale of the recording if all its calls come in pairs."""
    pairs = None if samples.guidance is None else find_pairs(samples)
    coefficients: tuple[float, ...]
    if pairs is None or samples.guidance is None:
        calls, coefficients = torch.arange(len(samples)).unsqueeze(1), (1.0,)
    else:
        calls, coefficients = pairs, (1 - samples.guidance, samples.guidance)
        if has_condition_first(samples):
            coefficients = coefficients[::-1]
    sequence = order_calls(samples.timestep[calls[:, 0]]) if in_sequence else ()
    return GuidedDistillation(samples, weight, calls, coefficients, sequence)


def find_pairs(samples: Samples) -> Tensor | None:
    """Returns indices (P, 2) of samples with the same input and timestep, in recorded order; None unless all form pairs."""
    groups: dict[tuple[float, bytes], list[int]] = {}
    for row, (x, timestep) in enumerate(zip(samples.x, samples.timestep.tolist())):
        content = x.contiguous().view(-1).view(torch.uint8).numpy()
        groups.setdefault((timestep, hashlib.blake2b(content, digest_size=16).digest()), []).append(row)
    is_paired = all(len(rows) == 2 for rows in groups.values())
    return torch.tensor(list(groups.values())) if is_paired else None


def has_condition_first(samples: Samples) -> bool:
    """Returns whether the conditional sample is first in each pair: so in pipelines guided by class labels, not by text."""
    return "class_labels" in samples.conditioning and "encoder_hidden_states" not in samples.conditioning


def order_calls(timestep: Tensor) -> tuple[Tensor, ...]:
    """Returns indices of the calls at each timestep; timesteps are in the order of their first call."""
    order = dict.fromkeys(timestep.tolist())
    return tuple((timestep == value).nonzero().flatten() for value in order)
