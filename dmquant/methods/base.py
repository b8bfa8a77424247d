"""Base class of the methods: a frozen dataclass of settings with the steps of a run. The base implements plain LSQ."""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self, get_args

from pydantic import TypeAdapter, ValidationError
from torch import nn

from dmquant.diffusion.layer_roles import Role, find_roles
from dmquant.diffusion.trajectories import Samples
from dmquant.errors import InputError
from dmquant.nn.attention import find_attentions, quantize_products
from dmquant.nn.fake_quant_layers import Layer, quantized_layers, swap
from dmquant.nn.scheme import FLOAT_BITS
from dmquant.progress import Track
from dmquant.quantizers.base import Quantizer
from dmquant.quantizers.binary import Binary
from dmquant.quantizers.per_timestep import TemporalStep
from dmquant.quantizers.timestep_clock import Clock, attach_clock
from dmquant.quantizers.uniform import LearnedStep
from dmquant.training.calibration import correct_biases, observe_inputs, observe_weights
from dmquant.training.objectives import Objective
from dmquant.training.resume import Run
from dmquant.training.trainer import Training, fit

FIRST_LAST_BITS = 8


def setting(default: Any, text: str) -> Any:
    """Returns a dataclass field with the help text that the command line shows."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Setting:
    """Describes one setting of a method, for help and `dmquant methods NAME`."""

    name: str
    type: str
    default: Any
    help: str


@dataclass(frozen=True, kw_only=True)
class Method:
    """Settings of a run, and its steps. A subclass adds fields and overrides the steps in which it differs from LSQ."""

    name: ClassVar[str]

    weight_bits: int = setting(4, "bits per weight, 1 to 8; 32 keeps weights in float")
    act_bits: int = setting(8, "bits per activation, 2 to 8; 32 keeps activations in float")
    attention_bits: int = setting(32, "bits per query, key, value and attention probability, 2 to 8; 32 keeps products in float")
    eight_bit: tuple[Role, ...] = setting((Role.FIRST, Role.LAST, Role.TIME_EMBEDDING), "roles kept at 8 bits")
    first_grid: Literal["temporal", "static"] = setting(
        "temporal", "grid of the first layer's input; temporal: one per timestep, static: one for all"
    )
    keep: tuple[Role, ...] = setting((), "roles left in float")
    trajectories: int = setting(256, "teacher trajectories to record")
    sampling_steps: int = setting(20, "denoising steps of each recorded trajectory")
    eta: float = setting(0.0, "noise added in each recorded step, for samplers with eta: 0 adds none, 1 as in EfficientDM")
    calibration_samples: int = setting(128, "recorded samples for setting the grids")
    bias_correction: bool = setting(
        True, "correct biases for the mean rounding error of each channel, and the last bias again after training"
    )
    max_steps: int = setting(600, "optimiser steps of fine-tuning; 0 only calibrates")
    batch: int = setting(16, "samples per optimiser step")
    clip_images: int = setting(
        32, "recorded trajectories whose images set the sampler's clip range, if it has one; 0 keeps the range"
    )
    snr_cap: float = setting(5.0, "a recorded sample has weight min(SNR, cap) / SNR in the loss (Min-SNR)")
    learning_rate: float = setting(1e-4, "AdamW rate of weights, biases and norms, decaying to zero along a cosine")
    quantizer_rate: float = setting(5e-3, "AdamW rate of scales and offsets, relative to their initial size")
    weight_decay: float = setting(0.0, "AdamW decay of the weights")
    clip_norm: float = setting(1.0, "largest gradient norm; larger ones are scaled down")
    ema_decay: float = setting(0.0, "decay of a moving average of the float weights; 0: no average")
    precision: Literal["no", "bf16"] = setting("no", "mixed precision of fine-tuning")

    def __post_init__(self) -> None:
        for name, least in (("weight_bits", 1), ("act_bits", 2), ("attention_bits", 2)):
            bits = getattr(self, name)
            if type(bits) is not int:
                raise ValueError(f"{name} must be a whole number, got {bits!r}")
            if bits != FLOAT_BITS and not least <= bits <= 8:
                raise ValueError(f"{name} must be {least} to 8, or 32 for float, got {bits}")
        for name in ("trajectories", "sampling_steps", "calibration_samples", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "quantizer_rate", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("snr_cap", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 (a large number switches it off), got {getattr(self, name)}")
        for name in ("max_steps", "clip_images"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be in [0, 1], got {self.eta}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")

    @classmethod
    def parse(cls, settings: Mapping[str, Any]) -> Self:
        """Returns a validated method from names and values, which may be strings. Raises InputError with a hint."""
        known = {f.name: f for f in dataclasses.fields(cls)}
        for key in settings:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
                raise InputError(f"{cls.name} has no setting {key!r}; {hint}")
        values = {key: _parse_value(value, known[key]) for key, value in settings.items()}
        try:
            return TypeAdapter(cls).validate_python(values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "settings"
            raise InputError(f"{cls.name}: {where}: {first['msg'].removeprefix('Value error, ')}") from error

    @classmethod
    def describe(cls) -> list[Setting]:
        """Returns a description of each setting, in the order of the fields."""
        return [Setting(f.name, _type_name(f), f.default, f.metadata["help"]) for f in dataclasses.fields(cls)]

    def settings(self) -> dict[str, Any]:
        """Returns all settings as JSON values, which are stored with a run and accepted by `parse`."""
        return TypeAdapter(type(self)).dump_python(self, mode="json")

    # Bits and quantizers of the layers

    def bits(self, role: Role) -> tuple[int, int]:
        """Returns weight and activation bits of a layer with this role; 32 means float."""
        if role in self.keep:
            return FLOAT_BITS, FLOAT_BITS
        if role not in self.eight_bit:
            return self.weight_bits, self.act_bits
        weight_bits, act_bits = (bits if bits == FLOAT_BITS else FIRST_LAST_BITS for bits in (self.weight_bits, self.act_bits))
        return weight_bits, act_bits

    def plan(self, denoiser: nn.Module) -> dict[str, tuple[int, int]]:
        """Returns weight and activation bits of every layer, by name."""
        return {name: self.bits(role) for name, role in find_roles(denoiser).items()}

    def notes(self, denoiser: nn.Module) -> dict[str, str]:
        """Returns texts about layers of a float denoiser, by name, which a dry run shows beside their bits."""
        return {}

    def weight_quantizer(self, layer: Layer, bits: int) -> nn.Module:
        """Returns an LSQ quantizer with a step per output channel; for one bit, a sign and a scale; for 32 bits, the identity.

        A symmetric one-bit grid would be {-s, 0}.
        """
        if bits == FLOAT_BITS:
            return nn.Identity()
        num_channels, ndim = layer.weight.shape[0], layer.weight.ndim
        if bits == 1:
            return Binary(num_channels=num_channels, ndim=ndim)
        return LearnedStep(bits, num_channels=num_channels, ndim=ndim)

    def input_quantizer(self, layer: Layer, bits: int, clock: Clock) -> nn.Module:
        """Returns an LSQ+ quantizer with one grid for the whole tensor; for 32 bits, the identity."""
        return nn.Identity() if bits == FLOAT_BITS else LearnedStep(bits, symmetric=False)

    # Steps of a run, in order

    def prepare(self, student: nn.Module, clock: Clock) -> None:
        """Replaces layers by quantized ones, in place. It reads shapes only, so that it works on the meta device."""
        plan = self.plan(student)

        def choose(name: str, layer: Layer) -> tuple[nn.Module, nn.Module] | None:
            weight_bits, act_bits = plan[name]
            if weight_bits == act_bits == FLOAT_BITS:
                return None
            return self.weight_quantizer(layer, weight_bits), self.input_quantizer(layer, act_bits, clock)

        swap(student, choose)
        if self.first_grid == "temporal":
            self.make_first_input_temporal(student, clock)
        if self.attention_bits != FLOAT_BITS:
            if not find_attentions(student):
                kind = type(student).__name__
                raise InputError(f"attention_bits: {kind} has no attention products that dmquant can quantize; leave it at 32")
            quantize_products(student, lambda heads: LearnedStep(self.attention_bits, symmetric=False))

    def make_first_input_temporal(self, student: nn.Module, clock: Clock) -> None:
        """Gives the input of the first layer a grid per timestep, in place.

        One grid that spans the noise of the first steps is too coarse for the nearly clean images of the last steps.
        """
        roles = find_roles(student)
        for name, layer in quantized_layers(student).items():
            if roles[name] == Role.FIRST and isinstance(layer.input_quantizer, Quantizer):
                layer.input_quantizer = TemporalStep(layer.input_quantizer.bits, clock).to(layer.weight.device)
                attach_clock(clock, student)

    def adjust_weights(self, student: nn.Module) -> None:
        """Changes the weights in place, from their values alone. Called by `calibrate` before grids are set, and by plans."""

    def calibrate(self, student: nn.Module, samples: Samples, *, track: Track) -> None:
        """Sets the grids of weights and inputs from values, and corrects biases, in place."""
        self.adjust_weights(student)
        few = samples.spread(self.calibration_samples)
        observe_weights(student)
        observe_inputs(student, few, batch=self.batch, track=track)
        if self.bias_correction:
            correct_biases(student, few, batch=self.batch, track=track)

    def finetune(
        self, student: nn.Module, objective: Objective, *, teacher: nn.Module, samples: Samples, seed: int, run: Run, track: Track
    ) -> None:
        """Trains weights and grids together, in place."""
        fit(student, objective, self.training(), seed=seed, run=run, track=track)

    def training(self) -> Training:
        """Returns the training settings, which are fields of the method with the same names."""
        shared = {f.name for f in dataclasses.fields(Training)} & {f.name for f in dataclasses.fields(self)}
        return Training(**{name: getattr(self, name) for name in shared})


def _parse_value(value: Any, known: dataclasses.Field[Any]) -> Any:
    """Splits comma-separated text for settings that are lists, and turns booleans into text where they are not valid."""
    if isinstance(value, bool) and known.type is not bool:
        return str(value)
    if isinstance(value, str) and isinstance(known.default, tuple):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _type_name(known: dataclasses.Field[Any]) -> str:
    if isinstance(known.default, tuple):
        return "roles"
    choices = get_args(known.type)
    return " | ".join(map(str, choices)) if choices else getattr(known.type, "__name__", str(known.type))
