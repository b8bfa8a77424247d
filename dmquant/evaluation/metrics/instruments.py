"""What images are looked at with: the extractor and its reference, and CLIP. Each runs once per batch, for all metrics."""

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
from dmquant.evaluation.metrics.registry import Choice
from dmquant.progress import Track, plain


@dataclass(frozen=True)
class Instruments:
    """What was asked for to look with; a default is what nobody asked for."""

    extractor: str = EMBEDDED
    inception_weights: str | Path | None = None
    reference: str | Path | None = None
    clip: str | Path | None = None

    def given(self) -> list[str]:
        """Names of those that were asked for."""
        default = asdict(Instruments())
        return [name for name, value in asdict(self).items() if value != default[name]]


@dataclass(frozen=True)
class Yardstick:
    """What features are taken with and compared to; None is what no metric asked for."""

    extractor: Extractor | None = None
    reference: Reference | None = None
    clip: Clip | None = None

    def make_meters(self, chosen: Choice) -> list[Metric]:
        """The metrics themselves, which have seen nothing yet."""
        features = () if self.extractor is None else (self.extractor.name, self.reference)
        kinds: list[tuple[Callable[..., Metric], bool]] = [(kind, kind.needs_features) for kind in chosen.kinds]
        return [make(*features) if needs_features else make() for make, needs_features in kinds]

    def look(self, images: Tensor, entries: Sequence[str | int]) -> Batch:
        """A batch of images as metrics want it, with the prompts or class labels that were asked for."""
        prompts = [str(entry) for entry in entries]
        seen = {} if self.extractor is None else self.extractor.read(images)._asdict()
        return Batch(images, **seen, match=None if self.clip is None else self.clip.match(images, prompts))

    def describe(self) -> dict[str, Any]:
        """The fields of the protocol that say which features were compared with what."""
        facts: dict[str, Any] = {}
        if self.extractor is not None:
            facts |= {"extractor": self.extractor.name, "extractor_sha256": self.extractor.sha256}
        if self.reference is not None:
            reference = self.reference
            facts |= {"reference": reference.name, "reference_sha256": reference.sha256, "reference_images": reference.num_images}
        if self.clip is not None:
            facts |= {"clip": self.clip.name, "clip_sha256": self.clip.sha256}
        return facts


def open_yardstick(
    chosen: Choice, instruments: Instruments, *, size: int | None, device: torch.device, track: Track = plain
) -> Yardstick:
    """What the metrics look with, on the device. `size` is the side of the images in pixels, where it is known."""
    clip = load_clip(instruments.clip).to(device) if chosen.needs_prompts else None
    if not chosen.needs_features:
        return Yardstick(clip=clip)
    network = load_extractor(instruments.extractor, instruments.inception_weights).to(device)
    if size is not None:
        network.refuse_size(size, size)
    parts = chosen.reference_parts
    compared = open_reference(instruments.reference, network, size=size, parts=parts, track=track) if parts else None
    return Yardstick(network, compared, clip)
