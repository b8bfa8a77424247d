"""Evaluates a pipeline: generates images of consecutive seeds, updates the metrics batch by batch, and returns a Report.

Of n processes each generates every n-th batch, and the first updates the metrics in the order of the seeds: the results equal
those of one process bit for bit. `seconds_per_image` is the sampling time on one process, without metrics; for images from the
cache it is the time that was measured when they were generated. Costs are those of one denoiser call at batch 1.
"""

from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from dmquant import __version__
from dmquant.diffusion import other_tools
from dmquant.diffusion.conditioning import Conditioning, complete, reconstruct
from dmquant.diffusion.pipeline import EMBEDDED as EMBEDDED_MODEL
from dmquant.diffusion.pipeline import Target, find_target, is_quantized, open_pipeline
from dmquant.diffusion.sampling import SamplingPlan, set_sampler
from dmquant.errors import DmquantError, InputError
from dmquant.evaluation.cost import FLOAT_BITS, Cost, measure_cost
from dmquant.evaluation.measurements import (
    Measurements,
    SamplingJob,
    keep_scheduler,
    measure,
    measure_cosine,
    profile_layers,
    sample_float_images,
)
from dmquant.evaluation.metrics.feature_extractor import EMBEDDED
from dmquant.evaluation.metrics.instruments import InstrumentOptions, open_instruments
from dmquant.evaluation.metrics.registry import DEFAULT, DEFAULT_PAIRED, check_all_used, check_image_size, select_metrics
from dmquant.evaluation.reports.report import FLOAT_METHOD, LayerProfile, Protocol, Report
from dmquant.kernels.registry import choice
from dmquant.progress import Track, plain
from dmquant.training import distributed

PACKAGES = ("torch", "diffusers", "torchmetrics")


@torch.no_grad()
def evaluate(
    pipeline: DiffusionPipeline,
    *,
    metrics: str | Sequence[str] | None = None,
    num_images: int = 1000,
    seed: int = 0,
    steps: int = 20,
    sampler: str | None = None,
    batch: int = 50,
    conditioning: Conditioning = Conditioning(),
    extractor: str = EMBEDDED,
    inception_weights: str | Path | None = None,
    reference: str | Path | None = None,
    clip: str | Path | None = None,
    float_pipeline: DiffusionPipeline | None = None,
    cache: str | Path | None = None,
    track: Track = plain,
) -> Report:
    """Generates `num_images` images with seeds seed, seed + 1, ... and measures them. The pipeline is not changed.

    Args:
        metrics: Names of metrics; default: "fid", and "psnr" if there is a float model to compare with.
            "fid", "sfid", "kid", "prdc": distances of features to the reference. "is": needs the extractor only.
            "clip_score": needs prompts. "psnr", "ssim": compare the images of the first 64 seeds with the float model's.
            "cosine": compares the denoisers' outputs along 16 trajectories of the float model. "layers": measures the
            errors of the layers along 8 of them.
        reference: Built-in name, npz file, image folder or zip; default: the extractor's.
        clip: Folder or hub id of the CLIP model.
        float_pipeline: Model to compare with; default: the one that the quantized pipeline's record names.
        cache: Folder in which images are stored and found again; default: none.

    Raises:
        InputError: an argument does not fit the pipeline or the metrics; no image has been generated yet.
        DmquantError: more than half of the images have a single colour.
    """
    refuse_others(pipeline, float_pipeline)
    target = find_target(pipeline)
    denoiser = target.denoiser
    if metrics is None:
        metrics = (*DEFAULT, *(DEFAULT_PAIRED if float_pipeline is not None or has_base(denoiser) else ()))
    chosen = select_metrics([metrics] if isinstance(metrics, str) else metrics, num_images)
    options, size = InstrumentOptions(extractor, inception_weights, reference, clip), find_image_size(target)
    check_all_used(chosen, [*options.given(), *(["float_pipeline"] if float_pipeline is not None else [])])
    check_image_size(chosen, size)
    conditioning = complete(pipeline, conditioning)
    chosen.check_prompts(conditioning.prompts)
    cost, cache = measure_cost(denoiser), None if cache is None else Path(cache)
    job = SamplingJob(range(seed, seed + num_images), SamplingPlan(steps, batch, conditioning), cache, track)
    distributed.join(on_cpu=denoiser.device.type == "cpu")
    with keep_scheduler(pipeline):
        sampler = set_sampler(pipeline, sampler)
        instruments = open_instruments(chosen, options, size=size, device=denoiser.device, track=track)
        base = find_target(float_pipeline or open_base(target)) if chosen.needs_float_model else None
        float_images = sample_float_images(base.pipeline, pipeline.scheduler, job) if base and chosen.needs_float_images else None
        measured = measure(pipeline, instruments.make_metrics(chosen), instruments, float_images, job)
        curves = measure_cosine(target, base, job) if base and chosen.needs_output_cosine else {}
        layers = profile_layers(target, base, job) if base and chosen.needs_layers else ()
    known = {**conditioning.describe(), **instruments.describe()}
    protocol = Protocol(num_images, seed, steps, sampler, batch, measured.image_size, **known)
    return make_report(target, cost, measured, curves, layers, protocol)


@torch.no_grad()
def add_layers(
    report: Report,
    pipeline: DiffusionPipeline,
    base: DiffusionPipeline,
    *,
    conditioning: Conditioning | None = None,
    track: Track = plain,
) -> Report:
    """Returns the report with the metric "layers", measured under the report's protocol.

    Args:
        conditioning: Prompts or labels of the evaluation, of which a report has only the hash; default: the pipeline's own.
    """
    protocol = report.protocol
    seeds = range(protocol.seed, protocol.seed + protocol.num_images)
    conditioning = conditioning or reconstruct(pipeline, protocol.conditions_sha256, protocol.guidance_scale)
    job = SamplingJob(seeds, SamplingPlan(protocol.steps, protocol.batch, conditioning), None, track)
    with keep_scheduler(pipeline):
        if set_sampler(pipeline) != protocol.sampler:
            set_sampler(pipeline, protocol.sampler)
        return replace(report, layers=profile_layers(find_target(pipeline), find_target(base), job))


def refuse_others(*pipelines: DiffusionPipeline | None) -> None:
    """Raises InputError if an argument is neither a diffusers pipeline nor None."""
    for pipeline in pipelines:
        if not isinstance(pipeline, DiffusionPipeline | None):
            raise InputError(f"give a diffusers pipeline, as dmquant.load returns it, not {type(pipeline).__name__}")


def find_image_size(target: Target) -> int | None:
    """Returns the side in pixels of the pipeline's images; None if its config does not have one number for it."""
    pipeline, size = target.pipeline, target.denoiser.config.get("sample_size")
    vae = pipeline.components.get("vae")
    factor = getattr(pipeline, "vae_scale_factor", 2 ** (len(vae.config.block_out_channels) - 1) if vae else 1)
    return size * factor if isinstance(size, int) else None


def has_base(denoiser: nn.Module) -> bool:
    """Returns whether the denoiser's record names a float pipeline that exists on this machine and is not quantized."""
    base = read_record(denoiser).get("base_model")
    if base is None or base == EMBEDDED_MODEL:
        return base is not None
    return (Path(base) / "model_index.json").is_file() and not is_quantized(base)


def open_base(target: Target) -> DiffusionPipeline:
    """Returns the float pipeline that the record of a quantized one names, on the same device.

    Raises:
        InputError: the record names none, as for a float pipeline.
        DmquantError: it cannot be opened.
    """
    base = read_record(target.denoiser).get("base_model")
    if base is None:
        raise InputError("psnr, ssim, cosine and layers compare a quantized pipeline with its float model; give float_pipeline")
    try:
        return open_pipeline(base, device=str(target.denoiser.device))
    except DmquantError as error:
        recorded = f"recorded in {name_model(target.pipeline)}, {base!r}, "
        raise type(error)(f"the float model {recorded}cannot be opened: {error}") from error


def make_report(
    target: Target,
    cost: Cost,
    measured: Measurements,
    curves: dict[str, dict[str, float]],
    layers: tuple[LayerProfile, ...],
    protocol: Protocol,
) -> Report:
    """Returns the report: all measurements with their protocol, costs, versions and the model's settings."""
    means = {name: sum(curve.values()) / len(curve) for name, curve in curves.items()}
    denoiser, model = target.denoiser, name_model(target.pipeline)
    record = read_record(denoiser) or other_tools.describe(denoiser)
    size_bytes = measure_size(denoiser, Path(model) / target.name, cost) if record else cost.float_size_bytes
    return Report(
        model=model,
        method=record.get("method", FLOAT_METHOD),
        settings=record.get("settings", {}),
        weight_bits=record.get("weight_bits", FLOAT_BITS),
        act_bits=record.get("act_bits", FLOAT_BITS),
        metrics=measured.metrics | means,
        curves=curves,
        layers=layers,
        protocol=protocol,
        size_bytes=size_bytes,
        float_size_bytes=cost.float_size_bytes,
        bits_per_weight=8 * size_bytes / cost.num_params,
        ops=cost.ops,
        bops=cost.bops,
        attention_macs=cost.attention_macs,
        seconds_per_image=measured.seconds / protocol.num_images,
        peak_memory_bytes=measured.peak_bytes or None,
        versions={"dmquant": __version__, "kernels": choice(), **{package: version(package) for package in PACKAGES}},
        base_model=record.get("base_model"),
    )


def name_model(pipeline: DiffusionPipeline) -> str:
    """Returns the path or hub id that a pipeline was loaded from; the name of its class if it was made in memory."""
    return str(pipeline.config.get("_name_or_path") or type(pipeline).__name__)


def measure_size(denoiser: nn.Module, folder: Path, cost: Cost) -> int:
    """Returns the bytes of a quantized denoiser: those of its files in `folder`; if another tool quantized it, those in memory;
    if it is not saved, those that `cost` counted.
    """
    if other_tools.find_tool(denoiser):
        return other_tools.count_bytes(denoiser)
    is_saved = (folder.parent / "model_index.json").is_file() and is_quantized(folder.parent)
    if is_saved:
        return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return cost.size_bytes


def read_record(denoiser: nn.Module) -> dict[str, Any]:
    """Returns method, settings and base model of a quantized denoiser; {} for a float one."""
    return getattr(denoiser, "dmquant_record", {})
