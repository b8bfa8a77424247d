"""EfficientDM (He et al., ICLR 2024): trains low-rank adapters that are merged into the weights before rounding."""

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
from dmquant.methods.efficientdm.guided_distillation import make_guided_distillation
from dmquant.methods.efficientdm.qalora import QALoRA, adapted_layers, find_adapters, half_precision_layers, stored_in_half
from dmquant.nn.fake_quant_layers import quantized_layers
from dmquant.nn.scheme import FLOAT_BITS
from dmquant.progress import Track
from dmquant.quantizers.base import Quantizer
from dmquant.quantizers.per_timestep import TemporalStep
from dmquant.quantizers.timestep_clock import Clock, attach_clock
from dmquant.training.objectives import Distillation, Objective
from dmquant.training.resume import Run
from dmquant.training.trainer import Group, fit, quantizer_groups

# Beside 1x1 skips the public code keeps in float: downsamplers ("op"), and attention outside transformers, which uses Conv1d
FLOAT_IN_PAPER = re.compile(r"\bdownsamplers\.\d+\.conv$|\battentions\.\d+\.to_(q|k|v|out\.0)$")
MAX_RATE_FACTOR = 250.0  # limit for short runs: an update of a tenth of the weight's step


@dataclass(frozen=True, kw_only=True)
class EfficientDM(Method):
    """LSQ with low-rank adapters (QALoRA, eq. 6-8), grids per timestep (TALSQ), and distillation after guidance.

    Differs from the public code: adapters are added to the float weights, and short runs have higher rates.
    """

    name: ClassVar[str] = "efficientdm"

    policy: Literal["strict", "paper"] = setting(
        "strict", "strict: every layer is quantized; paper: 1x1 skips, downsamplers and plain attention stay float"
    )
    rank: int = setting(32, "rank of each layer's adapter")
    base: Literal["original", "rounded"] = setting(
        "original", "weights that adapters are added to: the teacher's, or the calibrated and rounded ones (public code)"
    )
    half_base: bool = setting(True, "store the frozen weights in float16 while adapters train")
    scale_aware: bool = setting(True, "adapter rates are proportional to the layer's weight step; false: all are learning_rate")
    adapter_divisor: float = setting(2500.0, "an adapter's AdamW rate is its layer's mean weight step divided by this")
    adapter_steps: int = setting(16000, "run length for these rates; shorter runs have up to 250 times the rate")
    temporal: bool = setting(True, "inputs have a grid per timestep (TALSQ); false: one for all")
    lookup: Literal["nearest", "linear"] = setting("nearest", "grid at an uncalibrated timestep: nearest or interpolated")
    first_grid: Literal["temporal", "static"] = setting("static", "with temporal=false: grid of the first layer's input")
    trajectory: Literal["cached", "sequential"] = setting(
        "cached", "optimiser steps draw recorded calls at random, or follow trajectories, one denoising step each (paper)"
    )
    learning_rate: float = setting(1e-4, "AdamW rate of all adapters with scale_aware=false")
    quantizer_rate: float = setting(5e-3, "AdamW rate of activation scales and zeros, relative to each one's size at the start")
    weight_scale_rate: float = setting(5e-4, "AdamW rate of weight scales, relative to each one's size at the start")
    weight_decay: float = setting(0.01, "AdamW decay of the adapters")
    decay: Literal["linear", "cosine"] = setting("linear", "schedule of the rates, down to zero")

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
        """Returns weight and activation bits by layer; with policy=paper, 32 for layers that the public code skips."""
        plan = super().plan(denoiser)
        if self.policy == "strict":
            return plan
        skipped = [name for name, role in find_roles(denoiser).items() if role == Role.SKIP or FLOAT_IN_PAPER.search(name)]
        return plan | dict.fromkeys(skipped, (FLOAT_BITS, FLOAT_BITS))

    def prepare(self, student: nn.Module, clock: Clock) -> None:
        """Swaps in LSQ's layers, adds an adapter to each weight below 8 bits, and gives each input a grid per timestep.

        Inputs of the time embedding keep one grid: they are functions of the timestep. With policy=paper all layers that are
        kept at 8 bits have one grid too.
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
        """Rounds the base weights to float16 with half_base, before calibration, so that training starts with the same codes."""
        if self.half_base:
            for layer in half_precision_layers(student):
                layer.weight.copy_(layer.weight.half())

    @torch.no_grad()
    def calibrate(self, student: nn.Module, samples: Samples, *, track: Track) -> None:
        """Sets all grids; with base=rounded, rounds the base weights to theirs."""
        super().calibrate(student, samples, track=track)
        if self.base == "rounded":
            for layer in adapted_layers(student):
                layer.weight.copy_(layer.weight_quantizer(layer.weight))

    def finetune(
        self, student: nn.Module, objective: Objective, *, teacher: nn.Module, samples: Samples, seed: int, run: Run, track: Track
    ) -> None:
        """Trains adapters and grids. Weights, biases and norms stay fixed."""
        generator = torch.Generator().manual_seed(seed)
        for adapter in find_adapters(student):
            adapter.initialize(generator)
        with stored_in_half(half_precision_layers(student)) if self.half_base else nullcontext():
            objective, groups = self.choose_objective(objective), self.parameter_groups(student)
            fit(student, objective, self.training(), groups, seed=seed, run=run, track=track)

    def choose_objective(self, objective: Objective) -> Objective:
        """Replaces distillation by guided distillation; an objective on images is returned as it is."""
        if isinstance(objective, Distillation):
            return make_guided_distillation(objective.samples, objective.weight, in_sequence=self.trajectory == "sequential")
        if self.trajectory == "sequential":
            raise InputError("trajectory=sequential trains on recorded trajectories; leave --data out, or set trajectory=cached")
        return objective

    def parameter_groups(self, student: nn.Module) -> list[Group]:
        """Returns the trained parameters with their rates: adapters, weight scales, grids of inputs and attention products."""
        adapters = find_adapters(student)
        of_weights = {part for layer in quantized_layers(student).values() for part in layer.weight_quantizer.modules()}
        grids = [part for part in student.modules() if isinstance(part, Quantizer) and part not in adapters]
        return [
            *(Group([adapter.down, adapter.up], self.adapter_rate(adapter), self.weight_decay) for adapter in adapters),
            *quantizer_groups((grid for grid in grids if grid in of_weights), self.weight_scale_rate),
            *quantizer_groups((grid for grid in grids if grid not in of_weights), self.quantizer_rate),
        ]

    def adapter_rate(self, adapter: QALoRA) -> float:
        """Returns an adapter's rate: its layer's mean weight step / adapter_divisor, more in short runs. EfficientDM, eq. 8.

        Updates then change equal fractions of a step in all layers. The paper scales gradients, to which Adam is invariant.
        """
        if not self.scale_aware:
            return self.learning_rate
        factor = min(max(1.0, self.adapter_steps / max(1, self.max_steps)), MAX_RATE_FACTOR)
        return factor * adapter.mean_step() / self.adapter_divisor
