"""KID: squared maximum mean discrepancy between two sets of features, kernel (x.y / D + 1)^3. Binkowski et al., 2018.

Unlike FID it is unbiased for any number of images. It is named KID with Inception features only, otherwise `kd-<extractor>`.
"""

import warnings

import torch
from torch import Tensor
from torchmetrics.image.kid import KernelInceptionDistance

from dmquant.evaluation.metrics.base import Batch, Metric, require
from dmquant.evaluation.metrics.fid import PrecomputedFeatures
from dmquant.evaluation.metrics.reference_stats import Reference

SUBSETS = 100
SUBSET_SIZE = 1000  # images per set in a subset, if there are as many


class Kid(Metric):
    """KID as the mean over random subsets, drawn with a fixed seed. Stores the features of all images."""

    needs_features = True
    reference_part = "features"
    least = 2

    def __init__(self, extractor_name: str, reference: Reference):
        self.key = "kid" if extractor_name == "inception" else f"kd-{extractor_name}"
        self._real = require(reference.features).double()
        self._fake: list[Tensor] = []

    def update(self, batch: Batch) -> None:
        self._fake.append(require(batch.features).float())  # the network computes in float32

    def compute(self) -> dict[str, float]:
        fake = torch.cat(self._fake).double()
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save")
            torch.manual_seed(0)
            size = min(SUBSET_SIZE, len(self._real), len(fake))
            network = PrecomputedFeatures(fake.shape[1])
            distance = KernelInceptionDistance(network, subsets=SUBSETS, subset_size=size, sync_on_compute=False)
            distance.update(self._real, real=True)
            distance.update(fake, real=False)
            return {self.key: float(distance.compute()[0])}
