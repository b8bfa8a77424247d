"""Calibration: sets the grids of weights from the weights, and the grids of inputs and the biases from recorded samples."""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dmquant.diffusion.layer_roles import Role, find_roles
from dmquant.diffusion.trajectories import Samples
from dmquant.nn.fake_quant_layers import QuantLayer, bypassed, quantized_inputs, quantized_layers
from dmquant.progress import Track, plain
from dmquant.quantizers.base import Quantizer

VALUES_PER_SAMPLE = 2048  # values drawn at random from each sample of a layer's input; its extremes are added


@torch.no_grad()
def observe_weights(student: nn.Module) -> None:
    """Sets the grid of every quantized weight from its values."""
    for layer in quantized_layers(student).values():
        if isinstance(layer.weight_quantizer, Quantizer):
            layer.weight_quantizer.observe(layer.weight)


def observe_inputs(student: nn.Module, samples: Samples, *, batch: int, track: Track = plain) -> None:
    """Sets the grid of every input quantizer from the inputs that its layer or product has when the student runs in float.

    The student's clock, if it has one, is set to the timesteps of the samples, so that a grid per timestep sets its rows.
    """
    collectors: list[Collector] = []
    with ExitStack() as hooks:
        for reader in quantized_inputs(student).values():
            if isinstance(reader.input_quantizer, Quantizer):
                collectors.append(Collector(len(collectors), reader.input_quantizer))
                hooks.callback(reader.register_forward_pre_hook(collectors[-1].note).remove)
        run_float(student, track(samples.split(batch), "calibrate"))
    clock = getattr(student, "clock", None)
    with nullcontext() if clock is None else clock.at(samples.timestep, len(samples)):
        for collector in collectors:
            for quantizer, rows in collector.rows.items():  # a layer that never runs has no rows and needs no grid
                quantizer.observe(torch.cat(rows))


@torch.no_grad()
def correct_biases(student: nn.Module, samples: Samples, *, batch: int, track: Track = plain) -> None:
    """Adds to every bias the mean that rounding takes from its output channel. Nagel et al., 2019, sec. 4.2.

    Each layer is measured on the inputs that it has in the float model. A constant error of the denoiser's output adds up over
    the sampling steps; an error with zero mean does not.
    """
    meters = [(layer, Shortfall(layer)) for layer in quantized_layers(student).values() if layer.bias is not None]
    with ExitStack() as hooks:
        for layer, meter in meters:
            hooks.callback(layer.register_forward_hook(meter.note).remove)
        run_float(student, track(samples.split(batch), "correct biases"))
    for layer, meter in meters:
        layer.get_parameter("bias").add_(meter.mean().float())


@torch.no_grad()
def correct_answers(
    student: nn.Module, teacher: nn.Module, samples: Samples, weight: Tensor, *, batch: int, track: Track = plain
) -> None:
    """Subtracts from the bias of each last layer the mean difference of its output from the teacher's.

    The mean is weighted by `weight` (N,), one value per sample. Training leaves a small difference, which shows in images as a
    colour cast.
    """
    names = [name for name, role in find_roles(student).items() if role == Role.LAST]
    pairs = [(student.get_submodule(name), teacher.get_submodule(name)) for name in names]
    means = [(Mean(ours), Mean(theirs)) for ours, theirs in pairs if getattr(ours, "bias", None) is not None]
    device, meters = next(student.parameters()).device, [mean for pair in means for mean in pair]
    with ExitStack() as hooks:
        for mean in meters:
            hooks.callback(mean.layer.register_forward_hook(mean.note).remove)
        for part, counts in track(list(zip(samples.split(batch), weight.split(batch))), "correct answers"):
            for mean in meters:
                mean.weight = counts.to(device)
            for network in (student, teacher):
                part.on(device).call(network)
    for ours, theirs in means:
        bias = ours.layer.get_parameter("bias")
        bias.sub_((ours.value() - theirs.value()).to(bias.dtype))


@torch.no_grad()
def run_float(student: nn.Module, parts: Iterable[Samples]) -> None:
    """Runs the student in float on batches of samples, so that hooks get the inputs and outputs of its layers."""
    device = next(student.parameters()).device
    with bypassed(student):
        for part in parts:
            part.on(device).call(student)


class Collector:
    """A forward pre-hook that collects, for each grid of a quantizer, random values and the extremes of each sample: (N, k)."""

    def __init__(self, seed: int, quantizer: Quantizer):
        self._quantizer = quantizer  # the layer's own one is bypassed while the student runs in float
        self._generator = torch.Generator().manual_seed(seed)
        self.rows: dict[Quantizer, list[Tensor]] = defaultdict(list)

    def note(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        for quantizer, part in self._quantizer.leaves(args[0].detach().float()):
            flat = part.flatten(1)
            index = torch.randint(flat.shape[1], (min(VALUES_PER_SAMPLE, flat.shape[1]),), generator=self._generator)
            extremes = torch.stack(torch.aminmax(flat, dim=1), 1)
            self.rows[quantizer].append(torch.cat([flat[:, index.to(flat.device)], extremes], 1))


class Mean:
    """A forward hook that computes the weighted mean of a layer's output over samples and positions: (C,)."""

    def __init__(self, layer: nn.Module):
        self.layer, self.weight, bias = layer, torch.ones(0), layer.get_parameter("bias")
        self._sum, self._total = torch.zeros(len(bias), dtype=torch.float64, device=bias.device), 0.0

    def note(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        rows = output if isinstance(layer, nn.Linear) else output.movedim(1, -1)
        each = rows.flatten(1, -2).mean(1, dtype=torch.float64)  # (B, C)
        self._sum += (self.weight.unsqueeze(1) * each).sum(0)
        self._total += float(self.weight.sum())

    def value(self) -> Tensor:
        return self._sum / (self._total or 1.0)


class Shortfall:
    """A forward hook that computes the mean of float output minus quantized output over samples and positions: (C,)."""

    def __init__(self, layer: QuantLayer):
        self._layer, bias = copy.copy(layer), layer.get_parameter("bias")
        self._layer.__dict__["_modules"] = dict(layer._modules)  # the copy keeps its quantizers; those of the layer are bypassed
        self._sum, self._count = torch.zeros(len(bias), dtype=torch.float64, device=bias.device), 0

    def note(self, layer: QuantLayer, args: tuple[Any, ...], output: Tensor) -> None:
        forward: Callable[..., Tensor] = type(layer).forward  # not a call: the copy shares the layer's hooks
        lost = output - forward(self._layer, *args)
        rows = lost.flatten(0, -2) if isinstance(layer, nn.Linear) else lost.movedim(1, -1).flatten(0, -2)
        self._sum += rows.sum(0, dtype=torch.float64)
        self._count += len(rows)

    def mean(self) -> Tensor:
        return self._sum / max(1, self._count)  # 0 for a layer that never ran
