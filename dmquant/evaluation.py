"""Pipeline -> Report: images of consecutive seeds stream through the metrics; nothing is kept but statistics.

`seconds_per_image` is the time of sampling alone, without the metrics. Cost is that of one denoiser call at batch 1.
"""

import difflib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor, nn

from dmquant import __version__
from dmquant.cost import FLOAT_BITS, Cost, measure_cost
from dmquant.denoiser import EMBEDDED as EMBEDDED_MODEL
from dmquant.denoiser import find_denoiser, is_quantized, open_pipeline
from dmquant.errors import DmquantError, InputError
from dmquant.generation import generate, set_sampler
from dmquant.metrics.base import Batch, Metric
from dmquant.metrics.extractor import EMBEDDED, Extractor, load_extractor
from dmquant.metrics.fid import Frechet
from dmquant.metrics.reference import Reference, open_reference
from dmquant.metrics.similarity import Psnr
from dmquant.progress import Track, plain
from dmquant.report import FLOAT_METHOD, Protocol, Report

METRICS: dict[str, type[Metric]] = {"fid": Frechet, "psnr": Psnr}
MAX_PAIRS = 64  # paired metrics look at the first min(num_images, 64) seeds
MIN_CHECKED = 16  # images to see before a share of flat ones means anything
PACKAGES = ("torch", "diffusers", "torchmetrics")


@dataclass(frozen=True)
class Yardstick:
    """What features are taken with and compared to."""

    extractor: Extractor
    reference: Reference


@torch.no_grad()
def evaluate(
    pipeline: DiffusionPipeline, *, metrics: str | Sequence[str] | None = None, num_images: int = 1000, seed: int = 0,
    steps: int = 20, sampler: str | None = None, batch: int = 50, extractor: str = EMBEDDED,
    inception_weights: str | Path | None = None, reference: str | Path | None = None,
    float_pipeline: DiffusionPipeline | None = None, track: Track = plain,
) -> Report:
    """Draws `num_images` images from seeds seed, seed + 1, ... and measures them; the pipeline is left as it is.

    "fid" compares with a reference: a built-in name, an npz, an image folder or zip. "psnr" compares the images of the
    first 64 seeds with those of the float model: `float_pipeline`, or the one that a quantized pipeline says it came from.
    None measures what can be measured: "fid", and "psnr" where the float model is at hand.
    """
    refuse_others(pipeline, float_pipeline)
    denoiser = find_denoiser(pipeline)[1]
    if metrics is None:
        metrics = ("fid", "psnr") if float_pipeline is not None or has_base(denoiser) else ("fid",)
    kinds = choose_metrics([metrics] if isinstance(metrics, str) else metrics, num_images)
    refuse_unused(kinds, extractor, inception_weights, reference, float_pipeline)
    cost = measure_cost(denoiser)
    yardstick, twins = None, None
    seeds, how = range(seed, seed + num_images), {"steps": steps, "batch": batch, "track": track}
    with keep_scheduler(pipeline):
        sampler = set_sampler(pipeline, sampler)
        if any(kind.needs_features for kind in kinds):
            network, size = load_extractor(extractor, inception_weights).to(denoiser.device), find_image_size(pipeline)
            if size is not None:
                network.refuse_size(size, size)
            yardstick = Yardstick(network, open_reference(reference, network, size=size, track=track))
        if any(kind.needs_float_images for kind in kinds):
            twins = draw_twins(float_pipeline or open_base(pipeline), pipeline.scheduler, seeds[:MAX_PAIRS], how)
        meters = [kind(yardstick.extractor.name, yardstick.reference) if kind.needs_features else kind() for kind in kinds]
        images = Stopwatch(generate(pipeline, seeds, **how))
        size = stream(images, meters, yardstick, twins)
    protocol = Protocol(num_images, seed, steps, sampler, batch, size, **describe(yardstick))
    numbers = {name: value for meter in meters for name, value in meter.compute().items()}
    return write_report(pipeline, cost, numbers, protocol, images.seconds / num_images)


def refuse_others(*pipelines: DiffusionPipeline | None) -> None:
    """Raises InputError for what is no pipeline; None is one that was not given."""
    for pipeline in pipelines:
        if not isinstance(pipeline, DiffusionPipeline | None):
            raise InputError(f"give a diffusers pipeline, as dmquant.load returns it, not {type(pipeline).__name__}")


def choose_metrics(names: Sequence[str], num_images: int) -> list[type[Metric]]:
    """The metrics of those names, each once; refuses what cannot be measured before any image is drawn."""
    for name in names:
        if name not in METRICS:
            near = difflib.get_close_matches(name, METRICS, n=1)
            raise InputError(f"no metric {name!r}; " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(METRICS)}"))
    if not names:
        raise InputError(f"no metric asked for; known: {', '.join(METRICS)}")
    least = 2 if "fid" in names else 1
    if num_images < least:
        raise InputError(f"num_images must be at least {least} for {', '.join(names)}, got {num_images}")
    return [METRICS[name] for name in dict.fromkeys(names)]


def refuse_unused(
    kinds: Sequence[type[Metric]], extractor: str, inception_weights: str | Path | None, reference: str | Path | None,
    float_pipeline: DiffusionPipeline | None,
) -> None:
    """Raises InputError for an argument that no metric asked for would look at."""
    given = {"extractor": extractor != EMBEDDED, "inception_weights": inception_weights is not None,
             "reference": reference is not None}  # fmt: skip
    unused = [name for name, is_given in given.items() if is_given]
    if unused and not any(kind.needs_features for kind in kinds):
        raise InputError(f"{', '.join(unused)}: without effect, as fid is not among the metrics; add it or leave them out")
    if float_pipeline is not None and not any(kind.needs_float_images for kind in kinds):
        raise InputError("float_pipeline: without effect, as psnr is not among the metrics; add it or leave it out")


def find_image_size(pipeline: DiffusionPipeline) -> int | None:
    """Side in pixels of the images that the pipeline draws; None where its config does not say, or they are not square."""
    size = find_denoiser(pipeline)[1].config.get("sample_size")
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


def open_base(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """The float pipeline that a quantized one was made from, on its device."""
    denoiser = find_denoiser(pipeline)[1]
    base = read_record(denoiser).get("base_model")
    if base is None:
        raise InputError("psnr compares a quantized pipeline with its float model; give float_pipeline")
    try:
        return open_pipeline(base, device=str(denoiser.device))
    except DmquantError as error:
        raise type(error)(f"the float model recorded in {name_model(pipeline)}, {base!r}, cannot be opened: {error}") from error


def draw_twins(pipeline: DiffusionPipeline, scheduler: SchedulerMixin, seeds: Sequence[int], how: dict[str, Any]) -> Tensor:
    """The float model's images of the seeds, uint8 (P, 3, H, W), drawn by the scheduler of the model under test."""
    with keep_scheduler(pipeline):
        pipeline.scheduler = scheduler
        return torch.cat(list(generate(pipeline, seeds, **how)))


class Stopwatch:
    """Passes an iterator on and counts the seconds spent inside it."""

    def __init__(self, work: Iterator[Tensor]):
        self.seconds = 0.0
        self._work = work

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        started = time.perf_counter()
        try:
            return next(self._work)
        finally:
            self.seconds += time.perf_counter() - started


def stream(images: Iterator[Tensor], meters: Sequence[Metric], yardstick: Yardstick | None, twins: Tensor | None) -> int:
    """Shows every batch to every metric; returns the side of the images in pixels."""
    seen, flat, size = 0, 0, 0
    for batch in images:
        flat += int((batch.flatten(1).amin(1) == batch.flatten(1).amax(1)).sum())
        features = yardstick and yardstick.extractor.features(batch)
        pairs = None if twins is None else twins[seen:seen + len(batch)]
        seen, size = seen + len(batch), batch.shape[-1]
        if seen >= MIN_CHECKED and flat > seen / 2:
            raise DmquantError(f"{flat} of the first {seen} images have one colour only; the denoiser has diverged")
        for meter in meters:
            meter.update(Batch(batch, features, pairs))
    return size


def describe(yardstick: Yardstick | None) -> dict[str, Any]:
    """The fields of the protocol that say which features were compared with what."""
    if yardstick is None:
        return {}
    extractor, reference = yardstick.extractor, yardstick.reference
    return {
        "extractor": extractor.name, "extractor_sha256": extractor.sha256, "reference": reference.name,
        "reference_sha256": reference.sha256, "reference_images": reference.num_images,
    }


def write_report(
    pipeline: DiffusionPipeline, cost: Cost, metrics: dict[str, float], protocol: Protocol, seconds_per_image: float
) -> Report:
    """Everything that was measured, with what a reader needs to compare it."""
    name, denoiser = find_denoiser(pipeline)
    record, model = read_record(denoiser), name_model(pipeline)
    size_bytes = measure_size(Path(model) / name, cost) if record else cost.float_size_bytes
    return Report(
        model=model, method=record.get("method", FLOAT_METHOD), settings=record.get("settings", {}),
        weight_bits=record.get("weight_bits", FLOAT_BITS), act_bits=record.get("act_bits", FLOAT_BITS), metrics=metrics,
        protocol=protocol, size_bytes=size_bytes, float_size_bytes=cost.float_size_bytes,
        bits_per_weight=8 * size_bytes / cost.num_params, ops=cost.ops, seconds_per_image=seconds_per_image,
        versions={"dmquant": __version__, **{package: version(package) for package in PACKAGES}},
        base_model=record.get("base_model"),
    )


def name_model(pipeline: DiffusionPipeline) -> str:
    """Where a pipeline came from; its kind, where it was made in memory."""
    return str(pipeline.config.get("_name_or_path") or type(pipeline).__name__)


def measure_size(folder: Path, cost: Cost) -> int:
    """Bytes of a quantized denoiser: of its files where it was saved, else as counted."""
    is_saved = (folder.parent / "model_index.json").is_file() and is_quantized(folder.parent)
    if is_saved:
        return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return cost.size_bytes


def read_record(denoiser: nn.Module) -> dict[str, Any]:
    """How a quantized denoiser was made; empty for a float one."""
    return getattr(denoiser, "dmquant_record", {})
