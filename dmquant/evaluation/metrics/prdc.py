"""Precision, recall, density and coverage: how much two sets of features lie inside each other's neighbourhoods.

The neighbourhood of a feature reaches to its k-th nearest neighbour in its own set, k = 3. Precision and recall are those of
Kynkaanniemi et al. (2019), density and coverage those of Naeem et al. (2020), who use k = 5. The numbers depend on how many
images stand on each side: compare them at equal counts only. In features other than Inception's the extractor is named.
"""

import torch
from torch import Tensor

from dmquant.errors import InputError
from dmquant.evaluation.metrics.base import Batch, Metric, given
from dmquant.evaluation.metrics.reference_stats import Reference

NEIGHBOURS = 3
ROWS = 1000  # of a distance matrix held at once


class Prdc(Metric):
    """Keeps the features of all images; distances are taken in float64, a slab of rows at a time."""

    needs_features = True
    reference_part = "features"
    least = NEIGHBOURS + 1

    def __init__(self, extractor_name: str, reference: Reference):
        self._suffix = "" if extractor_name == "inception" else f"-{extractor_name}"
        self._real = given(reference.features).double()
        self._fake: list[Tensor] = []

    def update(self, batch: Batch) -> None:
        self._fake.append(given(batch.features).float())  # float32 is what the network computed

    def compute(self) -> dict[str, float]:
        fake = torch.cat(self._fake).double()
        for features, side in ((self._real, "the reference"), (fake, "the model")):
            if len(features) < self.least:
                raise InputError(f"prdc needs at least {self.least} images of {side}, got {len(features)}")
        return {f"{name}{self._suffix}": value for name, value in measure_prdc(self._real, fake).items()}


def measure_prdc(real: Tensor, fake: Tensor, *, neighbours: int = NEIGHBOURS) -> dict[str, float]:
    """The four numbers for float64 features (N, D) and (M, D)."""
    real_reach, fake_reach = (find_reach(features, neighbours) for features in (real, fake))
    holders = torch.zeros(len(fake), dtype=torch.long)  # real neighbourhoods that each fake lies in
    is_recalled, is_covered = [], []
    for rows, reach in zip(real.split(ROWS), real_reach.split(ROWS), strict=True):
        distance = measure_distances(rows, fake)  # (rows, M)
        inside = distance <= reach.unsqueeze(1)
        holders += inside.sum(0)
        is_covered.append(inside.any(1))
        is_recalled.append((distance <= fake_reach).any(1))
    return {
        "precision": (holders > 0).double().mean().item(),
        "recall": torch.cat(is_recalled).double().mean().item(),
        "density": holders.double().mean().item() / neighbours,
        "coverage": torch.cat(is_covered).double().mean().item(),
    }


def find_reach(features: Tensor, neighbours: int) -> Tensor:
    """Distance of each feature to its k-th nearest neighbour in the set, itself not counted, (N,)."""
    slabs = (measure_distances(rows, features) for rows in features.split(ROWS))
    return torch.cat([slab.kthvalue(neighbours + 1, dim=1).values for slab in slabs])


def measure_distances(rows: Tensor, others: Tensor) -> Tensor:
    """Euclidean distances, (R, N)."""
    squares = rows.square().sum(1, keepdim=True) + others.square().sum(1) - 2 * rows @ others.T
    return squares.clamp(min=0).sqrt()
