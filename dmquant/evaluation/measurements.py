"""Measurements of an evaluation: metrics over generated images, and both denoisers along the same trajectories."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor

from dmquant.diffusion.clip_range import clip_like
from dmquant.diffusion.pipeline import Target
from dmquant.diffusion.sampling import SamplingPlan
from dmquant.errors import DmquantError
from dmquant.evaluation.image_cache import ImageBatch, ImageCache
from dmquant.evaluation.metrics import layer_sqnr, output_cosine
from dmquant.evaluation.metrics.base import Batch, Metric
from dmquant.evaluation.metrics.instruments import Instruments
from dmquant.evaluation.reports.report import LayerProfile
from dmquant.progress import Track
from dmquant.training import distributed

MAX_PAIRS = 64  # paired metrics use the images of the first min(num_images, 64) seeds
MAX_COSINE_SEEDS = 16  # seeds along whose trajectories the denoisers' outputs are compared
MAX_LAYER_SEEDS = 8  # seeds along whose trajectories the layers are measured
MIN_CHECKED = 16  # images before the share of single-coloured ones is checked


class Measurements(NamedTuple):
    """Metrics of the generated images, and the cost of generating them."""

    metrics: dict[str, float]
    image_size: int  # pixels
    seconds: float  # of sampling, summed over the processes
    peak_bytes: int  # of the accelerator's memory; 0 on a CPU


@dataclass(frozen=True)
class SamplingJob:
    """Seeds, sampling options and image cache of an evaluation."""

    seeds: range
    plan: SamplingPlan
    cache: Path | None
    track: Track

    def first(self, count: int) -> range:
        """Returns the first seeds, at most `count`."""
        return self.seeds[:count]


def sample_float_images(pipeline: DiffusionPipeline, scheduler: SchedulerMixin, job: SamplingJob) -> Tensor:
    """Returns the float model's images of the first seeds, uint8 (P, 3, H, W); P = 0 on other processes than the first.

    The sampler is that of the model under test, with the clip range of the float model.
    """
    with borrow_sampler(pipeline, scheduler):
        images = [drawn.images for drawn, _ in iterate_batches(pipeline, job.first(MAX_PAIRS), Instruments(), job)]
    return torch.cat(images) if images else torch.zeros(0, dtype=torch.uint8)


def iterate_batches(
    pipeline: DiffusionPipeline, seeds: range, instruments: Instruments, job: SamplingJob
) -> Iterator[tuple[ImageBatch, Batch]]:
    """Yields the batches in the order of the seeds with the features of their images; yields none on other processes.

    In each round every process generates one batch, and the first process gathers them.
    """
    plan = job.plan
    images = ImageCache(pipeline, steps=plan.steps, conditioning=plan.conditioning, folder=job.cache)
    batches = [seeds[start : start + plan.batch] for start in range(0, len(seeds), plan.batch)]
    for start in job.track(range(0, len(batches), distributed.count()), "sampling"):
        own = batches[start + distributed.number() :][:1]
        drawn = [(images.load_or_generate(batch), plan.conditioning.choose(batch)) for batch in own]
        gathered = distributed.gather([(found, instruments.measure(found.images, entries)) for found, entries in drawn])
        yield from (pair for pairs in gathered for pair in pairs)


def measure(
    pipeline: DiffusionPipeline, meters: Sequence[Metric], instruments: Instruments, float_images: Tensor | None, job: SamplingJob
) -> Measurements:
    """Updates every metric with every batch and returns the results."""
    totals = SamplingTotals()
    for drawn, batch in iterate_batches(pipeline, job.seeds, instruments, job):
        pairs = None if float_images is None else float_images[totals.num_images : totals.num_images + len(batch.images)]
        totals.add(drawn)
        for meter in meters:
            meter.update(replace(batch, float_images=pairs))
    numbers = {name: value for meter in meters for name, value in meter.compute().items()} if distributed.is_first() else {}
    return distributed.share(Measurements(numbers, totals.size, totals.seconds, totals.peak_bytes))


class SamplingTotals:
    """Sums images and seconds of the batches; raises DmquantError if most images have a single colour."""

    def __init__(self) -> None:
        self.num_images, self.size, self.seconds, self.peak_bytes, self._flat = 0, 0, 0.0, 0, 0

    def add(self, drawn: ImageBatch) -> None:
        """Adds a batch."""
        self.num_images += len(drawn.images)
        self.size, self.seconds = drawn.images.shape[-1], self.seconds + drawn.seconds
        self.peak_bytes = max(self.peak_bytes, drawn.peak_bytes)
        pixels = drawn.images.flatten(1)
        self._flat += int((pixels.amin(1) == pixels.amax(1)).sum())
        if self.num_images >= MIN_CHECKED and self._flat > self.num_images / 2:
            share = f"{self._flat} of the first {self.num_images} images"
            raise DmquantError(f"{share} have one colour only: the denoiser has diverged; quantize it with other settings")


def measure_cosine(target: Target, base: Target, job: SamplingJob) -> dict[str, dict[str, float]]:
    """Returns "cosine" -> timestep -> cosine between both denoisers' outputs, with the sampler of the model under test."""
    seeds = job.first(MAX_COSINE_SEEDS)
    with borrow_sampler(base.pipeline, target.pipeline.scheduler):
        found = {}
        if distributed.is_first():
            found = output_cosine.measure_output_cosine(target, base, seeds, job.plan, track=job.track)
    return distributed.share({output_cosine.NAME: {f"{timestep:g}": value for timestep, value in found.items()}})


def profile_layers(target: Target, base: Target, job: SamplingJob) -> tuple[LayerProfile, ...]:
    """Returns the layers' errors and input ranges on the float trajectories, by the sampler of the model under test."""
    seeds = job.first(MAX_LAYER_SEEDS)
    with borrow_sampler(base.pipeline, target.pipeline.scheduler):
        found = layer_sqnr.measure_layers(target, base, seeds, job.plan, track=job.track) if distributed.is_first() else ()
    return distributed.share(found)


@contextmanager
def keep_scheduler(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Restores the pipeline's scheduler at the end of the block."""
    before = pipeline.scheduler
    try:
        yield
    finally:
        pipeline.scheduler = before


@contextmanager
def borrow_sampler(pipeline: DiffusionPipeline, scheduler: SchedulerMixin) -> Iterator[None]:
    """Gives the pipeline this sampler inside the context, with the pipeline's own clip range."""
    with keep_scheduler(pipeline):
        pipeline.scheduler = clip_like(scheduler, pipeline.scheduler)
        yield
