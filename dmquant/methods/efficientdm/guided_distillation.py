"""What adapters follow: the teacher's answers along its own trajectories, shuffled or in the order of sampling.

Under classifier-free guidance the denoiser is called on the same input with and without the condition, and what the sampler
uses is a mix of the two answers. Errors that cancel in the mix are none, so it is the mix that is compared.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dmquant.diffusion.trajectories import Samples
from dmquant.training import distributed


@dataclass(frozen=True)
class Following:
    """Squared distance to the teacher's recorded answers, guided where the calls were. EfficientDM, eq. 7.

    The paper's is a sum over pixels of the guided answers; ours a weighted mean, which Adam does not tell apart.
    """

    samples: Samples
    weight: Tensor  # (N,) how much each sample counts
    calls: Tensor  # (P, k) rows of the samples that make one answer: a single row, or a pair
    shares: tuple[float, ...]  # (k,) of each row in the answer
    sequence: tuple[Tensor, ...] = ()  # calls of each step of sampling, in order; empty: calls are drawn at random

    def loss(
        self, student: nn.Module, batch: int, *, step: int, generator: torch.Generator, device: torch.device
    ) -> Tensor:
        rows = self.calls[self.choose(max(1, batch // len(self.shares)), step, generator)]
        part = self.samples[rows.flatten()].on(device)
        error = (part.call(student).float() - part.target.float()).unflatten(0, rows.shape)  # (B, k, ...)
        guided = sum((share * error[:, place] for place, share in enumerate(self.shares)), start=error.new_zeros(()))
        return (self.weight[rows[:, 0]].to(device) * guided.square().flatten(1).mean(1)).mean()

    def choose(self, count: int, step: int, generator: torch.Generator) -> Tensor:
        """Which calls (count,) a step learns from. In sequence: all at one step of sampling, the next one at the next."""
        if not self.sequence:
            return torch.randint(len(self.calls), (count,), generator=generator)
        round_number, place = divmod(step, len(self.sequence))
        here = self.sequence[place]
        first = (round_number * distributed.count() + distributed.number()) * count
        return here[(first + torch.arange(count)) % len(here)]


def follow(samples: Samples, weight: Tensor, *, in_sequence: bool) -> Following:
    """The objective over a recording, guided as the recording was where it was made with and without condition."""
    pairs = None if samples.guidance is None else find_pairs(samples)
    shares: tuple[float, ...]
    if pairs is None or samples.guidance is None:
        calls, shares = torch.arange(len(samples)).unsqueeze(1), (1.0,)
    else:
        calls, shares = pairs, (1 - samples.guidance, samples.guidance)
        if has_condition_first(samples):
            shares = shares[::-1]
    return Following(samples, weight, calls, shares, order_calls(samples.timestep[calls[:, 0]]) if in_sequence else ())


def find_pairs(samples: Samples) -> Tensor | None:
    """Rows (P, 2) on the same input at the same timestep, in the order of recording; None unless all rows make pairs."""
    groups: dict[tuple[float, bytes], list[int]] = {}
    for row, (x, timestep) in enumerate(zip(samples.x, samples.timestep.tolist())):
        content = x.contiguous().view(-1).view(torch.uint8).numpy()
        groups.setdefault((timestep, hashlib.blake2b(content, digest_size=16).digest()), []).append(row)
    is_paired = all(len(rows) == 2 for rows in groups.values())
    return torch.tensor(list(groups.values())) if is_paired else None


def has_condition_first(samples: Samples) -> bool:
    """Pipelines put the unconditional half first; those that are guided by class labels alone put it second."""
    return "class_labels" in samples.conditioning and "encoder_hidden_states" not in samples.conditioning


def order_calls(timestep: Tensor) -> tuple[Tensor, ...]:
    """Indices of the calls at each timestep, timesteps in the order in which the sampler came to them first."""
    order = dict.fromkeys(timestep.tolist())
    return tuple((timestep == value).nonzero().flatten() for value in order)
