"""DilateQuant (Liu et al., 2024): weight dilation, a grid per timestep for activations, and block-wise distillation."""

import copy
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from dmquant.diffusion.layer_roles import Role, find_roles
from dmquant.diffusion.trajectories import Samples
from dmquant.errors import InputError
from dmquant.methods.base import Method, setting
from dmquant.methods.dilatequant.block_reconstruction import reconstruct
from dmquant.methods.dilatequant.skip_concat import find_skip_offsets
from dmquant.methods.dilatequant.weight_dilation import describe_dilation, dilate, smooth, wrap_layers
from dmquant.nn.attention import find_attentions
from dmquant.nn.fake_quant_layers import QuantConv1d, QuantConv2d, find_layers, quantized_inputs
from dmquant.nn.scheme import FLOAT_BITS
from dmquant.progress import Track
from dmquant.quantizers.base import Quantizer
from dmquant.quantizers.per_part import Heads, Split
from dmquant.quantizers.per_timestep import TemporalStep
from dmquant.quantizers.timestep_clock import Clock, Timed, attach_clock
from dmquant.training.objectives import Distillation, Objective
from dmquant.training.resume import Run

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class DilateQuant(Method):
    """LSQ with weight dilation (eq. 10-12), grids per timestep (eq. 13-14) and block-wise distillation (eq. 15).

    Differs from the paper: factors are folded into earlier layers where that is exact; `dilation="smooth"` is an alternative.
    """

    name: ClassVar[str] = "dilatequant"

    act_bits: int = setting(4, "bits per activation, 2 to 8; 32 keeps activations in float")
    dilation: Literal["weights", "smooth", "none"] = setting(
        "weights", "factors of input channels: the largest that keep all weight ranges, SmoothQuant's up to those, or none"
    )
    fold: bool = setting(True, "fold factors into earlier layers where that is exact; false: inputs are divided before rounding")
    temporal: bool = setting(True, "inputs and attention products have a grid per timestep (TPQ); false: one for all")
    lookup: Literal["nearest", "linear"] = setting("nearest", "grid at an uncalibrated timestep: nearest or interpolated")
    first_grid: Literal["temporal", "static"] = setting(
        "temporal", "with temporal=false: grid of the first layer's input, per timestep or one for all"
    )
    head_grids: bool = setting(False, "attention products have a grid per head; needs attention_bits below 32")
    split: Literal["skip", "all", "none"] = setting(
        "skip", "convolutions in up blocks with a grid for each part of a concatenated input: 1x1 shortcuts, all, or none"
    )
    scope: Literal["block", "model"] = setting("block", "train one block after the other (BKD), or the whole model at once")
    max_steps: int = setting(400, "optimiser steps per block, or of the model with scope=model; 0 only calibrates")
    batch: int = setting(8, "samples per optimiser step")
    learning_rate: float = setting(2e-4, "AdamW rate of weights, biases and norms, decaying to zero along a cosine")
    block_samples: int = setting(768, "recorded samples, drawn at random, to train blocks on")
    cache_gib: float = setting(6.0, "GiB on disk: half for a block's inputs and targets, half for outputs of finished blocks")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_grids and self.attention_bits == FLOAT_BITS:
            raise ValueError("head_grids needs quantized attention products; set attention_bits to 2 to 8 too")
        if self.block_samples < 1:
            raise ValueError(f"block_samples must be at least 1, got {self.block_samples}")
        if not 0 < self.cache_gib < math.inf:
            raise ValueError(f"cache_gib must be above 0, got {self.cache_gib}")

    def notes(self, denoiser: nn.Module) -> dict[str, str]:
        """Returns how many channels of each layer are dilated; with dilation=smooth, which needs samples, an upper limit."""
        swappable = find_layers(denoiser)
        names = [name for name, bits in self.plan(denoiser).items() if name in swappable and max(bits) < FLOAT_BITS]
        if self.dilation == "none":
            return {}
        counts = describe_dilation(denoiser, names, fold=self.fold)
        return counts if self.dilation == "weights" else {name: f"at most {text}" for name, text in counts.items()}

    def prepare(self, student: nn.Module, clock: Clock) -> None:
        """Swaps in LSQ's layers, adds grids per timestep, splits concatenated inputs, and wraps layers for dilation.

        Inputs of the time embedding keep one grid: they are functions of the timestep.
        """
        roles, clock = find_roles(student), Clock(clock.timesteps, self.lookup)
        offsets = find_skip_offsets(student, which=self.split)
        super().prepare(student, clock)
        for name, reader in quantized_inputs(student).items():
            quantizer = reader.input_quantizer
            if not isinstance(quantizer, Quantizer):
                continue
            if self.temporal and roles.get(name) != Role.TIME_EMBEDDING:
                device = next(quantizer.parameters()).device
                quantizer = TemporalStep(quantizer.bits, clock).to(device)
            if name in offsets and isinstance(reader, QuantConv1d | QuantConv2d):
                sizes = (offsets[name], reader.in_channels - offsets[name])
                quantizer = Split(_repeat(quantizer, 2), sizes)
            reader.input_quantizer = quantizer
        if self.head_grids:
            for attention in find_attentions(student).values():
                for factor in quantized_inputs(attention.processor).values():
                    if isinstance(factor.input_quantizer, Quantizer):
                        factor.input_quantizer = Heads(_repeat(factor.input_quantizer, attention.heads))
        if self.dilation != "none":
            wrap_layers(student)
        if any(isinstance(module, Timed) for module in student.modules()):
            attach_clock(clock, student)

    def adjust_weights(self, student: nn.Module) -> None:
        """Dilates the weights with dilation=weights."""
        if self.dilation == "weights":
            dilate(student, fold=self.fold)

    def calibrate(self, student: nn.Module, samples: Samples, *, track: Track) -> None:
        """Sets smoothing factors, then all grids, which depend on the dilated weights and divided inputs."""
        if self.dilation == "smooth":
            smooth(student, samples.spread(self.calibration_samples), batch=self.batch, fold=self.fold)
        super().calibrate(student, samples, track=track)

    def finetune(
        self, student: nn.Module, objective: Objective, *, teacher: nn.Module, samples: Samples, seed: int, run: Run, track: Track
    ) -> None:
        """Trains the weights, biases, norms and grids of one block after the other."""
        if self.scope == "model" or self.max_steps == 0:
            super().finetune(student, objective, teacher=teacher, samples=samples, seed=seed, run=run, track=track)
            return
        if not isinstance(objective, Distillation):
            raise InputError("scope=block trains on recorded samples of the teacher; leave --data out, or set scope=model")
        few = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))[: self.block_samples]
        reconstruct(
            student, teacher, objective.samples[few], objective.weight[few], self.training(),
            cache_bytes=int(self.cache_gib * GIB), seed=seed, run=run, track=track,
        )  # fmt: skip


def _repeat(quantizer: Quantizer, count: int) -> list[Quantizer]:
    """Returns the quantizer and count - 1 copies of it."""
    return [quantizer, *(copy.deepcopy(quantizer) for _ in range(count - 1))]
