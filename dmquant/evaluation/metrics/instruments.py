"""Networks and reference of an evaluation: the feature extractor, its reference, and CLIP. Each runs once per batch."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmquant.evaluation.metrics.base import Batch, Metric
from dmquant.evaluation.metrics.clip_score import Clip, load_clip
from dmquant.evaluation.metrics.feature_extractor import EMBEDDED, Extractor, load_extractor
from dmquant.evaluation.metrics.reference_stats import Reference, open_reference
from dmquant.evaluation.metrics.registry import MetricSelection
from dmquant.progress import Track, plain


@dataclass(frozen=True)
class InstrumentOptions:
    """Options that select the extractor, its reference and CLIP."""

    extractor: str = EMBEDDED
    inception_weights: str | Path | None = None
    reference: str | Path | None = None
    clip: str | Path | None = None

    def given(self) -> list[str]:
        """Returns the names of the options that differ from their defaults."""
        default = asdict(InstrumentOptions())
        return [name for name, value in asdict(self).items() if value != default[name]]


@dataclass(frozen=True)
class Instruments:
    """The loaded extractor, reference and CLIP; each is None if no metric needs it."""

    extractor: Extractor | None = None
    reference: Reference | None = None
    clip: Clip | None = None

    def make_metrics(self, chosen: MetricSelection) -> list[Metric]:
        """Returns new instances of the selected metrics."""
        features = () if self.extractor is None else (self.extractor.name, self.reference)
        kinds: list[tuple[Callable[..., Metric], bool]] = [(kind, kind.needs_features) for kind in chosen.streamed]
        return [make(*features) if needs_features else make() for make, needs_features in kinds]

    def measure(self, images: Tensor, entries: Sequence[str | int]) -> Batch:
        """Returns a batch for the metrics: images with their features, and their cosines with the prompts (B,) `entries`."""
        prompts = [str(entry) for entry in entries]
        features = {} if self.extractor is None else self.extractor.read(images)._asdict()
        return Batch(images, **features, match=None if self.clip is None else self.clip.match(images, prompts))

    def describe(self) -> dict[str, Any]:
        """Returns the fields of the protocol that identify the extractor, the reference and CLIP."""
        facts: dict[str, Any] = {}
        if self.extractor is not None:
            facts |= {"extractor": self.extractor.name, "extractor_sha256": self.extractor.sha256}
        if self.reference is not None:
            reference = self.reference
            facts |= {"reference": reference.name, "reference_sha256": reference.sha256, "reference_images": reference.num_images}
        if self.clip is not None:
            facts |= {"clip": self.clip.name, "clip_sha256": self.clip.sha256}
        return facts


def open_instruments(
    chosen: MetricSelection, options: InstrumentOptions, *, size: int | None, device: torch.device, track: Track = plain
) -> Instruments:
    """Loads on the device what the metrics need. `size` is the side of the images in pixels, if it is known."""
    clip = load_clip(options.clip).to(device) if chosen.needs_prompts else None
    if not chosen.needs_features:
        return Instruments(clip=clip)
    network = load_extractor(options.extractor, options.inception_weights).to(device)
    if size is not None:
        network.check_size(size, size)
    parts = chosen.reference_parts
    compared = open_reference(options.reference, network, size=size, parts=parts, track=track) if parts else None
    return Instruments(network, compared, clip)
