"""Inception score: exp of the mean divergence of an image's class probabilities from their mean. Salimans et al., 2016.

It needs no reference. It is named IS with the Inception classifier only, otherwise `cs-<extractor>`, classifier score.
"""

import warnings

import torch
from torch import Tensor
from torchmetrics.image.inception import InceptionScore

from dmquant.evaluation.metrics.base import Batch, Metric, require
from dmquant.evaluation.metrics.fid import PrecomputedFeatures
from dmquant.evaluation.metrics.reference_stats import Reference

SPLIT_SIZE = 5000  # images per split: ten splits of the papers' 50,000; fewer than two splits are one


class ClassifierScore(Metric):
    """Inception score as the mean over random splits, drawn with a fixed seed. Stores the logits of all images."""

    needs_features = True
    least = 2

    def __init__(self, extractor_name: str, reference: Reference | None = None):
        self.key = "is" if extractor_name == "inception" else f"cs-{extractor_name}"
        self._logits: list[Tensor] = []

    def update(self, batch: Batch) -> None:
        self._logits.append(require(batch.logits))

    def compute(self) -> dict[str, float]:
        logits = torch.cat(self._logits)
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.filterwarnings("ignore", "Metric `InceptionScore` will save")
            warnings.filterwarnings("ignore", "std\\(\\)")  # the deviation over splits is undefined for one split
            torch.manual_seed(0)
            splits = max(1, len(logits) // SPLIT_SIZE)
            score = InceptionScore(PrecomputedFeatures(logits.shape[1]), splits=splits, sync_on_compute=False)
            score.update(logits)
            return {self.key: float(score.compute()[0])}
