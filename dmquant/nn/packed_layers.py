"""."""

from collections.abc import Sequence
from copy import copy
from itertools import accumulate, count

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from dmquant.kernels.packing import pack, unpack
from dmquant.nn import dispatch
from dmquant.nn.fake_quant_layers import Layer
from dmquant.nn.packed_weight import PackedWeight, dense
from dmquant.quantizers.dilated import Divide
from dmquant.quantizers.per_part import SplitGrid

SLICES = WeakTensorKeyDictionary()  # codes of a weight whose input is split -> their version, and a layer for each part


class PackedLinear(nn.Linear):
    weight: PackedWeight | nn.Parameter  # type: ignore[assignment]  # torch's layers declare a tensor
    input: nn.Module
    divide: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return linear(self, x)


class PackedConv1d(nn.Conv1d):
    weight: PackedWeight | nn.Parameter  # type: ignore[assignment]  # torch's layers declare a tensor
    input: nn.Module
    divide: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return convolve(self, x)


class PackedConv2d(nn.Conv2d):
    weight: PackedWeight | nn.Parameter  # type: ignore[assignment]  # torch's layers declare a tensor
    input: nn.Module
    divide: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return convolve(self, x)


def linear(layer: PackedLinear, x: Tensor) -> Tensor:
    x = layer.divide(x)
    y = dispatch.run(layer, x)
    return nn.functional.linear(layer.input(x), dense(layer.weight, x.dtype), layer.bias) if y is None else y


def convolve(layer: PackedConv1d | PackedConv2d, x: Tensor) -> Tensor:
    if isinstance(layer.input, SplitGrid):
        y = run_parts(layer, x.split(layer.input.channels, 1))
        if y is not None:
            return y
    x = layer.divide(x)
    y = dispatch.run(layer, x)
    return layer._conv_forward(layer.input(x), dense(layer.weight, x.dtype), layer.bias) if y is None else y


def run_parts(layer: PackedConv1d | PackedConv2d, pieces: Sequence[Tensor]) -> Tensor | None:
    """conv(cat(a, b)) = conv_a(a) + conv_b(b): each part of the input meets its own codes. None where no kernel multiplies."""
    if not isinstance(layer.weight, PackedWeight) or layer.groups > 1 or torch.compiler.is_compiling():
        return None
    return dispatch.run_sum(slices_of(layer), pieces)


def slices_of(layer: PackedConv1d | PackedConv2d) -> list[nn.Module]:
    """A layer for each part of its input, made once; what is stored stays whole."""
    assert isinstance(layer.weight, PackedWeight) and isinstance(layer.input, SplitGrid)
    codes = layer.weight.codes
    version = 0 if codes.is_inference() else codes._version
    known = SLICES.get(codes)
    if known is None or known[0] != version:
        pieces = unpack(codes, layer.weight.shape).split(layer.input.channels, 1)
        places = accumulate(layer.input.channels, initial=0)
        known = SLICES[codes] = version, [_slice(layer, *each) for each in zip(count(), places, pieces)]
    return known[1]


def _slice(layer: PackedConv1d | PackedConv2d, number: int, place: int, codes: Tensor) -> nn.Module:
    assert isinstance(layer.weight, PackedWeight) and isinstance(layer.input, SplitGrid)
    weight = type(layer.weight)(codes.shape, layer.weight.bits, dtype=layer.weight.dtype, device=codes.device)
    weight._buffers |= {**layer.weight._buffers, "codes": pack(codes.contiguous(), weight.bits)}
    part = copy(layer)
    part.in_channels = codes.shape[1]
    divide = layer.divide.cut(place, part.in_channels) if isinstance(layer.divide, Divide) else layer.divide
    vars(part)["_modules"] = {"weight": weight, "input": layer.input.parts[number], "divide": divide}
    vars(part)["_parameters"] = {"bias": None if number else layer.bias}  # of the sum it is one
    return part


PackedLayer = PackedLinear | PackedConv1d | PackedConv2d
PACKED: dict[type[Layer], type[PackedLayer]] = {nn.Linear: PackedLinear, nn.Conv1d: PackedConv1d, nn.Conv2d: PackedConv2d}
