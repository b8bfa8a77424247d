"""Samples images from seeds. Each seed has its own CPU generator, so that its noise depends on neither batch nor device.

The seed also selects the prompt or class label of a conditional pipeline.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor

from dmquant.diffusion.conditioning import Conditioning, _accepts, _is_plain, _write_arguments, complete
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


@dataclass(frozen=True)
class SamplingPlan:
    """How images are sampled, beside their seeds. Raises InputError if steps or batch are below 1."""

    steps: int = 20
    batch: int = 50  # images per denoiser call
    conditioning: Conditioning = Conditioning()

    def __post_init__(self) -> None:
        if min(self.steps, self.batch) < 1:
            raise InputError(f"steps and batch must be at least 1, got {self.steps} and {self.batch}")


def generate(
    pipeline: DiffusionPipeline, seeds: Sequence[int], plan: SamplingPlan = SamplingPlan(), *, track: Track = plain
) -> Iterator[Tensor]:
    """Yields the images of the seeds in order, one batch at a time: uint8 (B, 3, H, W) on the CPU.

    Without class labels, a class-conditional pipeline samples all of its classes in turn.

    Raises:
        InputError: more steps than the pipeline was trained with, a seed out of range, or conditions that the pipeline does
            not take or lacks (a text pipeline needs prompts).
        DmquantError: an image is not finite.
    """
    limit = pipeline.scheduler.config.get("num_train_timesteps", plan.steps)
    if plan.steps > limit:
        raise InputError(f"this pipeline was trained with {limit} timesteps; steps must be at most that, got {plan.steps}")
    if any(not 0 <= seed < 2**63 for seed in seeds):
        raise InputError("seeds must lie between 0 and 2^63 - 1")
    conditioning = complete(pipeline, plan.conditioning)
    for start in track(range(0, len(seeds), plan.batch), "sampling"):
        chunk = list(seeds[start : start + plan.batch])
        yield _sample(pipeline, chunk, plan.steps, _write_arguments(conditioning, chunk))


def set_sampler(pipeline: DiffusionPipeline, name: str | None = None) -> str:
    """Sets the sampler of that name on the pipeline's noise schedule; None keeps the sampler. Returns the name in use."""
    if name is not None:
        if name not in SAMPLERS:
            raise InputError(f"no sampler {name!r}; choose from {', '.join(SAMPLERS)}")
        pipeline.scheduler = convert_scheduler(pipeline.scheduler, getattr(diffusers, SAMPLERS[name]))
    used = type(pipeline.scheduler).__name__
    return next((short for short, full in SAMPLERS.items() if full == used), used)


@torch.no_grad()
def _sample(pipeline: DiffusionPipeline, seeds: list[int], steps: int, arguments: dict[str, Any]) -> Tensor:
    """Returns one batch of images, uint8 (B, 3, H, W) on the CPU."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    draw = _run_scheduler if _is_plain(pipeline) else _call_pipeline
    try:
        images = draw(pipeline, generators, steps, arguments)  # (B, 3, H, W), about [0, 1]
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
    """Samples with any scheduler. DDIMPipeline's own loop scales neither noise nor input, and supports DDIM's step only."""
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
    """Returns the images of the pipeline's own call."""
    if "batch_size" in _accepts(pipeline):
        arguments = arguments | {"batch_size": len(generators)}
    # some pipelines (DiT) pass no generator to a random scheduler: its noise then repeats per run, but depends on the batch
    with _silence(pipeline), torch.random.fork_rng():
        torch.manual_seed(generators[0].initial_seed())
        images = pipeline(generator=generators, num_inference_steps=steps, output_type="pt", **arguments).images
    # older pipelines return arrays (B, H, W, 3) for every output_type
    return torch.from_numpy(images).permute(0, 3, 1, 2) if isinstance(images, np.ndarray) else images.float()


@contextmanager
def _silence(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Disables the pipeline's progress bar inside the context."""
    before = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**before)


def convert_scheduler(scheduler: SchedulerMixin, target: type[SchedulerMixin]) -> SchedulerMixin:
    """Returns a scheduler of the target class with this one's noise schedule. Raises InputError if they share none."""
    if type(scheduler) is not target and target not in scheduler.compatibles:
        names = f"{type(scheduler).__name__} and {target.__name__}"
        raise InputError(f"{names} do not share a noise schedule; keep the pipeline's own sampler")
    # from_config alone uses the target's defaults for values that are defaults here, and these differ
    schedule = {key: scheduler.config[key] for key in NOISE_SCHEDULE if key in scheduler.config}
    return target.from_config(scheduler.config, **schedule)
