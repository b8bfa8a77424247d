"""Frechet distance between the features of generated images and a reference. Heusel et al., 2017, eq. 6.

It is named FID only in the features of the FID Inception network; in any other features it is `fd-<extractor>`.
"""

import math
import warnings

from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from dmquant.errors import DmquantError, InputError
from dmquant.metrics.base import Batch, Metric
from dmquant.metrics.reference import Reference

MIN_UNBIASED = 2048  # fewer images than feature dimensions leave the covariance rank deficient


class Frechet(Metric):
    """Streams float64 sums of features and their products; memory does not grow with the number of images."""

    needs_features = True

    def __init__(self, extractor_name: str, reference: Reference):
        self.key = distance_name(extractor_name)
        self._distance = FrechetInceptionDistance(Precomputed(len(reference.mu)), reset_real_features=False)
        inject(self._distance, reference)

    def update(self, batch: Batch) -> None:
        self._distance.update(batch.features, real=False)

    def compute(self) -> dict[str, float]:
        count = int(self._distance.fake_features_num_samples)
        if count < 2:
            raise InputError(f"{self.key} needs at least 2 images, got {count}; raise num_images")
        if self.key == "fid" and count < MIN_UNBIASED:
            warnings.warn(f"FID over {count} images is biased upward; use at least {MIN_UNBIASED}", stacklevel=2)
        value = float(self._distance.compute())
        if not math.isfinite(value):
            raise DmquantError(f"{self.key} of {count} images is {value}: the features are not finite")
        return {self.key: value}


class Precomputed(nn.Module):
    """Stands where torchmetrics expects its network: the features were already computed, for all metrics at once."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def distance_name(extractor_name: str) -> str:
    return "fid" if extractor_name == "inception" else f"fd-{extractor_name}"


def inject(distance: FrechetInceptionDistance, reference: Reference) -> None:
    """Makes the sums of the real side those of the reference: sum = n mu, cov_sum = (n - 1) sigma + n mu mu^T."""
    # any n >= 2 gives the same distance, so a file that does not say its n is read as n = 2
    count = max(reference.num_images or 2, 2)
    distance.real_features_sum = reference.mu * count
    distance.real_features_cov_sum = reference.sigma * (count - 1) + count * reference.mu.outer(reference.mu)
    distance.real_features_num_samples.fill_(count)
