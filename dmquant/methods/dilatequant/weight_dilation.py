"""Weight dilation: by how much each input channel of a weight can grow before the range of an output channel does."""

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from dmquant.diffusion.trajectories import Samples
from dmquant.methods.dilatequant.scale_folding import apply_fold, find_folds, share
from dmquant.nn.fake_quant_layers import QuantLayer, find_layers, quantized_layers
from dmquant.quantizers.base import Quantizer
from dmquant.quantizers.dilated import DilatedInput, DilatedWeight
from dmquant.training.calibration import run_float

LARGEST = 1024.0  # factor of a channel that nothing bounds but its rounding: weights of 1e-30 say nothing


def find_factors(weight: Tensor, groups: int = 1) -> Tensor:
    """The largest factor (C,) >= 1 of each input channel that leaves the range of every output channel as it is.

    The range holds zero: s = min over output channels of top / w where w > 0 and of bottom / w where w < 0. DilateQuant,
    eq. 10-12; channels that attain a top or a bottom get 1 by the same formula. A channel of zeros, which nothing bounds, gets 1.
    """
    rows = weight.detach().reshape(groups, len(weight) // groups, weight.shape[1], -1)  # (G, O / G, C / G, taps)
    rows = rows if rows.dtype == torch.float64 else rows.float()
    top, bottom = rows.amax((2, 3)).clamp(min=0), rows.amin((2, 3)).clamp(max=0)
    highest, lowest = rows.amax(3), rows.amin(3)
    upwards = torch.where(highest > 0, top.unsqueeze(2) / highest, torch.inf)
    downwards = torch.where(lowest < 0, bottom.unsqueeze(2) / lowest, torch.inf)
    factor = torch.minimum(upwards, downwards).amin(1).flatten()
    # one step down: rounded up, a quotient would carry a product over the edge of the range
    bounded = torch.nextafter(factor, torch.zeros_like(factor)).clamp(1, LARGEST)
    return torch.where(factor.isinf(), 1.0, bounded)


def find_smooth_factors(weight: Tensor, magnitude: Tensor, groups: int = 1) -> Tensor:
    """SmoothQuant's factor sqrt(max |x| / max |w|), relative to the layer's median channel, between 1 and the dilation's.

    `magnitude` (C,) is the largest |x| of each channel. Xiao et al., 2023, eq. 4 with alpha 0.5; the bound is DilateQuant's.
    """
    limit = find_factors(weight, groups)
    rows = weight.detach().reshape(groups, len(weight) // groups, weight.shape[1], -1)
    largest = rows.abs().amax((1, 3)).flatten()
    wish = (magnitude / largest.clamp(min=torch.finfo(largest.dtype).tiny)).sqrt()
    return torch.minimum((wish / wish.median()).nan_to_num(nan=1.0).clamp(min=1), limit)


def wrap_layers(student: nn.Module) -> None:
    """Makes every layer of codes by codes one that can be dilated; by factors of one, to begin with."""
    for layer in quantized_layers(student).values():
        if not isinstance(layer.weight_quantizer, Quantizer) or not isinstance(layer.input_quantizer, Quantizer):
            continue
        groups, device = getattr(layer, "groups", 1), layer.weight.device
        channels, trailing = layer.weight.shape[1] * groups, layer.weight.ndim - 2
        layer.weight_quantizer = DilatedWeight(layer.weight_quantizer, channels, groups).to(device)
        layer.input_quantizer = DilatedInput(layer.input_quantizer, channels, trailing).to(device)


def dilated_layers(student: nn.Module) -> dict[str, QuantLayer]:
    """The layers that can be dilated, by name, in module order."""
    return {name: layer for name, layer in quantized_layers(student).items() if isinstance(layer.weight_quantizer, DilatedWeight)}


def dilate(student: nn.Module, *, fold: bool) -> None:
    """Sets the factors of every layer from its weight, and folds them where that is exact."""
    layers = dilated_layers(student)
    set_all(student, {name: find_factors(layer.weight, getattr(layer, "groups", 1)) for name, layer in layers.items()}, fold=fold)


def smooth(student: nn.Module, samples: Samples, *, batch: int, fold: bool) -> None:
    """Sets the factors of every layer from its weight and what it reads in the float model."""
    layers = dilated_layers(student)
    peaks = {name: Peak(layer.weight.ndim - 2) for name, layer in layers.items()}
    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_pre_hook(peaks[name].note).remove)
        run_float(student, samples.split(batch))
    # a layer that never runs has nothing to smooth
    read = {name: peak.magnitude for name, peak in peaks.items() if peak.magnitude is not None}
    factors = {
        name: find_smooth_factors(layers[name].weight, magnitude, getattr(layers[name], "groups", 1))
        for name, magnitude in read.items()
    }
    set_all(student, factors, fold=fold)


def set_all(student: nn.Module, factors: Mapping[str, Tensor], *, fold: bool) -> None:
    """Dilates layers by name. A factor that is folded is part of the weight from then on, and nothing is left to divide."""
    folds = find_folds(student, factors) if fold else []
    shared, folded = share(factors, folds), {reader for fold in folds for reader in fold.readers}
    for each in folds:
        apply_fold(student, each, shared[each.readers[0]])
    for name, layer in dilated_layers(student).items():
        if name in factors and name not in folded:
            set_factors(layer, shared[name])


class Peak:
    """The largest magnitude (C,) in each channel of what a layer reads."""

    def __init__(self, trailing: int):
        self._trailing = trailing
        self.magnitude: Tensor | None = None

    def note(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        here = args[0].detach().abs().movedim(-1 - self._trailing, 0).flatten(1).amax(1)
        self.magnitude = here if self.magnitude is None else torch.maximum(self.magnitude, here)


@torch.no_grad()
def set_factors(layer: QuantLayer, factor: Tensor) -> None:
    assert isinstance(layer.weight_quantizer, DilatedWeight) and isinstance(layer.input_quantizer, DilatedInput)
    layer.weight_quantizer.factor.copy_(factor)
    layer.input_quantizer.divide.reciprocal.copy_(factor.reciprocal())


def describe_dilation(denoiser: nn.Module, names: Collection[str], *, fold: bool) -> dict[str, str]:
    """How many input channels of these layers of a float model would be dilated, in words, by name."""
    layers = {name: layer for name, layer in find_layers(denoiser).items() if name in names}
    folds = find_folds(denoiser, names) if fold else []
    factors = share({name: find_factors(layer.weight, getattr(layer, "groups", 1)) for name, layer in layers.items()}, folds)
    counts = {name: f"{int((factor != 1).sum())} of {len(factor)} channels dilated" for name, factor in factors.items()}
    return counts | {reader: f"{counts[reader]}, folded" for fold in folds for reader in fold.readers}
