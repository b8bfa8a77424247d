"""EfficientDM (He et al., ICLR 2024): what full training gives at less cost, by adapters that are merged before rounding."""

import math
import re
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from dmquant.diffusion.layer_roles import Role, find_roles
from dmquant.diffusion.trajectories import Samples
from dmquant.errors import InputError
from dmquant.methods.base import Method, setting
from dmquant.methods.efficientdm.guided_distillation import follow
from dmquant.methods.efficientdm.qalora import QALoRA, adapted_layers, adapters_of, halved, light_layers
from dmquant.nn.fake_quant_layers import quantized_layers
from dmquant.nn.scheme import FLOAT_BITS
from dmquant.progress import Track
from dmquant.quantizers.base import Quantizer
from dmquant.quantizers.per_timestep import TemporalStep
from dmquant.quantizers.timestep_clock import Clock, attach_clock
from dmquant.training.objectives import Distillation, Objective
from dmquant.training.resume import Run
from dmquant.training.trainer import Group, fit, quantizer_groups

# Beside 1x1 skips the public code leaves in float: downsamplers ("op"), and plain attention, whose projections are Conv1d there
LEFT_BY_PAPER = re.compile(r"\bdownsamplers\.\d+\.conv$|\battentions\.\d+\.to_(q|k|v|out\.0)$")
LONGEST_STRIDE = 250.0  # times the paper's rate, in short runs: a tenth of a step of the weight's grid


@dataclass(frozen=True, kw_only=True)
class EfficientDM(Method):
    name: ClassVar[str] = "efficientdm"

    policy: Literal["strict", "paper"] = setting(
        "strict", "strict: every layer is quantized; paper: 1x1 skips, downsamplers and plain attention stay float"
    )
    rank: int = setting(32, "rank of each layer's adapter")
    base: Literal["original", "rounded"] = setting(
        "original", "what adapters are added to: the teacher's weights, or those as calibrated and rounded (public code)"
    )
    half_base: bool = setting(True, "the frozen weights wait in float16 while adapters train")
    scale_aware: bool = setting(True, "each adapter's rate follows its layer's weight steps; false: all have learning_rate")
    adapter_divisor: float = setting(2500.0, "an adapter's AdamW rate is its layer's mean weight step over this")
    adapter_steps: int = setting(16000, "run length that this belongs to; shorter runs stride up to 250 times as far")
    temporal: bool = setting(True, "inputs have a grid per timestep (TALSQ); false: one for all")
    lookup: Literal["nearest", "linear"] = setting("nearest", "grid at an uncalibrated timestep: the nearest, or a mean of two")
    first_grid: Literal["temporal", "static"] = setting("static", "with temporal=false: the grid of the first layer's input")
    trajectory: Literal["cached", "sequential"] = setting(
        "cached", "optimiser steps draw any recorded calls, or go along trajectories, one denoising step each (paper)"
    )
    learning_rate: float = setting(1e-4, "AdamW rate of all adapters with scale_aware=false")
    quantizer_rate: float = setting(5e-3, "AdamW rate of activation scales and zeros, relative to each one's size at the start")
    weight_scale_rate: float = setting(5e-4, "AdamW rate of weight scales, relative to each one's size at the start")
    weight_decay: float = setting(0.01, "AdamW decay of the adapters")
    decay: Literal["linear", "cosine"] = setting("linear", "how rates fall to zero")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank", "adapter_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.adapter_divisor < math.inf:
            raise ValueError(f"adapter_divisor must be above 0, got {self.adapter_divisor}")
        if not 0 <= self.weight_scale_rate < math.inf:
            raise ValueError(f"weight_scale_rate must be 0 or more, got {self.weight_scale_rate}")

    def plan(self, denoiser: nn.Module) -> dict[str, tuple[int, int]]:
        plan = super().plan(denoiser)
        if self.policy == "strict":
            return plan
        left = [name for name, role in find_roles(denoiser).items() if role == Role.SKIP or LEFT_BY_PAPER.search(name)]
        return plan | dict.fromkeys(left, (FLOAT_BITS, FLOAT_BITS))

    def prepare(self, student: nn.Module, clock: Clock) -> None:
        """LSQ's layers; then an adapter for each weight that is not kept at 8 bits, and a grid per timestep for each input.

        The time embedding's inputs follow from the timestep alone and keep one grid; under policy "paper" so do all layers
        kept at 8 bits.
        """
        roles, clock = find_roles(student), Clock(clock.timesteps, self.lookup)
        super().prepare(student, clock)
        is_static = (Role.TIME_EMBEDDING,) if self.policy == "strict" else self.eight_bit
        layers = quantized_layers(student)
        for name, layer in layers.items():
            if isinstance(layer.weight_quantizer, Quantizer) and roles[name] not in self.eight_bit:
                adapted = QALoRA(layer.weight_quantizer, layer.weight.shape, self.rank)
                layer.weight_quantizer = adapted.to(layer.weight.device)
            if self.temporal and isinstance(layer.input_quantizer, Quantizer) and roles[name] not in is_static:
                layer.input_quantizer = TemporalStep(layer.input_quantizer.bits, clock).to(layer.weight.device)
        if any(isinstance(layer.input_quantizer, TemporalStep) for layer in layers.values()):
            attach_clock(clock, student)

    @torch.no_grad()
    def adjust_weights(self, student: nn.Module) -> None:
        if self.half_base:
            for layer in light_layers(student):
                layer.weight.copy_(layer.weight.half())  # now, so that no code changes when training begins

    @torch.no_grad()
    def calibrate(self, student: nn.Module, samples: Samples, *, track: Track) -> None:
        super().calibrate(student, samples, track=track)
        if self.base == "rounded":
            for layer in adapted_layers(student):
                layer.weight.copy_(layer.weight_quantizer(layer.weight))

    def finetune(
        self, student: nn.Module, objective: Objective, *, teacher: nn.Module, samples: Samples, seed: int, run: Run, track: Track
    ) -> None:
        """Trains adapters and grids; weights, biases and norms stay."""
        generator = torch.Generator().manual_seed(seed)
        for adapter in adapters_of(student):
            adapter.start(generator)
        with halved(light_layers(student)) if self.half_base else nullcontext():
            fit(student, self.follow(objective), self.training(), self.groups(student), seed=seed, run=run, track=track)

    def follow(self, objective: Objective) -> Objective:
        """The objective along trajectories and under guidance; one on images stays as it is."""
        if isinstance(objective, Distillation):
            return follow(objective.samples, objective.weight, in_sequence=self.trajectory == "sequential")
        if self.trajectory == "sequential":
            raise InputError("trajectory=sequential follows recorded trajectories; leave --data out, or set trajectory=cached")
        return objective

    def groups(self, student: nn.Module) -> list[Group]:
        """What is trained and at which rate: adapters, weight scales, grids of inputs and attention products."""
        adapters = adapters_of(student)
        of_weights = {part for layer in quantized_layers(student).values() for part in layer.weight_quantizer.modules()}
        grids = [part for part in student.modules() if isinstance(part, Quantizer) and part not in adapters]
        return [
            *(Group([adapter.down, adapter.up], self.adapter_rate(adapter), self.weight_decay) for adapter in adapters),
            *quantizer_groups((grid for grid in grids if grid in of_weights), self.weight_scale_rate),
            *quantizer_groups((grid for grid in grids if grid not in of_weights), self.quantizer_rate),
        ]

    def adapter_rate(self, adapter: QALoRA) -> float:
        """A share of the layer's mean weight step, so that the update crosses steps alike in all layers. EfficientDM, eq. 8.

        As a rate: Adam would divide a factor on the gradient out again.
        """
        if not self.scale_aware:
            return self.learning_rate
        stride = min(max(1.0, self.adapter_steps / max(1, self.max_steps)), LONGEST_STRIDE)
        return stride * adapter.mean_step() / self.adapter_divisor
