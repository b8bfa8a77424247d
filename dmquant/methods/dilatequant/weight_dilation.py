"""Weight dilation: scales up input channels of a weight as far as the range of every output channel stays the same.

The input is divided by the same factors, so that the activation grid covers a smaller range. DilateQuant (Liu et al., 2024).
"""

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from dmquant.diffusion.trajectories import Samples
from dmquant.methods.dilatequant.scale_folding import apply_fold, find_folds, share_factors
from dmquant.nn.fake_quant_layers import QuantLayer, find_layers, quantized_layers
from dmquant.quantizers.base import Quantizer
from dmquant.quantizers.dilated import DilatedInput, DilatedWeight
from dmquant.training.calibration import run_float

MAX_FACTOR = 1024.0  # limit for channels of tiny weights, whose factors would otherwise be arbitrarily large


def dilation_factors(weight: Tensor, groups: int = 1) -> Tensor:
    """Returns the largest factor (C,) >= 1 of each input channel that keeps the range of every output channel.

    Ranges include zero. factor = min over output channels of top / w for w > 0 and of bottom / w for w < 0: DilateQuant,
    eq. 10-12. Channels that contain a top or a bottom get 1 by the same formula. Channels of zeros get 1.

    Args:
        weight: Weight (O, C / groups, ...) of a linear or convolutional layer.
    """
    rows = weight.detach().reshape(groups, len(weight) // groups, weight.shape[1], -1)  # (G, O / G, C / G, taps)
    rows = rows if rows.dtype == torch.float64 else rows.float()
    top, bottom = rows.amax((2, 3)).clamp(min=0), rows.amin((2, 3)).clamp(max=0)
    highest, lowest = rows.amax(3), rows.amin(3)
    upwards = torch.where(highest > 0, top.unsqueeze(2) / highest, torch.inf)
    downwards = torch.where(lowest < 0, bottom.unsqueeze(2) / lowest, torch.inf)
    factor = torch.minimum(upwards, downwards).amin(1).flatten()
    # one float step down: if the quotient was rounded up, the product could exceed the range
    bounded = torch.nextafter(factor, torch.zeros_like(factor)).clamp(1, MAX_FACTOR)
    return torch.where(factor.isinf(), 1.0, bounded)


def smoothing_factors(weight: Tensor, magnitude: Tensor, groups: int = 1) -> Tensor:
    """Returns SmoothQuant's factors (C,), limited to between 1 and the dilation factors.

    factor = sqrt(max |x| / max |w|) divided by its median over channels: Xiao et al., 2023, eq. 4 with alpha 0.5. The limits
    are not in that paper; they keep the range of every output channel as DilateQuant does.

    Args:
        weight: Weight (O, C / groups, ...) of the layer.
        magnitude: Largest |x| (C,) of each input channel.
    """
    limit = dilation_factors(weight, groups)
    rows = weight.detach().reshape(groups, len(weight) // groups, weight.shape[1], -1)
    largest = rows.abs().amax((1, 3)).flatten()
    wish = (magnitude / largest.clamp(min=torch.finfo(largest.dtype).tiny)).sqrt()
    return torch.minimum((wish / wish.median()).nan_to_num(nan=1.0).clamp(min=1), limit)


def wrap_layers(student: nn.Module) -> None:
    """Makes all layers with quantized weights and inputs dilatable: wraps their quantizers in place, with factors of 1."""
    for layer in quantized_layers(student).values():
        if not isinstance(layer.weight_quantizer, Quantizer) or not isinstance(layer.input_quantizer, Quantizer):
            continue
        groups, device = getattr(layer, "groups", 1), layer.weight.device
        channels, trailing = layer.weight.shape[1] * groups, layer.weight.ndim - 2
        layer.weight_quantizer = DilatedWeight(layer.weight_quantizer, channels, groups).to(device)
        layer.input_quantizer = DilatedInput(layer.input_quantizer, channels, trailing).to(device)


def dilated_layers(student: nn.Module) -> dict[str, QuantLayer]:
    """Returns the layers that `wrap_layers` has wrapped, by name, in module order."""
    return {name: layer for name, layer in quantized_layers(student).items() if isinstance(layer.weight_quantizer, DilatedWeight)}


def dilate(student: nn.Module, *, fold: bool) -> None:
    """Sets the dilation factors of every wrapped layer from its weight. With `fold` they are folded where that is exact."""
    layers = dilated_layers(student)
    factors = {name: dilation_factors(layer.weight, getattr(layer, "groups", 1)) for name, layer in layers.items()}
    apply_factors(student, factors, fold=fold)


def smooth(student: nn.Module, samples: Samples, *, batch: int, fold: bool) -> None:
    """Sets the smoothing factors of every wrapped layer from its weight and its inputs in the float model."""
    layers = dilated_layers(student)
    maxima = {name: ChannelMaximum(layer.weight.ndim - 2) for name, layer in layers.items()}
    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_pre_hook(maxima[name].record).remove)
        run_float(student, samples.split(batch))
    # layers that never run keep their factors of 1
    magnitudes = {name: maximum.magnitude for name, maximum in maxima.items() if maximum.magnitude is not None}
    factors = {
        name: smoothing_factors(layers[name].weight, magnitude, getattr(layers[name], "groups", 1))
        for name, magnitude in magnitudes.items()
    }
    apply_factors(student, factors, fold=fold)


def apply_factors(student: nn.Module, factors: Mapping[str, Tensor], *, fold: bool) -> None:
    """Dilates layers by name. A folded factor becomes part of the weights, so that the layer's input is not divided."""
    folds = find_folds(student, factors) if fold else []
    shared, folded = share_factors(factors, folds), {reader for fold in folds for reader in fold.readers}
    for each in folds:
        apply_fold(student, each, shared[each.readers[0]])
    for name, layer in dilated_layers(student).items():
        if name in factors and name not in folded:
            set_factors(layer, shared[name])


class ChannelMaximum:
    """Records the largest magnitude (C,) of each channel of a layer's input. `trailing` is the number of dimensions after C."""

    def __init__(self, trailing: int):
        self._trailing = trailing
        self.magnitude: Tensor | None = None

    def record(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        current = args[0].detach().abs().movedim(-1 - self._trailing, 0).flatten(1).amax(1)
        self.magnitude = current if self.magnitude is None else torch.maximum(self.magnitude, current)


@torch.no_grad()
def set_factors(layer: QuantLayer, factor: Tensor) -> None:
    """Sets the factors (C,) by which a wrapped layer multiplies its weight and divides its input."""
    assert isinstance(layer.weight_quantizer, DilatedWeight) and isinstance(layer.input_quantizer, DilatedInput)
    layer.weight_quantizer.factor.copy_(factor)
    layer.input_quantizer.divide.reciprocal.copy_(factor.reciprocal())


def describe_dilation(denoiser: nn.Module, names: Collection[str], *, fold: bool) -> dict[str, str]:
    """Returns a text for each named layer of a float model: how many of its input channels would be dilated."""
    layers = {name: layer for name, layer in find_layers(denoiser).items() if name in names}
    folds = find_folds(denoiser, names) if fold else []
    factors = {name: dilation_factors(layer.weight, getattr(layer, "groups", 1)) for name, layer in layers.items()}
    factors = share_factors(factors, folds)
    counts = {name: f"{int((factor != 1).sum())} of {len(factor)} channels dilated" for name, factor in factors.items()}
    return counts | {reader: f"{counts[reader]}, folded" for fold in folds for reader in fold.readers}
