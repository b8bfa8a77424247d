"""The story: record the teacher, prepare the student, calibrate it, fine-tune it."""

import copy
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from dmquant import methods
from dmquant.clock import Clock
from dmquant.denoiser import find_denoiser, find_roles, with_denoiser
from dmquant.denoising import Denoising, open_denoising
from dmquant.distill import Distillation
from dmquant.errors import InputError
from dmquant.generation import Conditioning
from dmquant.methods.base import Method
from dmquant.progress import Track, plain
from dmquant.runs import Run
from dmquant.samples import Samples, record


def quantize(
    pipeline: DiffusionPipeline, method: str | Method = "lsq", *, seed: int = 0, data: str | Path | None = None,
    conditioning: Conditioning = Conditioning(), samples: Samples | None = None, run: Run = Run(), track: Track = plain,
    **settings: Any,
) -> DiffusionPipeline:
    """A pipeline like the one given with a quantized, fine-tuned denoiser; the one given is left as it is.

    `method` is a name with its `settings` (weight_bits=4, act_bits=8, ...) or a Method. `data` names images to train on
    instead of the teacher's own samples; `samples` is a recording to share between methods; `run`, a SavedRun, survives
    interruption. Raises InputError for what cannot be quantized as asked.
    """
    method = resolve(method, settings)
    name, teacher = find_denoiser(pipeline)
    refuse_quantized(teacher)
    objective = None if data is None else open_denoising(pipeline, data)
    facts = {"method": method.name, "seed": seed, "device": pipeline.device.type, **asdict(conditioning), **method.settings()}
    run.open(facts, list_tensors(teacher, objective, samples))
    if samples is None:
        how = {"steps": method.sampling_steps, "seed": seed, "conditioning": conditioning}
        samples = run.recall(lambda: record(pipeline, method.trajectories, **how, track=track))
    student = copy.deepcopy(teacher)
    method.prepare(student, Clock(samples.timestep.unique().flip(0)))
    method.calibrate(student, samples, track=track)
    method.finetune(student, objective or Distillation(samples), seed=seed, run=run, track=track)
    student.dmquant_record = describe_run(pipeline, method, seed)
    return with_denoiser(pipeline, name, student.eval().requires_grad_(False))


def plan(pipeline: DiffusionPipeline, method: str | Method = "lsq", **settings: Any) -> dict[str, tuple[int, int]]:
    """Weight and activation bits that each layer would get, by name; 32 means it stays in float."""
    method, denoiser = resolve(method, settings), find_denoiser(pipeline)[1]
    refuse_quantized(denoiser)
    return {name: method.bits(role) for name, role in find_roles(denoiser).items()}


def resolve(method: str | Method, settings: Mapping[str, Any]) -> Method:
    """The method with its settings, validated."""
    if isinstance(method, str):
        return methods.get(method).parse(settings)
    if settings:
        raise InputError(f"give settings either in the method or by name, not both: {', '.join(settings)}")
    return method


def refuse_quantized(denoiser: nn.Module) -> None:
    if getattr(denoiser, "is_quantized", False) or hasattr(denoiser, "dmquant_record"):
        raise InputError("this pipeline is quantized already; quantize the float pipeline that it came from")


def list_tensors(teacher: nn.Module, objective: Denoising | None, samples: Samples | None) -> dict[str, list[Tensor]]:
    """What a run starts from, beside its settings."""
    return {
        "model": list(teacher.state_dict().values()),
        "data": [] if objective is None else [objective.images],
        "samples": [] if samples is None else [samples.x, samples.timestep, samples.target],
    }


def describe_run(pipeline: DiffusionPipeline, method: Method, seed: int) -> dict[str, Any]:
    """What a checkpoint records of how it was made."""
    return {
        "method": method.name, "settings": method.settings(), "seed": seed,
        "weight_bits": method.weight_bits, "act_bits": method.act_bits, "base_model": pipeline.config.get("_name_or_path"),
    }
