"""The metrics by name: which there are, what each needs, and what of the settings none of them would look at."""

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
class Choice:
    """Metrics asked for, each once."""

    names: tuple[str, ...]

    @property
    def kinds(self) -> list[type[Metric]]:
        return [STREAMED[name] for name in self.names if name in STREAMED]

    @property
    def needs_agreement(self) -> bool:
        return output_cosine.NAME in self.names

    @property
    def needs_layers(self) -> bool:
        return layer_sqnr.NAME in self.names

    @property
    def needs_features(self) -> bool:
        return any(kind.needs_features for kind in self.kinds)

    @property
    def needs_float_images(self) -> bool:
        return any(kind.needs_float_images for kind in self.kinds)

    @property
    def needs_float_model(self) -> bool:
        return self.needs_agreement or self.needs_layers or self.needs_float_images

    @property
    def needs_prompts(self) -> bool:
        return any(kind.needs_prompts for kind in self.kinds)

    def refuse_without_prompts(self, prompts: Sequence[str]) -> None:
        """Raises InputError where a metric compares with prompts and there are none."""
        if self.needs_prompts and not prompts:
            raise InputError("clip_score compares images with their prompts, and this pipeline takes none; leave it out")

    @property
    def reference_parts(self) -> list[str]:
        """What the reference must hold; empty where none is needed."""
        return sorted({kind.reference_part for kind in self.kinds if kind.reference_part is not None})


def refuse_unknown(names: Sequence[str]) -> None:
    """Raises InputError for a name that no metric has, with the nearest one and the list of all."""
    for name in names:
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise InputError(f"there is no metric {name!r}{hint}; known: {', '.join(NAMES)}")


def choose_metrics(names: Sequence[str], num_images: int) -> Choice:
    """The metrics of those names; refuses what cannot be measured before any image is drawn."""
    refuse_unknown(names)
    if not names:
        raise InputError(f"no metric asked for; known: {', '.join(NAMES)}")
    chosen = Choice(tuple(dict.fromkeys(names)))
    least = max((kind.least for kind in chosen.kinds), default=1)
    if num_images < least:
        raise InputError(f"num_images must be at least {least} for {', '.join(chosen.names)}, got {num_images}")
    return chosen


def refuse_small(chosen: Choice, side: int | None) -> None:
    """Raises InputError where the images, of that side in pixels, are too small for a metric; None is not known yet."""
    for name in chosen.names:
        if side is not None and name in STREAMED and side < STREAMED[name].smallest:
            least = STREAMED[name].smallest
            raise InputError(f"{name} needs images of at least {least}x{least} pixels, got {side}x{side}; leave it out")


def refuse_unused(chosen: Choice, given: Sequence[str]) -> None:
    """Raises InputError for settings, by name, that no metric asked for would look at."""
    used = {
        "extractor": chosen.needs_features, "inception_weights": chosen.needs_features,
        "reference": bool(chosen.reference_parts), "clip": chosen.needs_prompts, "float_pipeline": chosen.needs_float_model,
    }  # fmt: skip
    unused = [name for name in given if not used[name]]
    if unused:
        wanted = ", ".join(chosen.names)
        raise InputError(f"{', '.join(unused)}: without effect on {wanted}; leave it out, or add a metric that looks at it")
