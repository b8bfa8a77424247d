"""Pipeline -> Report: images of consecutive seeds stream through the metrics; nothing is kept but statistics.

Of several processes each draws every n-th batch, and the first measures all of them in the order of their seeds: the numbers
are those of one process, bit for bit. `seconds_per_image` is the time of sampling alone on one process, as long as it took
when the images were drawn. Cost is that of one denoiser call at batch 1.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor, nn

from dmquant import __version__
from dmquant.diffusion import other_tools
from dmquant.diffusion.clip_range import clip_like
from dmquant.diffusion.conditioning import Conditioning, complete, recall
from dmquant.diffusion.pipeline import EMBEDDED as EMBEDDED_MODEL
from dmquant.diffusion.pipeline import Target, find_target, is_quantized, open_pipeline
from dmquant.diffusion.sampling import SamplingPlan, set_sampler
from dmquant.errors import DmquantError, InputError
from dmquant.evaluation.cost import FLOAT_BITS, Cost, measure_cost
from dmquant.evaluation.image_cache import Drawn, Gallery
from dmquant.evaluation.metrics import layer_sqnr, output_cosine
from dmquant.evaluation.metrics.base import Batch, Metric
from dmquant.evaluation.metrics.feature_extractor import EMBEDDED
from dmquant.evaluation.metrics.instruments import Instruments, Yardstick, open_yardstick
from dmquant.evaluation.metrics.registry import DEFAULT, DEFAULT_PAIRED, choose_metrics, refuse_small, refuse_unused
from dmquant.evaluation.reports.report import FLOAT_METHOD, LayerProfile, Protocol, Report
from dmquant.kernels.registry import choice
from dmquant.progress import Track, plain
from dmquant.training import distributed

MAX_PAIRS = 64  # paired metrics look at the first min(num_images, 64) seeds
MAX_WITNESSED = 16  # seeds along whose trajectories the denoisers' answers are compared
MAX_PROFILED = 8  # seeds along whose trajectories the layers are looked at
MIN_CHECKED = 16  # images to see before a share of flat ones means anything
PACKAGES = ("torch", "diffusers", "torchmetrics")


class Outcome(NamedTuple):
    """What streaming the images gave."""

    metrics: dict[str, float]
    image_size: int  # pixels
    seconds: float  # of sampling, all processes together
    peak_bytes: int


@dataclass(frozen=True)
class Course:
    """How images are drawn."""

    seeds: range
    plan: SamplingPlan
    cache: Path | None
    track: Track

    def first(self, count: int) -> range:
        return self.seeds[:count]


@torch.no_grad()
def evaluate(
    pipeline: DiffusionPipeline, *, metrics: str | Sequence[str] | None = None, num_images: int = 1000, seed: int = 0,
    steps: int = 20, sampler: str | None = None, batch: int = 50, conditioning: Conditioning = Conditioning(),
    extractor: str = EMBEDDED, inception_weights: str | Path | None = None, reference: str | Path | None = None,
    clip: str | Path | None = None, float_pipeline: DiffusionPipeline | None = None, cache: str | Path | None = None,
    track: Track = plain,
) -> Report:
    """Draws `num_images` images from seeds seed, seed + 1, ... and measures them; the pipeline is left as it is.

    "fid", "sfid", "kid" and "prdc" compare with a reference: a built-in name, an npz, an image folder or zip; "is" needs the
    extractor only, "clip_score" prompts and CLIP, a folder or hub id. "psnr" and "ssim" compare the images of the first 64
    seeds with those of the float model, "cosine" the denoisers' answers along 16 of its trajectories, "layers" their layers
    along 8: `float_pipeline`, or the one that a quantized pipeline says it came from. None measures "fid", and "psnr" where
    the float model is at hand. In the folder `cache` images are kept and found again.
    """
    refuse_others(pipeline, float_pipeline)
    target = find_target(pipeline)
    denoiser = target.denoiser
    if metrics is None:
        metrics = (*DEFAULT, *(DEFAULT_PAIRED if float_pipeline is not None or has_base(denoiser) else ()))
    chosen = choose_metrics([metrics] if isinstance(metrics, str) else metrics, num_images)
    instruments, size = Instruments(extractor, inception_weights, reference, clip), find_image_size(target)
    refuse_unused(chosen, [*instruments.given(), *(["float_pipeline"] if float_pipeline is not None else [])])
    refuse_small(chosen, size)
    conditioning = complete(pipeline, conditioning)
    chosen.refuse_without_prompts(conditioning.prompts)
    cost, cache = measure_cost(denoiser), None if cache is None else Path(cache)
    course = Course(range(seed, seed + num_images), SamplingPlan(steps, batch, conditioning), cache, track)
    distributed.join(on_cpu=denoiser.device.type == "cpu")
    with keep_scheduler(pipeline):
        sampler = set_sampler(pipeline, sampler)
        yardstick = open_yardstick(chosen, instruments, size=size, device=denoiser.device, track=track)
        base = find_target(float_pipeline or open_base(target)) if chosen.needs_float_model else None
        twins = draw_twins(base.pipeline, pipeline.scheduler, course) if chosen.needs_float_images else None
        outcome = measure(pipeline, yardstick.make_meters(chosen), yardstick, twins, course)
        curves = compare_answers(target, base, course) if chosen.needs_agreement else {}
        layers = profile_layers(target, base, course) if chosen.needs_layers else ()
    known = {**conditioning.describe(), **yardstick.describe()}
    protocol = Protocol(num_images, seed, steps, sampler, batch, outcome.image_size, **known)
    return write_report(target, cost, outcome, curves, layers, protocol)


@torch.no_grad()
def add_layers(
    report: Report, pipeline: DiffusionPipeline, base: DiffusionPipeline, *, conditioning: Conditioning | None = None,
    track: Track = plain,
) -> Report:
    """The report of a pipeline with what "layers" measures, by the protocol that it has; of prompts it has the hash only."""
    protocol = report.protocol
    seeds = range(protocol.seed, protocol.seed + protocol.num_images)
    asked = conditioning or recall(pipeline, protocol.conditions_sha256, protocol.guidance_scale)
    course = Course(seeds, SamplingPlan(protocol.steps, protocol.batch, asked), None, track)
    with keep_scheduler(pipeline):
        if set_sampler(pipeline) != protocol.sampler:
            set_sampler(pipeline, protocol.sampler)
        return replace(report, layers=profile_layers(find_target(pipeline), find_target(base), course))


def refuse_others(*pipelines: DiffusionPipeline | None) -> None:
    """Raises InputError for what is no pipeline; None is one that was not given."""
    for pipeline in pipelines:
        if not isinstance(pipeline, DiffusionPipeline | None):
            raise InputError(f"give a diffusers pipeline, as dmquant.load returns it, not {type(pipeline).__name__}")


def find_image_size(target: Target) -> int | None:
    """Side in pixels of the images that the pipeline draws; None where its config does not say, or they are not square."""
    pipeline, size = target.pipeline, target.denoiser.config.get("sample_size")
    vae = pipeline.components.get("vae")
    factor = getattr(pipeline, "vae_scale_factor", 2 ** (len(vae.config.block_out_channels) - 1) if vae else 1)
    return size * factor if isinstance(size, int) else None


@contextmanager
def keep_scheduler(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Puts the pipeline's own scheduler back at the end."""
    before = pipeline.scheduler
    try:
        yield
    finally:
        pipeline.scheduler = before


def has_base(denoiser: nn.Module) -> bool:
    """Whether a quantized denoiser names a float pipeline that lies on this machine, still float."""
    base = read_record(denoiser).get("base_model")
    if base is None or base == EMBEDDED_MODEL:
        return base is not None
    return (Path(base) / "model_index.json").is_file() and not is_quantized(base)


def open_base(target: Target) -> DiffusionPipeline:
    """The float pipeline that a quantized one was made from, on its device."""
    base = read_record(target.denoiser).get("base_model")
    if base is None:
        raise InputError("psnr, ssim, cosine and layers compare a quantized pipeline with its float model; give float_pipeline")
    try:
        return open_pipeline(base, device=str(target.denoiser.device))
    except DmquantError as error:
        recorded = f"recorded in {name_model(target.pipeline)}, {base!r}, "
        raise type(error)(f"the float model {recorded}cannot be opened: {error}") from error


def draw_twins(pipeline: DiffusionPipeline, scheduler: SchedulerMixin, course: Course) -> Tensor:
    """The float model's images of the first seeds, uint8 (P, 3, H, W), by the other model's sampler in its own range.

    On other processes than the first they are none.
    """
    with keep_scheduler(pipeline):
        pipeline.scheduler = clip_like(scheduler, pipeline.scheduler)
        images = [drawn.images for drawn, _ in read(pipeline, course.first(MAX_PAIRS), Yardstick(), course)]
    return torch.cat(images) if images else torch.zeros(0, dtype=torch.uint8)


def read(
    pipeline: DiffusionPipeline, seeds: range, yardstick: Yardstick, course: Course
) -> Iterator[tuple[Drawn, Batch]]:
    """The batches of the seeds in order, with what the networks see in them, on the first process; on others none.

    Each round every process draws one batch.
    """
    plan = course.plan
    gallery = Gallery(pipeline, steps=plan.steps, conditioning=plan.conditioning, folder=course.cache)
    batches = [seeds[start:start + plan.batch] for start in range(0, len(seeds), plan.batch)]
    for start in course.track(range(0, len(batches), distributed.count()), "sampling"):
        own = batches[start + distributed.number():][:1]
        drawn = [(gallery.draw(batch), plan.conditioning.choose(batch)) for batch in own]
        pages = distributed.gather([(page, yardstick.look(page.images, entries)) for page, entries in drawn])
        yield from (page for sheet in pages for page in sheet)


def measure(
    pipeline: DiffusionPipeline, meters: Sequence[Metric], yardstick: Yardstick, twins: Tensor | None, course: Course
) -> Outcome:
    """Shows every batch to every metric."""
    watch = Watch()
    for drawn, batch in read(pipeline, course.seeds, yardstick, course):
        pairs = None if twins is None else twins[watch.seen:watch.seen + len(batch.images)]
        watch.note(drawn)
        for meter in meters:
            meter.update(replace(batch, float_images=pairs))
    numbers = {name: value for meter in meters for name, value in meter.compute().items()} if distributed.is_first() else {}
    return distributed.share(Outcome(numbers, watch.size, watch.seconds, watch.peak_bytes))


class Watch:
    """Adds up what drawing took, and stops a model that draws nothing but one colour."""

    def __init__(self) -> None:
        self.seen, self.size, self.seconds, self.peak_bytes, self._flat = 0, 0, 0.0, 0, 0

    def note(self, drawn: Drawn) -> None:
        self.seen += len(drawn.images)
        self.size, self.seconds = drawn.images.shape[-1], self.seconds + drawn.seconds
        self.peak_bytes = max(self.peak_bytes, drawn.peak_bytes)
        pixels = drawn.images.flatten(1)
        self._flat += int((pixels.amin(1) == pixels.amax(1)).sum())
        if self.seen >= MIN_CHECKED and self._flat > self.seen / 2:
            raise DmquantError(f"{self._flat} of the first {self.seen} images have one colour only; the denoiser has diverged")


def compare_answers(target: Target, base: Target, course: Course) -> dict[str, dict[str, float]]:
    """The cosine to the float denoiser's answers by timestep, by the sampler of the model under test."""
    seeds = course.first(MAX_WITNESSED)
    with keep_scheduler(base.pipeline):
        base.pipeline.scheduler = clip_like(target.pipeline.scheduler, base.pipeline.scheduler)
        found = output_cosine.measure_agreement(target, base, seeds, course.plan, track=course.track) if distributed.is_first() else {}
    return distributed.share({output_cosine.NAME: {f"{timestep:g}": value for timestep, value in found.items()}})


def profile_layers(target: Target, base: Target, course: Course) -> tuple[LayerProfile, ...]:
    """The layers' errors and ranges along the float model's trajectories, by the sampler of the model under test."""
    seeds = course.first(MAX_PROFILED)
    with keep_scheduler(base.pipeline):
        base.pipeline.scheduler = clip_like(target.pipeline.scheduler, base.pipeline.scheduler)
        found = layer_sqnr.measure_layers(target, base, seeds, course.plan, track=course.track) if distributed.is_first() else ()
    return distributed.share(found)


def write_report(
    target: Target, cost: Cost, outcome: Outcome, curves: dict[str, dict[str, float]],
    layers: tuple[LayerProfile, ...], protocol: Protocol,
) -> Report:
    """Everything that was measured, with what a reader needs to compare it."""
    means = {name: sum(curve.values()) / len(curve) for name, curve in curves.items()}
    denoiser, model = target.denoiser, name_model(target.pipeline)
    record = read_record(denoiser) or other_tools.describe(denoiser)
    size_bytes = measure_size(denoiser, Path(model) / target.name, cost) if record else cost.float_size_bytes
    return Report(
        model=model, method=record.get("method", FLOAT_METHOD), settings=record.get("settings", {}),
        weight_bits=record.get("weight_bits", FLOAT_BITS), act_bits=record.get("act_bits", FLOAT_BITS),
        metrics=outcome.metrics | means, curves=curves, layers=layers,
        protocol=protocol, size_bytes=size_bytes, float_size_bytes=cost.float_size_bytes,
        bits_per_weight=8 * size_bytes / cost.num_params, ops=cost.ops, bops=cost.bops,
        attention_macs=cost.attention_macs, seconds_per_image=outcome.seconds / protocol.num_images,
        peak_memory_bytes=outcome.peak_bytes or None,
        versions={"dmquant": __version__, "kernels": choice(), **{package: version(package) for package in PACKAGES}},
        base_model=record.get("base_model"),
    )


def name_model(pipeline: DiffusionPipeline) -> str:
    """Where a pipeline came from; its kind, where it was made in memory."""
    return str(pipeline.config.get("_name_or_path") or type(pipeline).__name__)


def measure_size(denoiser: nn.Module, folder: Path, cost: Cost) -> int:
    """Bytes of a quantized denoiser: of its files where it was saved, as it lies in memory where another tool made it, else
    as counted.
    """
    if other_tools.find_tool(denoiser):
        return other_tools.count_bytes(denoiser)
    is_saved = (folder.parent / "model_index.json").is_file() and is_quantized(folder.parent)
    if is_saved:
        return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return cost.size_bytes


def read_record(denoiser: nn.Module) -> dict[str, Any]:
    """How a quantized denoiser was made; empty for a float one."""
    return getattr(denoiser, "dmquant_record", {})
