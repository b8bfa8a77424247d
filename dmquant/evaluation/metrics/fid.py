"""Frechet distance between the features of generated images and a reference. Heusel et al., 2017, eq. 6.

It is named FID only with the features of the FID Inception network, otherwise `fd-<extractor>`. sFID is the
same distance in features with positions (Nash et al., 2021): `sfid`, else `sfd-<extractor>`.
"""

import math
import warnings

from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from dmquant.errors import DmquantError, InputError
from dmquant.evaluation.metrics.base import Batch, Metric, require
from dmquant.evaluation.metrics.reference_stats import Reference
from dmquant.evaluation.metrics.running_moments import Moments

MIN_UNBIASED = 2048  # fewer images than feature dimensions leave the covariance rank deficient


class Frechet(Metric):
    """Accumulates float64 sums of features and their products; memory does not grow with the number of images."""

    needs_features = True
    reference_part = "mu"
    least = 2

    def __init__(self, extractor_name: str, reference: Reference):
        self.key = self.name(extractor_name)
        moments = self.reference_moments(reference)
        # metrics are not synchronized: the first process gets the images of all processes
        network = PrecomputedFeatures(len(moments.mu))
        self._distance = FrechetInceptionDistance(network, reset_real_features=False, sync_on_compute=False)
        set_reference(self._distance, moments, reference.num_images)

    @staticmethod
    def name(extractor_name: str) -> str:
        return distance_name(extractor_name)

    @staticmethod
    def reference_moments(reference: Reference) -> Moments:
        return Moments(reference.mu, reference.sigma)

    @staticmethod
    def select(batch: Batch) -> Tensor:
        return require(batch.features)

    def update(self, batch: Batch) -> None:
        self._distance.update(self.select(batch), real=False)

    def compute(self) -> dict[str, float]:
        count = int(self._distance.fake_features_num_samples)
        if count < self.least:
            raise InputError(f"{self.key} needs at least 2 images, got {count}; raise num_images")
        if self.key in ("fid", "sfid") and count < MIN_UNBIASED:
            warnings.warn(f"{_written(self.key)} over {count} images is biased upward; use at least {MIN_UNBIASED}", stacklevel=2)
        # some builds of LAPACK crash on a NaN
        value = float(self._distance.compute()) if self._distance.fake_features_cov_sum.isfinite().all() else math.nan
        if not math.isfinite(value):
            raise DmquantError(f"{self.key} of {count} images is {value}: the features are not finite")
        return {self.key: value}


class SpatialFrechet(Frechet):
    """Frechet distance in spatial features."""

    reference_part = "spatial"

    @staticmethod
    def name(extractor_name: str) -> str:
        return "s" + distance_name(extractor_name)

    @staticmethod
    def reference_moments(reference: Reference) -> Moments:
        assert reference.spatial is not None  # checked by reference_part
        return reference.spatial

    @staticmethod
    def select(batch: Batch) -> Tensor:
        return require(batch.spatial)


class PrecomputedFeatures(nn.Module):
    """Identity in place of torchmetrics' network, because features are computed once for all metrics."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def distance_name(extractor_name: str) -> str:
    """Returns "fid" for Inception features, "fd-<extractor>" for others."""
    return "fid" if extractor_name == "inception" else f"fd-{extractor_name}"


def set_reference(distance: FrechetInceptionDistance, moments: Moments, num_images: int | None) -> None:
    """Sets the real sums of a distance to those of the reference: sum = n mu, cov_sum = (n - 1) sigma + n mu mu^T."""
    # the distance is the same for any n >= 2, so n = 2 is taken if the file does not store n
    count = max(num_images or 2, 2)
    distance.real_features_sum = moments.mu * count
    distance.real_features_cov_sum = moments.sigma * (count - 1) + count * moments.mu.outer(moments.mu)
    distance.real_features_num_samples.fill_(count)


def _written(key: str) -> str:
    return key.replace("fid", "FID")
