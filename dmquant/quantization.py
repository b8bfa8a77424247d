"""Quantizes a pipeline: records the teacher, prepares, calibrates, fine-tunes and packs the student, fits its clip range."""

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from dmquant import methods
from dmquant.checkpoint import diffusers_quantizer
from dmquant.diffusion.clip_range import fit_clipping
from dmquant.diffusion.conditioning import Conditioning, complete
from dmquant.diffusion.pipeline import EMBEDDED, Target, evaluating, find_target
from dmquant.diffusion.sampling import SamplingPlan
from dmquant.diffusion.trajectories import Samples, record, recording_seeds
from dmquant.errors import InputError
from dmquant.methods.base import Method
from dmquant.nn.convert import pack_model, read_scheme
from dmquant.nn.fake_quant_layers import find_layers
from dmquant.nn.packed_weight import Bases
from dmquant.nn.scheme import FLOAT, FLOAT_BITS, Bits, LayerScheme, Scheme
from dmquant.progress import Track, plain
from dmquant.quantizers.timestep_clock import LINEAR, Clock
from dmquant.training.calibration import correct_answers
from dmquant.training.denoising_loss import Denoising, open_denoising
from dmquant.training.objectives import Distillation, Objective, min_snr_weights
from dmquant.training.profiler import Meter
from dmquant.training.resume import Run
from dmquant.training.run_cost import Effort


def quantize(
    pipeline: DiffusionPipeline,
    method: str | Method = "lsq",
    *,
    seed: int = 0,
    data: str | Path | None = None,
    conditioning: Conditioning = Conditioning(),
    samples: Samples | None = None,
    run: Run = Run(),
    track: Track = plain,
    **settings: Any,
) -> DiffusionPipeline:
    """Returns a pipeline with a quantized, fine-tuned and packed denoiser; the given pipeline does not change.

    The result computes the same as after dmquant.save and dmquant.load.

    Args:
        pipeline: a float32 diffusers pipeline.
        method: the name of a method, whose settings follow (weight_bits=4, act_bits=8, ...), or a Method.
        seed: of the recording and of fine-tuning.
        data: a folder or zip of images to train on, instead of recorded outputs of the teacher.
        conditioning: prompts or class labels, and the guidance scale, that a conditional pipeline is recorded with.
        samples: a recording that several runs share; without one the teacher is recorded.
        run: a SavedRun, to save the run now and then and to continue it after an interruption.
        track: wraps the loops of the run, to show progress.

    Raises:
        InputError: the pipeline cannot be quantized with these arguments.
    """
    method = resolve(method, settings)
    return quantize_measured(
        pipeline, method, seed=seed, data=data, conditioning=conditioning, samples=samples, run=run, track=track
    ).pipeline


@dataclass(frozen=True)
class Quantized:
    """A quantized pipeline, and the time and memory that the run took."""

    pipeline: DiffusionPipeline
    effort: Effort


def quantize_measured(
    pipeline: DiffusionPipeline, method: Method, *, seed: int = 0, data: str | Path | None = None,
    conditioning: Conditioning = Conditioning(), samples: Samples | None = None, run: Run = Run(), track: Track = plain,
) -> Quantized:  # fmt: skip
    """Does what `quantize` does, and also returns the time and memory of each stage."""
    target = find_quantizable(pipeline, method, seed)
    meter = Meter(pipeline.device)
    student = make_student(
        pipeline, method, seed=seed, data=data, conditioning=conditioning, samples=samples, run=run, track=track, meter=meter
    )
    packed, trained = pack_model(student), count_trained(target.denoiser, student)
    facts = describe_run(pipeline, method, seed) | trained
    if samples is None or conditioning != Conditioning():
        asked = complete(pipeline, conditioning).describe()
        facts |= {name: value for name, value in asked.items() if value is not None}
    diffusers_quantizer.mark_as_quantized(packed, facts)
    quantized = target.with_denoiser(packed)
    seeds = recording_seeds(seed, min(method.clip_images, method.trajectories))
    plan = SamplingPlan(method.sampling_steps, method.batch, conditioning)
    with meter.stage("clipping"):
        fit_clipping(quantized, target, seeds, plan, track=track)
    return Quantized(quantized.pipeline, meter.sum_up(**trained, is_whole=not run.is_continued))


def make_student(
    pipeline: DiffusionPipeline, method: Method, *, seed: int = 0, data: str | Path | None = None,
    conditioning: Conditioning = Conditioning(), samples: Samples | None = None, run: Run = Run(), track: Track = plain,
    meter: Meter | None = None,
) -> nn.Module:  # fmt: skip
    """Returns the fine-tuned denoiser before it is packed: float weights and their quantizers.

    Only trained parameters require gradients. The arguments are those of `quantize`; `meter` measures each stage.
    """
    target, meter = find_quantizable(pipeline, method, seed), meter or Meter(pipeline.device)
    teacher, denoising = target.denoiser, None if data is None else open_denoising(target, data)
    run.open(list_facts(pipeline, method, seed, conditioning), list_tensors(teacher, denoising, samples))
    if samples is None:
        with meter.stage("recording"):
            samples = run.load_or_record(
                lambda: record(
                    pipeline,
                    method.trajectories,
                    steps=method.sampling_steps,
                    eta=method.eta,
                    seed=seed,
                    conditioning=conditioning,
                    track=track,
                )
            )
    with meter.stage("calibration"):
        student = copy.deepcopy(teacher)
        timesteps = samples.timestep.unique().flip(0).to(next(teacher.parameters()).device)
        method.prepare(student, Clock(timesteps, LINEAR))
        method.calibrate(student, samples, track=track)
    objective: Objective = denoising or Distillation(samples, min_snr_weights(samples, pipeline.scheduler, method.snr_cap))
    with evaluating(teacher), meter.stage("fine-tuning"):
        method.finetune(student, objective, teacher=teacher, samples=samples, seed=seed, run=run, track=track)
        if method.bias_correction:
            few = samples.spread(method.calibration_samples)
            weight = min_snr_weights(few, pipeline.scheduler, method.snr_cap)
            correct_answers(student, teacher, few, weight, batch=method.batch, track=track)
    return student.eval()


def plan(pipeline: DiffusionPipeline, method: str | Method = "lsq", **settings: Any) -> dict[str, tuple[int, int]]:
    """Returns the weight and activation bits that each layer would get, by name; 32 stands for float."""
    method = resolve(method, settings)
    return plan_bits(find_quantizable(pipeline, method).denoiser, method)


def plan_bits(denoiser: nn.Module, method: Method) -> dict[str, Bits]:
    """Returns the weight and activation bits of each layer by name, for a denoiser that the method can quantize."""
    swappable = find_layers(denoiser)  # subclasses of torch's layers, whose forward may differ, stay in float
    bits = method.plan(denoiser).items()
    return {name: pair if name in swappable else (FLOAT_BITS, FLOAT_BITS) for name, pair in bits}


def plan_scheme(pipeline: DiffusionPipeline, method: Method) -> Scheme:
    """How each layer of the result would be stored. What only samples decide (factors of dilation=smooth) is left out."""
    denoiser = find_quantizable(pipeline, method).denoiser
    bits, student = plan_bits(denoiser, method), copy.deepcopy(denoiser)
    method.prepare(student, Clock(torch.arange(method.sampling_steps), LINEAR))
    method.adjust_weights(student)
    scheme = read_scheme(student)
    return replace(scheme, default=FLOAT, overrides={name: _end_at(pair, scheme.layer(name)) for name, pair in bits.items()})


def _end_at(bits: Bits, scheme: LayerScheme) -> LayerScheme:
    """Returns the scheme of a prepared layer at its final bits. Two bases that become one are no bases any more."""
    if bits == FLOAT[:2]:
        return FLOAT
    return LayerScheme(*bits, tuple(trait for trait in scheme.traits if not isinstance(trait, Bases) or bits == scheme[:2]))


def resolve(method: str | Method, settings: Mapping[str, Any]) -> Method:
    """Returns the method with its settings. Raises InputError for an unknown method or setting."""
    if isinstance(method, str):
        return methods.get(method).parse(settings)
    if not isinstance(method, Method):
        raise InputError(f"method must be a name ({', '.join(methods.names())}) or a Method, got {method!r}")
    if settings:
        raise InputError(f"give settings either in the method or by name, not both: {', '.join(settings)}")
    return method


def find_quantizable(pipeline: DiffusionPipeline, method: Method, seed: int = 0) -> Target:
    """Returns the pipeline's target. Raises InputError, before any work, for what cannot be quantized."""
    if not isinstance(pipeline, DiffusionPipeline):
        raise InputError(f"give a diffusers pipeline, as dmquant.load returns it, not {type(pipeline).__name__}")
    target = find_target(pipeline)
    denoiser = target.denoiser
    if getattr(denoiser, "is_quantized", False) or hasattr(denoiser, "dmquant_record"):
        raise InputError("this pipeline is quantized already; quantize the float pipeline that it came from")
    if denoiser.dtype != torch.float32:
        raise InputError(f"the denoiser is in {denoiser.dtype}; load the pipeline in float32 to quantize it")
    if all(bits == (FLOAT_BITS, FLOAT_BITS) for bits in method.plan(denoiser).values()):
        raise InputError("these settings leave every layer in float; lower weight_bits or act_bits, or keep fewer roles")
    if type(seed) is not int or not 0 <= seed < 1 << 63:
        raise InputError(f"seed must be a whole number from 0 to 2^63 - 1, got {seed!r}")
    return target


def list_facts(pipeline: DiffusionPipeline, method: Method, seed: int, conditioning: Conditioning) -> dict[str, Any]:
    """Returns the settings of a run, as JSON values; a saved run is continued only with equal ones."""
    scheduler = {"scheduler": type(pipeline.scheduler).__name__, "schedule": dict(pipeline.scheduler.config)}
    settings = {"method": method.name, "seed": seed, **method.settings()}
    return {**settings, **asdict(conditioning), **scheduler, "device": pipeline.device.type}


def list_tensors(teacher: nn.Module, objective: Denoising | None, samples: Samples | None) -> dict[str, list[Tensor]]:
    """Returns the tensors that a run starts from; a saved run is continued only with equal ones."""
    return {
        "model": list(teacher.state_dict().values()),
        "data": [] if objective is None else [objective.images],
        "samples": [] if samples is None else [samples.x, samples.timestep, samples.target],
    }


def describe_run(pipeline: DiffusionPipeline, method: Method, seed: int) -> dict[str, Any]:
    """Returns the facts about the run that the checkpoint stores."""
    return {
        "method": method.name,
        "settings": method.settings(),
        "seed": seed,
        "weight_bits": method.weight_bits,
        "act_bits": method.act_bits,
        "base_model": _name_base(pipeline),
    }


def count_trained(teacher: nn.Module, student: nn.Module) -> dict[str, Any]:
    """Returns the number of trained parameters, with those of quantizers, and its ratio to the teacher's parameters."""
    trained = sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in teacher.parameters())
    return {"trained_params": trained, "trained_share": round(trained / total, 4)}


def _name_base(pipeline: DiffusionPipeline) -> str | None:
    """Returns the origin of the pipeline: "embedded", a hub id, or an absolute folder; None for one made in memory."""
    name = pipeline.config.get("_name_or_path")
    if name is None or name == EMBEDDED:
        return name
    folder = Path(name).expanduser()
    return str(folder.resolve()) if folder.exists() else name
