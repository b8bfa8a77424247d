"""Registry of the metrics by name, and checks of a selection of them."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from dmquant.errors import InputError
from dmquant.evaluation.metrics import layer_sqnr, output_cosine
from dmquant.evaluation.metrics.base import Metric
from dmquant.evaluation.metrics.clip_score import ClipScore
from dmquant.evaluation.metrics.fid import Frechet, SpatialFrechet
from dmquant.evaluation.metrics.inception_score import ClassifierScore
from dmquant.evaluation.metrics.kid import Kid
from dmquant.evaluation.metrics.prdc import Prdc
from dmquant.evaluation.metrics.psnr_ssim import Psnr, Ssim

STREAMED: dict[str, type[Metric]] = {
    "fid": Frechet, "sfid": SpatialFrechet, "kid": Kid, "is": ClassifierScore, "prdc": Prdc, "psnr": Psnr, "ssim": Ssim,
    "clip_score": ClipScore,
}  # fmt: skip
NAMES = (*STREAMED, output_cosine.NAME, layer_sqnr.NAME)
DEFAULT, DEFAULT_PAIRED = ("fid",), ("psnr",)


@dataclass(frozen=True)
class MetricSelection:
    """Selected metrics, without duplicates, and what they need."""

    names: tuple[str, ...]

    @property
    def streamed(self) -> list[type[Metric]]:
        """Classes of the selected metrics that accumulate over generated images."""
        return [STREAMED[name] for name in self.names if name in STREAMED]

    @property
    def needs_output_cosine(self) -> bool:
        return output_cosine.NAME in self.names

    @property
    def needs_layers(self) -> bool:
        return layer_sqnr.NAME in self.names

    @property
    def needs_features(self) -> bool:
        return any(kind.needs_features for kind in self.streamed)

    @property
    def needs_float_images(self) -> bool:
        return any(kind.needs_float_images for kind in self.streamed)

    @property
    def needs_float_model(self) -> bool:
        return self.needs_output_cosine or self.needs_layers or self.needs_float_images

    @property
    def needs_prompts(self) -> bool:
        return any(kind.needs_prompts for kind in self.streamed)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises InputError if a metric needs prompts and there are none."""
        if self.needs_prompts and not prompts:
            raise InputError("clip_score compares images with their prompts, and this pipeline takes none; leave it out")

    @property
    def reference_parts(self) -> list[str]:
        """Returns the parts that the reference must have; an empty list if no reference is needed."""
        return sorted({kind.reference_part for kind in self.streamed if kind.reference_part is not None})


def check_names(names: Sequence[str]) -> None:
    """Raises InputError for an unknown name, with the most similar one and all names as hints."""
    for name in names:
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise InputError(f"there is no metric {name!r}{hint}; known: {', '.join(NAMES)}")


def select_metrics(names: Sequence[str], num_images: int) -> MetricSelection:
    """Returns the metrics with these names. Raises InputError for unknown or no names, and for too few images."""
    check_names(names)
    if not names:
        raise InputError(f"no metric selected; known: {', '.join(NAMES)}")
    chosen = MetricSelection(tuple(dict.fromkeys(names)))
    least = max((kind.least for kind in chosen.streamed), default=1)
    if num_images < least:
        raise InputError(f"num_images must be at least {least} for {', '.join(chosen.names)}, got {num_images}")
    return chosen


def check_image_size(chosen: MetricSelection, side: int | None) -> None:
    """Raises InputError if images with this side in pixels are too small for a metric; None means unknown."""
    for name in chosen.names:
        if side is not None and name in STREAMED and side < STREAMED[name].smallest:
            least = STREAMED[name].smallest
            raise InputError(f"{name} needs images of at least {least}x{least} pixels, got {side}x{side}; leave it out")


def check_all_used(chosen: MetricSelection, given: Sequence[str]) -> None:
    """Raises InputError for given settings, by name, that no selected metric uses."""
    used = {
        "extractor": chosen.needs_features, "inception_weights": chosen.needs_features,
        "reference": bool(chosen.reference_parts), "clip": chosen.needs_prompts, "float_pipeline": chosen.needs_float_model,
    }  # fmt: skip
    unused = [name for name in given if not used[name]]
    if unused:
        wanted = ", ".join(chosen.names)
        raise InputError(f"{', '.join(unused)}: without effect on {wanted}; leave it out, or add a metric that uses it")
