"""Packed layers: bit planes in, the arithmetic of the quantized layer out.

A packed layer keeps its weight as integer codes and makes the float values anew in every forward: the reference that every
faster kernel has to match. Scales and zeros stay in float32 whatever the model computes in; a cast would move the grid.
"""

import re
from collections import Counter
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor, nn

from dmquant.layers import find_layers, quantized_layers
from dmquant.packing import check_bits, pack, unpack
from dmquant.quantizers.base import Codes, FixedGrid, Float32Buffers

FLOAT_BITS = 32
Bits = tuple[int, int]  # of weights, of activations
FLOAT: Bits = (FLOAT_BITS, FLOAT_BITS)


class PackedWeight(Float32Buffers):
    """Bit planes with one scale and one zero per slice of dimension 0: value = (code - zero) * scale."""

    def __init__(self, shape: torch.Size, bits: int, *, dtype: torch.dtype, device: torch.device | str | None = None):
        super().__init__()
        check_bits(bits)
        self.shape, self.bits, self.dtype = torch.Size(shape), bits, dtype
        planes = (bits, -(-self.shape.numel() // 8))
        self.register_buffer("codes", torch.zeros(planes, dtype=torch.uint8, device=device))
        self.register_buffer("scale", torch.ones(shape[0], dtype=torch.float32, device=device))
        self.register_buffer("zero", torch.zeros(shape[0], dtype=torch.float32, device=device))

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def numel(self) -> int:
        return self.shape.numel()

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The float weight, a new tensor, in the dtype given or the one the model was loaded in."""
        column = (-1, *(1,) * (len(self.shape) - 1))
        values = unpack(self.codes, self.shape).to(torch.float32)
        return values.sub_(self.zero.view(column)).mul_(self.scale.view(column)).to(dtype or self.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, bits={self.bits}"


class PackedLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(self, x)


class PackedConv1d(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return convolve(self, x)


class PackedConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return convolve(self, x)


# The two seams where a kernel takes over: a packed layer and its float input in, its float output out.


def linear(layer: PackedLinear, x: Tensor) -> Tensor:
    return nn.functional.linear(layer.input(x), dense(layer.weight, x.dtype), layer.bias)


def convolve(layer: PackedConv1d | PackedConv2d, x: Tensor) -> Tensor:
    return layer._conv_forward(layer.input(x), dense(layer.weight, x.dtype), layer.bias)


def dense(weight: PackedWeight | nn.Parameter, dtype: torch.dtype) -> Tensor:
    """The values of a weight; one of 32 bits is no PackedWeight."""
    return weight.dequantize(dtype) if isinstance(weight, PackedWeight) else weight


PACKED = {nn.Linear: PackedLinear, nn.Conv1d: PackedConv1d, nn.Conv2d: PackedConv2d}
CONVOLUTION = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
OPTIONS = {nn.Linear: ("in_features", "out_features"), nn.Conv1d: CONVOLUTION, nn.Conv2d: CONVOLUTION}


@dataclass(frozen=True)
class Layout:
    """How many bits each layer has. The names of the overrides are layers, `*` in them any number: blocks.*.conv1."""

    weight_bits: int
    act_bits: int
    overrides: Mapping[str, Bits] = field(default_factory=dict)

    def bits(self, name: str) -> Bits:
        default = (self.weight_bits, self.act_bits)
        return self.overrides.get(name, self.overrides.get(_generalize(name), default))

    def unused(self, names: list[str]) -> set[str]:
        """Overrides that speak of none of these layers."""
        return set(self.overrides) - set(names) - set(map(_generalize, names))


def read_layout(denoiser: nn.Module, default: Bits | None = None) -> Layout:
    """The bits of every layer of a quantized or packed model. Without a default, the most frequent bits are it."""
    found = {name: layer_bits(layer) for name, layer in layers_of(denoiser).items()}
    weight_bits, act_bits = default or Counter(found.values()).most_common(1)[0][0]
    groups: dict[str, set[Bits]] = {}
    for name, bits in found.items():
        groups.setdefault(_generalize(name), set()).add(bits)
    overrides = {
        _generalize(name) if len(groups[_generalize(name)]) == 1 else name: bits
        for name, bits in found.items()
        if bits != (weight_bits, act_bits)
    }
    return Layout(weight_bits, act_bits, overrides)


def layer_bits(layer: nn.Module) -> Bits:
    """Weight and activation bits of a float, quantized or packed layer."""
    weight = getattr(layer, "weight_quantizer", layer.weight)
    grid = getattr(layer, "input_quantizer", getattr(layer, "input", None))
    return getattr(weight, "bits", FLOAT_BITS), getattr(grid, "bits", FLOAT_BITS)


def layers_of(denoiser: nn.Module) -> dict[str, nn.Module]:
    """Float, quantized and packed layers by name, in module order."""
    kinds = set(find_layers(denoiser)) | set(quantized_layers(denoiser)) | set(packed_layers(denoiser))
    return {name: layer for name, layer in denoiser.named_modules() if name in kinds}


def packed_layers(denoiser: nn.Module) -> dict[str, nn.Module]:
    """Packed layers by name, in module order."""
    return {name: layer for name, layer in denoiser.named_modules() if type(layer) in PACKED.values()}


def pack_model(denoiser: nn.Module) -> nn.Module:
    """A copy with packed layers. It shares the memory of everything that stays in float; the model given is not touched."""
    # deepcopy takes what the memo holds for an object instead of copying it
    memo = {id(tensor): _share(tensor) for tensor in chain(denoiser.parameters(), denoiser.buffers())}
    memo |= {id(layer): pack_layer(layer) for layer in quantized_layers(denoiser).values()}
    return deepcopy(denoiser, memo)


@torch.no_grad()
def pack_layer(layer: nn.Module) -> nn.Module:
    """The packed layer of a quantized one; a float layer if neither its weight nor its input is quantized."""
    weight_bits, act_bits = layer_bits(layer)
    packed = empty_layer(layer, (weight_bits, act_bits), dtype=layer.weight.dtype, device=layer.weight.device)
    if weight_bits == FLOAT_BITS:
        packed.weight = _share(layer.weight)
    else:
        _fill(packed.weight, layer.weight_quantizer.encode(layer.weight))
    if act_bits != FLOAT_BITS:
        packed.input = layer.input_quantizer.freeze()
    if layer.bias is not None:
        packed.bias = _share(layer.bias)
    return packed.train(layer.training)


def prepare_packed(denoiser: nn.Module, layout: Layout, *, dtype: torch.dtype) -> None:
    """Replaces the float layers by empty packed ones on the meta device, ready to be loaded."""
    layers = find_layers(denoiser)
    unknown = sorted(layout.unused(list(layers)))
    if unknown:
        raise ValueError(f"no Linear, Conv1d or Conv2d layer named {unknown[0]!r} in {type(denoiser).__name__}")
    for name, layer in layers.items():
        if layout.bits(name) != FLOAT:
            _replace(denoiser, name, empty_layer(layer, layout.bits(name), dtype=dtype, device="meta"))


@torch.no_grad()
def restore_float(denoiser: nn.Module) -> None:
    """Replaces packed layers by plain float ones with the same weights. Inputs are not quantized any more."""
    for name, packed in packed_layers(denoiser).items():
        weight = dense(packed.weight, packed.weight.dtype)
        layer = empty_layer(packed, FLOAT, dtype=weight.dtype, device=weight.device)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.bias = packed.bias
        _replace(denoiser, name, layer.train(packed.training))


def empty_layer(layer: nn.Module, bits: Bits, *, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """A layer with the options of the one given, its parameters on the meta device: packed, or plain where all is float."""
    kind = next(kind for kind in PACKED if isinstance(layer, kind))
    options = {name: getattr(layer, name) for name in OPTIONS[kind]}
    new = (kind if bits == FLOAT else PACKED[kind])(**options, bias=layer.bias is not None, dtype=dtype, device="meta")
    weight_bits, act_bits = bits
    if bits != FLOAT:
        new.input = nn.Identity() if act_bits == FLOAT_BITS else FixedGrid(act_bits, device)
    if weight_bits != FLOAT_BITS:
        shape = new.weight.shape
        del new.weight
        new.weight = PackedWeight(shape, weight_bits, dtype=dtype, device=device)
    return new


def _fill(weight: PackedWeight, codes: Codes) -> None:
    """One grid per tensor is written as the same grid for each slice, so that the shapes follow from the layer alone."""
    weight.codes.copy_(pack(codes.codes, codes.bits))
    for target, value in ((weight.scale, codes.scale), (weight.zero, codes.zero)):
        if value.numel() not in (1, len(target)):
            raise ValueError(f"a packed weight holds one grid per output channel ({len(target)}), got {tuple(value.shape)}")
        target.copy_(value.reshape(-1))


def _share(tensor: Tensor) -> Tensor:
    """A tensor of its own in the same memory: moving the copy of a model must not move the model."""
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.detach(), requires_grad=False)
    return tensor.detach()


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


def _generalize(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
