"""."""

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
GOLDEN = (5**0.5 - 1) / 2  # steps by this share of a range fill it evenly, however many there are


@dataclass(frozen=True)
class Conditioning:
    """What is asked of a conditional pipeline: seed s takes entry s mod their number. None guidance is the pipeline's own."""

    prompts: tuple[str, ...] = ()
    class_labels: tuple[int, ...] = ()
    guidance: float | None = None

    @property
    def kind(self) -> str | None:
        """What the entries are; None of an unconditional pipeline."""
        return "prompts" if self.prompts else "class labels" if self.class_labels else None

    @property
    def entries(self) -> tuple[str, ...] | tuple[int, ...]:
        return self.prompts or self.class_labels

    @property
    def sha256(self) -> str:
        """Of the entries in their order; the guidance does not count."""
        return hashlib.sha256(json.dumps(self.entries).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """The fields of a protocol that say what was asked for."""
        asked = {"condition": self.kind, "num_conditions": len(self.entries), "conditions_sha256": self.sha256}
        return {**(asked if self.entries else {}), "guidance_scale": self.guidance}

    def choose(self, seeds: Sequence[int]) -> list[str | int]:
        """The entry of each seed; none where there are none."""
        return [self.entries[seed % len(self.entries)] for seed in seeds] if self.entries else []


def complete(pipeline: DiffusionPipeline, wanted: Conditioning) -> Conditioning:
    """The conditioning with what it leaves open: every class in turn, and the guidance scale that the pipeline's call has.

    Raises InputError for what the pipeline does not take, and for a text pipeline without prompts.
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


def recall(pipeline: DiffusionPipeline, sha256: str | None, guidance: float | None) -> Conditioning:
    """What images were drawn by of which a report has the hash alone: the classes in turn, or nothing. Else an InputError."""
    is_text = "prompt" in _accepts(pipeline)
    own = Conditioning() if is_text else complete(pipeline, Conditioning(guidance=guidance))
    if is_text or (own.sha256 if own.entries else None) != sha256:
        conditions = "prompts" if is_text else "class labels"
        raise InputError(f"the images were drawn by {conditions} of which a report has the hash only")
    return own


def _choose_classes(pipeline: DiffusionPipeline, labels: tuple[int, ...]) -> tuple[int, ...]:
    """The labels, each one that the pipeline has; without any, all classes once, far apart from one seed to the next.

    So few images show classes from everywhere, and as many images as classes, or a multiple, show each equally often.
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
    """Keyword arguments that condition the images of one batch."""
    chosen = {KEYWORDS[conditioning.kind]: conditioning.choose(seeds)} if conditioning.kind else {}
    return chosen if conditioning.guidance is None else chosen | {"guidance_scale": conditioning.guidance}


def _accepts(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """Names of the arguments that a call may give, with the numbers that they are where it does not."""
    if _is_plain(pipeline):
        return {"class_labels": None} if pipeline.unet.class_embedding is not None else {}
    parameters = inspect.signature(pipeline.__call__).parameters.values()
    return {each.name: float(each.default) if isinstance(each.default, int | float) else None for each in parameters}


def _is_plain(pipeline: DiffusionPipeline) -> bool:
    """Whether a UNet and a scheduler are all there is: no text, no latents."""
    return set(pipeline.components) == {"unet", "scheduler"}
