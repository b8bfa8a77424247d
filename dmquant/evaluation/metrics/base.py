"""The seam of every metric: batches of images stream in, named numbers come out, only statistics are kept.

A metric never runs a network. The evaluation computes the features once per batch, and all metrics share them.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """What one step of the stream brings."""

    images: Tensor  # uint8 (B, 3, H, W), of the model under test
    features: Tensor | None = None  # float64 (B, D) of the extractor, on the CPU; None where no metric asked for them
    spatial: Tensor | None = None  # float64 (B, S) of one of its middle layers
    logits: Tensor | None = None  # float64 (B, K) of its classifier
    match: Tensor | None = None  # float64 (B,): 100 times the cosine of each image and its prompt, as CLIP sees them
    float_images: Tensor | None = None  # uint8 (P, 3, H, W), P <= B: the float model's images of the first P seeds


def given(part: Tensor | None) -> Tensor:
    """Returns a part of a batch that the metric has asked for, and that the evaluation therefore brings."""
    assert part is not None
    return part


class Metric(ABC):
    """Accumulates over batches; a subclass says what its batches must carry."""

    needs_features: ClassVar[bool] = False  # anything the extractor gives
    needs_float_images: ClassVar[bool] = False
    needs_prompts: ClassVar[bool] = False  # and CLIP, which compares images with them
    reference_part: ClassVar[str | None] = None  # what a reference must hold: "mu", "spatial" or "features"
    least: ClassVar[int] = 1  # images without which nothing can be said
    smallest: ClassVar[int] = 1  # side in pixels of the smallest images that it can look at

    @abstractmethod
    def update(self, batch: Batch) -> None:
        """Takes one more batch into the statistics."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """The numbers over all batches seen, finite, by the name under which a report shows them."""
