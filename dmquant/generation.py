"""Seeds -> images. Each seed has its own CPU generator: an image depends neither on the batch around it nor on the device.

A seed also decides what a conditional pipeline is asked for, so that an image depends on its seed alone there too.
"""

import hashlib
import inspect
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count as count_from
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dmquant.denoiser import find_denoiser
from dmquant.errors import DmquantError, InputError, OutOfMemory
from dmquant.progress import Track, plain

SAMPLERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "deis": "DEISMultistepScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}
NOISE_SCHEDULE = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr",
    "prediction_type",
)  # fmt: skip
CAPTION_SIZE = 12  # pixels
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

    def choose(self, seeds: Sequence[int]) -> list[str] | list[int]:
        """The entry of each seed; none where there are none."""
        return [self.entries[seed % len(self.entries)] for seed in seeds] if self.entries else []


def generate(
    pipeline: DiffusionPipeline, seeds: Sequence[int], *, steps: int = 20, batch: int = 50,
    conditioning: Conditioning = Conditioning(), track: Track = plain,
) -> Iterator[Tensor]:
    """Images of the seeds in order, uint8 (b, 3, H, W) on the CPU, one batch at a time.

    A class-conditional pipeline without labels draws all its classes in turn; a text pipeline wants prompts. Raises InputError.
    """
    if steps < 1 or batch < 1:
        raise InputError(f"steps and batch must be at least 1, got {steps} and {batch}")
    limit = pipeline.scheduler.config.get("num_train_timesteps", steps)
    if steps > limit:
        raise InputError(f"this pipeline was trained with {limit} timesteps; steps must be at most that, got {steps}")
    if any(not 0 <= seed < 2**63 for seed in seeds):
        raise InputError("seeds must lie between 0 and 2^63 - 1")
    conditioning = complete(pipeline, conditioning)
    for start in track(range(0, len(seeds), batch), "sampling"):
        chunk = list(seeds[start:start + batch])
        yield _sample(pipeline, chunk, steps, _write_arguments(conditioning, chunk))


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


def set_sampler(pipeline: DiffusionPipeline, name: str | None = None) -> str:
    """Gives the pipeline the sampler of that name, on its own noise schedule (None: keeps its own); returns the name in use."""
    if name is not None:
        if name not in SAMPLERS:
            raise InputError(f"no sampler {name!r}; choose from {', '.join(SAMPLERS)}")
        pipeline.scheduler = convert_scheduler(pipeline.scheduler, getattr(diffusers, SAMPLERS[name]))
    used = type(pipeline.scheduler).__name__
    return next((short for short, full in SAMPLERS.items() if full == used), used)


def make_grid(images: Tensor, columns: int, *, zoom: int | None = None) -> Image.Image:
    """Images uint8 (N, 3, H, W) row by row on white; `zoom` enlarges each pixel (default: tiles of at least 64 pixels)."""
    count, _, height, width = images.shape
    zoom = zoom or max(1, 64 // width)
    gap = 2
    tile_width, tile_height = width * zoom + gap, height * zoom + gap
    rows = -(-count // columns)
    grid = Image.new("RGB", (columns * tile_width + gap, rows * tile_height + gap), "white")
    for index, image in enumerate(images):
        tile = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
        tile = tile.resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
        row, column = divmod(index, columns)
        grid.paste(tile, (gap + column * tile_width, gap + row * tile_height))
    return grid


def beside(rows: Mapping[str, Tensor]) -> Image.Image:
    """One captioned row of images uint8 (N, 3, H, W) per model, for the same seeds from left to right."""
    font = ImageFont.load_default(CAPTION_SIZE)
    strips = {caption: make_grid(images, len(images)) for caption, images in rows.items()}
    band = CAPTION_SIZE + 6
    width = max(max(strip.width, int(font.getlength(caption)) + 8) for caption, strip in strips.items())
    sheet = Image.new("RGB", (width, sum(strip.height + band for strip in strips.values())), "white")
    top = 0
    for caption, strip in strips.items():
        ImageDraw.Draw(sheet).text((4, top + 3), caption, fill="black", font=font)
        sheet.paste(strip, (0, top + band))
        top += band + strip.height
    return sheet


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
    name, config = type(pipeline).__name__, find_denoiser(pipeline)[1].config
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


@torch.no_grad()
def _sample(pipeline: DiffusionPipeline, seeds: list[int], steps: int, arguments: dict[str, Any]) -> Tensor:
    """One batch of images, uint8 (B, 3, H, W)."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    draw = _run_scheduler if _is_plain(pipeline) else _call_pipeline
    try:
        images = draw(pipeline, generators, steps, arguments)  # (B, 3, H, W), in [0, 1] where all went well
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(f"a batch of {len(seeds)} images does not fit into memory; use a smaller batch") from error
    broken = [seed for seed, image in zip(seeds, images) if not image.isfinite().all()]
    if broken:
        raise DmquantError(
            f"{len(broken)} of {len(seeds)} samples are not finite (first: seed {broken[0]}): the denoiser has diverged"
        )
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def _run_scheduler(
    pipeline: DiffusionPipeline, generators: list[torch.Generator], steps: int, arguments: dict[str, Any]
) -> Tensor:
    """Sampling with any scheduler: DDIMPipeline's own loop scales neither noise nor input and knows DDIM's step only."""
    unet, scheduler = pipeline.unet, pipeline.scheduler
    size = unet.config.sample_size
    shape = (unet.config.in_channels, *((size, size) if isinstance(size, int) else size))
    try:
        scheduler.set_timesteps(steps, device=unet.device)
    except ValueError as error:  # PNDM starts with four Runge-Kutta steps
        raise InputError(f"{type(scheduler).__name__} cannot sample in {steps} steps: {error}") from error
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(unet.device)
    x = noise * scheduler.init_noise_sigma  # (B, C, H, W)
    random = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    conditions = {name: torch.tensor(values, device=unet.device) for name, values in arguments.items()}
    for timestep in scheduler.timesteps:
        predicted = unet(scheduler.scale_model_input(x, timestep).to(unet.dtype), timestep, **conditions).sample
        x = scheduler.step(predicted.float(), timestep, x, **random).prev_sample
    return x / 2 + 0.5


def _call_pipeline(
    pipeline: DiffusionPipeline, generators: list[torch.Generator], steps: int, arguments: dict[str, Any]
) -> Tensor:
    """The images of the pipeline's own call."""
    if "batch_size" in _accepts(pipeline):
        arguments = arguments | {"batch_size": len(generators)}
    # some pipelines (DiT) pass no generator to a random scheduler: those draws repeat from run to run, but follow the batch
    with _silence(pipeline), torch.random.fork_rng():
        torch.manual_seed(generators[0].initial_seed())
        images = pipeline(generator=generators, num_inference_steps=steps, output_type="pt", **arguments).images
    # older pipelines answer with arrays (B, H, W, 3) whatever was asked
    return torch.from_numpy(images).permute(0, 3, 1, 2) if isinstance(images, np.ndarray) else images.float()


@contextmanager
def _silence(pipeline: DiffusionPipeline) -> Iterator[None]:
    """No progress bar of the pipeline's own while it runs."""
    before = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**before)


def convert_scheduler(scheduler: SchedulerMixin, target: type[SchedulerMixin]) -> SchedulerMixin:
    """The target scheduler with the settings of this one, where the two speak of the same noise schedule."""
    if type(scheduler) is not target and target not in scheduler.compatibles:
        names = f"{type(scheduler).__name__} and {target.__name__}"
        raise InputError(f"{names} do not share a noise schedule; keep the pipeline's own sampler")
    # from_config alone lets the target's own defaults stand wherever this one was left at its defaults, and they differ
    schedule = {key: scheduler.config[key] for key in NOISE_SCHEDULE if key in scheduler.config}
    return target.from_config(scheduler.config, **schedule)
