"""Precision, recall, density and coverage: fractions of features that lie in neighbourhoods of the other set.

The neighbourhood of a feature is a ball that reaches its k-th nearest neighbour in its own set, k = 3. Precision and recall
follow Kynkaanniemi et al. (2019), density and coverage Naeem et al. (2020), who use k = 5. The values depend on the number of
images in each set: compare them at equal numbers only. Names have the extractor as a suffix unless it is Inception.
"""

import torch
from torch import Tensor

from dmquant.errors import InputError
from dmquant.evaluation.metrics.base import Batch, Metric, require
from dmquant.evaluation.metrics.reference_stats import Reference

NEIGHBOURS = 3
ROWS = 1000  # of the distance matrix, computed at a time


class Prdc(Metric):
    """Stores the features of all images; distances are computed in float64, for a block of rows at a time."""

    needs_features = True
    reference_part = "features"
    least = NEIGHBOURS + 1

    def __init__(self, extractor_name: str, reference: Reference):
        self._suffix = "" if extractor_name == "inception" else f"-{extractor_name}"
        self._real = require(reference.features).double()
        self._fake: list[Tensor] = []

    def update(self, batch: Batch) -> None:
        self._fake.append(require(batch.features).float())  # the network computes in float32

    def compute(self) -> dict[str, float]:
        fake = torch.cat(self._fake).double()
        for features, side in ((self._real, "the reference"), (fake, "the model")):
            if len(features) < self.least:
                raise InputError(f"prdc needs at least {self.least} images of {side}, got {len(features)}")
        return {f"{name}{self._suffix}": value for name, value in measure_prdc(self._real, fake).items()}


def measure_prdc(real: Tensor, fake: Tensor, *, neighbours: int = NEIGHBOURS) -> dict[str, float]:
    """Returns precision, recall, density and coverage of float64 features `fake` (M, D) against `real` (N, D)."""
    real_radius, fake_radius = (neighbour_distances(features, neighbours) for features in (real, fake))
    num_containing = torch.zeros(len(fake), dtype=torch.long)  # number of real neighbourhoods that contain each fake feature
    is_recalled, is_covered = [], []
    for rows, radius in zip(real.split(ROWS), real_radius.split(ROWS), strict=True):
        distance = measure_distances(rows, fake)  # (rows, M)
        inside = distance <= radius.unsqueeze(1)
        num_containing += inside.sum(0)
        is_covered.append(inside.any(1))
        is_recalled.append((distance <= fake_radius).any(1))
    return {
        "precision": (num_containing > 0).double().mean().item(),
        "recall": torch.cat(is_recalled).double().mean().item(),
        "density": num_containing.double().mean().item() / neighbours,
        "coverage": torch.cat(is_covered).double().mean().item(),
    }


def neighbour_distances(features: Tensor, neighbours: int) -> Tensor:
    """Returns the distances (N,) of features (N, D) to their k-th nearest neighbour in the same set, themselves excluded."""
    blocks = (measure_distances(rows, features) for rows in features.split(ROWS))
    return torch.cat([block.kthvalue(neighbours + 1, dim=1).values for block in blocks])


def measure_distances(rows: Tensor, others: Tensor) -> Tensor:
    """Returns the Euclidean distances (R, N) between rows (R, D) and others (N, D)."""
    squares = rows.square().sum(1, keepdim=True) + others.square().sum(1) - 2 * rows @ others.T
    return squares.clamp(min=0).sqrt()
