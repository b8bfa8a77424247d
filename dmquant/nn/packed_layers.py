"""Packed layers: `PackedLinear`, `PackedConv1d` and `PackedConv2d`, whose weights are integer codes.

A packed layer divides its input per channel where it was dilated, then calls a kernel that multiplies codes. Without such a
kernel it computes what every kernel has to match: torch's layer on the dequantized input and weight. A convolution whose input
is on two grids (`SplitGrid`) is computed as the sum of two convolutions; `slices_of` makes their layers.
"""

from collections.abc import Sequence
from copy import copy
from itertools import accumulate, count

import torch
from torch import Tensor, nn

from dmquant.kernels.packing import pack, unpack
from dmquant.nn import dispatch
from dmquant.nn.fake_quant_layers import Layer
from dmquant.nn.packed_weight import PackedWeight, dense
from dmquant.quantizers.dilated import Divide
from dmquant.quantizers.per_part import SplitGrid


class PackedLinear(nn.Linear):
    """An nn.Linear with a packed weight, a grid for its input (`input`) and a `Divide` or Identity before it (`divide`)."""

    weight: PackedWeight | nn.Parameter  # type: ignore[assignment]  # torch's layers declare a tensor
    input: nn.Module
    divide: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return linear(self, x)


class PackedConv1d(nn.Conv1d):
    """An nn.Conv1d with a packed weight, a grid for its input (`input`) and a `Divide` or Identity before it (`divide`)."""

    weight: PackedWeight | nn.Parameter  # type: ignore[assignment]  # torch's layers declare a tensor
    input: nn.Module
    divide: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return convolve(self, x)


class PackedConv2d(nn.Conv2d):
    """An nn.Conv2d with a packed weight, a grid for its input (`input`) and a `Divide` or Identity before it (`divide`)."""

    weight: PackedWeight | nn.Parameter  # type: ignore[assignment]  # torch's layers declare a tensor
    input: nn.Module
    divide: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return convolve(self, x)


def linear(layer: PackedLinear, x: Tensor) -> Tensor:
    """Returns the output of a packed linear layer."""
    x = layer.divide(x)
    y = dispatch.run_kernel(layer, x)
    return nn.functional.linear(layer.input(x), dense(layer.weight, x.dtype), layer.bias) if y is None else y


def convolve(layer: PackedConv1d | PackedConv2d, x: Tensor) -> Tensor:
    """Returns the output of a packed convolution."""
    if isinstance(layer.input, SplitGrid):
        y = run_parts(layer, x.split(layer.input.channels, 1))
        if y is not None:
            return y
    x = layer.divide(x)
    y = dispatch.run_kernel(layer, x)
    return layer._conv_forward(layer.input(x), dense(layer.weight, x.dtype), layer.bias) if y is None else y


def run_parts(layer: PackedConv1d | PackedConv2d, pieces: Sequence[Tensor]) -> Tensor | None:
    """Returns conv(cat(a, b)) as conv_a(a) + conv_b(b), each part multiplied by its own codes; None without a kernel for it."""
    if not isinstance(layer.weight, PackedWeight) or layer.groups > 1 or torch.compiler.is_compiling():
        return None
    return dispatch.run_kernel_on_parts(slices_of(layer), pieces)


def slices_of(layer: PackedConv1d | PackedConv2d) -> list[nn.Module]:
    """Returns a layer for each part of the input. They are made at the first call and after a change of the codes."""
    assert isinstance(layer.weight, PackedWeight) and isinstance(layer.input, SplitGrid)
    codes = layer.weight.codes
    version = 0 if codes.is_inference() else codes._version
    if layer.weight.slices is None or layer.weight.slices[0] is not codes or layer.weight.slices[1] != version:
        pieces = unpack(codes, layer.weight.shape).split(layer.input.channels, 1)
        places = accumulate(layer.input.channels, initial=0)
        layer.weight.slices = codes, version, [_slice(layer, *each) for each in zip(count(), places, pieces)]
    return layer.weight.slices[2]


def _slice(layer: PackedConv1d | PackedConv2d, number: int, place: int, codes: Tensor) -> nn.Module:
    """Returns the layer for the part of the input that begins at channel `place`; `codes` are those of its weight."""
    assert isinstance(layer.weight, PackedWeight) and isinstance(layer.input, SplitGrid)
    weight = type(layer.weight)(codes.shape, layer.weight.bits, dtype=layer.weight.dtype, device=codes.device)
    weight._buffers |= {**layer.weight._buffers, "codes": pack(codes.contiguous(), weight.bits)}
    part = copy(layer)
    part.in_channels = codes.shape[1]
    divide = layer.divide.cut(place, part.in_channels) if isinstance(layer.divide, Divide) else layer.divide
    vars(part)["_modules"] = {"weight": weight, "input": layer.input.parts[number], "divide": divide}
    vars(part)["_parameters"] = {"bias": None if number else layer.bias}  # the sum needs it once
    return part


PackedLayer = PackedLinear | PackedConv1d | PackedConv2d
PACKED: dict[type[Layer], type[PackedLayer]] = {nn.Linear: PackedLinear, nn.Conv1d: PackedConv1d, nn.Conv2d: PackedConv2d}
