"""Prompts, class labels and guidance of conditional pipelines; each seed has a fixed prompt or label."""

import hashlib
import inspect
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count as count_from
from typing import Any

from diffusers import DiffusionPipeline

from dmquant.diffusion.pipeline import find_target
from dmquant.errors import InputError

KEYWORDS = {"prompts": "prompt", "class labels": "class_labels"}  # of a pipeline's call
GOLDEN = (5**0.5 - 1) / 2  # steps of this share of a range cover it evenly for any number of steps


@dataclass(frozen=True)
class Conditioning:
    """Prompts or class labels, and the guidance scale. Seed s uses entry s modulo their number; None is the pipeline's scale."""

    prompts: tuple[str, ...] = ()
    class_labels: tuple[int, ...] = ()
    guidance: float | None = None

    @property
    def kind(self) -> str | None:
        """Returns "prompts" or "class labels", or None if there are no entries."""
        return "prompts" if self.prompts else "class labels" if self.class_labels else None

    @property
    def entries(self) -> tuple[str, ...] | tuple[int, ...]:
        return self.prompts or self.class_labels

    @property
    def sha256(self) -> str:
        """Returns the SHA-256 of the entries in order, without the guidance scale."""
        return hashlib.sha256(json.dumps(self.entries).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """Returns the protocol fields of a report that describe the conditioning."""
        asked = {"condition": self.kind, "num_conditions": len(self.entries), "conditions_sha256": self.sha256}
        return {**(asked if self.entries else {}), "guidance_scale": self.guidance}

    def choose(self, seeds: Sequence[int]) -> list[str | int]:
        """Returns the entry of each seed; an empty list if there are no entries."""
        return [self.entries[seed % len(self.entries)] for seed in seeds] if self.entries else []


def complete(pipeline: DiffusionPipeline, wanted: Conditioning) -> Conditioning:
    """Returns the conditioning with defaults filled in: all classes in turn, and the pipeline's own guidance scale.

    Raises:
        InputError: the pipeline does not take what is given, or a text pipeline gets no prompts.
    """
    name, accepted = type(pipeline).__name__, _accepts(pipeline)
    if wanted.prompts and "prompt" not in accepted:
        raise InputError(f"{name} takes no prompts; leave them out")
    if wanted.class_labels and "class_labels" not in accepted:
        raise InputError(f"{name} takes no class labels; leave them out")
    if "prompt" in accepted and not wanted.prompts:
        raise InputError(f"{name} draws from text; give it prompts (--prompts FILE; in Python, Conditioning(prompts=...))")
    if wanted.guidance is not None and not ("guidance_scale" in accepted and math.isfinite(wanted.guidance)):
        reason = "is no finite number" if "guidance_scale" in accepted else f"is not for {name}, which takes none; leave it out"
        raise InputError(f"a guidance scale of {wanted.guidance} {reason}")
    if "class_labels" in accepted:
        wanted = replace(wanted, class_labels=_choose_classes(pipeline, wanted.class_labels))
    return wanted if wanted.guidance is not None else replace(wanted, guidance=accepted.get("guidance_scale"))


def reconstruct(pipeline: DiffusionPipeline, sha256: str | None, guidance: float | None) -> Conditioning:
    """Returns the conditioning that a report has the hash of: all classes in turn, or none. Raises InputError for others."""
    is_text = "prompt" in _accepts(pipeline)
    own = Conditioning() if is_text else complete(pipeline, Conditioning(guidance=guidance))
    if is_text or (own.sha256 if own.entries else None) != sha256:
        conditions = "prompts" if is_text else "class labels"
        raise InputError(f"the images were drawn by {conditions} of which a report has the hash only")
    return own


def _choose_classes(pipeline: DiffusionPipeline, labels: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the given labels after a check, or all classes once in a strided order.

    With the stride, a few consecutive seeds cover the whole range of classes, and a multiple of the number of classes uses
    each class equally often.
    """
    name, config = type(pipeline).__name__, find_target(pipeline).denoiser.config
    count = config.get("num_class_embeds") or config.get("num_embeds_ada_norm")
    if not count and not labels:
        raise InputError(f"{name} does not say how many classes it has; give class labels")
    wrong = [label for label in labels if label < 0 or (count and label >= count)]
    if wrong:
        raise InputError(f"{name} has no class {wrong[0]}" + (f"; labels are 0 to {count - 1}" if count else ""))
    if labels:
        return labels
    stride = next(number for number in count_from(round(count * GOLDEN) or 1) if math.gcd(number, count) == 1)
    return tuple(index * stride % count for index in range(count))


def _write_arguments(conditioning: Conditioning, seeds: Sequence[int]) -> dict[str, Any]:
    """Returns the keyword arguments of the pipeline's call that condition one batch."""
    chosen = {KEYWORDS[conditioning.kind]: conditioning.choose(seeds)} if conditioning.kind else {}
    return chosen if conditioning.guidance is None else chosen | {"guidance_scale": conditioning.guidance}


def _accepts(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """Returns the names of the arguments of the pipeline's call, with their default if it is a number, else None."""
    if _is_plain(pipeline):
        return {"class_labels": None} if pipeline.unet.class_embedding is not None else {}
    parameters = inspect.signature(pipeline.__call__).parameters.values()
    return {each.name: float(each.default) if isinstance(each.default, int | float) else None for each in parameters}


def _is_plain(pipeline: DiffusionPipeline) -> bool:
    """Returns whether the pipeline consists of a UNet and a scheduler only: no text encoder, no latents."""
    return set(pipeline.components) == {"unet", "scheduler"}
