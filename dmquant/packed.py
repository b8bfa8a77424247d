"""Packed layers: bit planes in, the arithmetic of the quantized layer out.

A packed layer keeps its weight as integer codes. A kernel multiplies them as they are where there is one; elsewhere the float
values are made anew in every forward, the reference that every kernel has to match. Scales and zeros stay in float32 whatever
the model computes in; a cast would move the grid.
"""

import re
from collections import Counter
from collections.abc import Mapping
from copy import copy, deepcopy
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from dmquant import kernels
from dmquant.attention import QuantInput, product_bits, quantize_products, restore_products
from dmquant.clock import NEAREST, Clock, attach, detach, link
from dmquant.kernels.blocked import BlockedCodes
from dmquant.layers import find_layers, quantized_layers
from dmquant.packing import check_bits, pack, unpack
from dmquant.quantizers.base import BasisCodes, Codes, FixedGrid, Quantizer
from dmquant.quantizers.dilated import DILATED, Divide, spread
from dmquant.quantizers.split import HEADS, SPLIT, HeadGrids, SplitGrid, is_split, split_place
from dmquant.quantizers.temporal import TEMPORAL, TemporalGrid

FLOAT_BITS = 32
SLICES = WeakTensorKeyDictionary()  # codes of a weight whose input is split -> their version, and a layer for each part
Bits = tuple[int, int]  # of weights, of activations
BASES = "bases"  # every bit plane of the weight is a binary basis with a scale of its own
KINDS = (BASES, TEMPORAL, DILATED, SPLIT, HEADS)


class Format(NamedTuple):
    """How a layer is stored: bits of weights and of activations, and in what its grids are not uniform and static."""

    weight_bits: int
    act_bits: int
    kinds: tuple[str, ...] = ()


FLOAT = Format(FLOAT_BITS, FLOAT_BITS)


def is_kind(text: object) -> bool:
    """Whether this is a kind that layers are stored in."""
    return isinstance(text, str) and (is_split(text) or text in KINDS and text != SPLIT)


class Timing(NamedTuple):
    """How many calibrated timesteps the tables of temporal grids have, and how timesteps between them are looked up."""

    num_steps: int
    lookup: str = NEAREST


class PackedWeight(BlockedCodes):
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
        return self.scale.device

    def numel(self) -> int:
        return self.shape.numel()

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The float weight, a new tensor, in the dtype given or the one the model was loaded in."""
        column = (-1, *(1,) * (len(self.shape) - 1))
        values = unpack(self.codes, self.shape).to(torch.float32)
        return values.sub_(self.zero.view(column)).mul_(self.scale.view(column)).to(dtype or self.dtype)

    def fill(self, codes: Codes) -> None:
        """One grid per tensor is written as the same grid for each slice, so that the shapes follow from the layer alone."""
        self.codes.copy_(pack(codes.codes, codes.bits))
        for target, value in ((self.scale, codes.scale), (self.zero, codes.zero)):
            if value.numel() not in (1, len(target)):
                raise ValueError(f"a packed weight holds one grid per output channel ({len(target)}), got {tuple(value.shape)}")
            target.copy_(value.reshape(-1))

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, bits={self.bits}"


class PackedBases(PackedWeight):
    """Bit planes of signs, each with its own scale per slice of dimension 0: value = sum over planes of scale * sign."""

    kinds = (BASES,)

    def __init__(self, shape: torch.Size, bits: int, *, dtype: torch.dtype, device: torch.device | str | None = None):
        super().__init__(shape, bits, dtype=dtype, device=device)
        del self.zero
        self.register_buffer("scale", torch.ones(bits, shape[0], dtype=torch.float32, device=device))

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        scale = self.scale.view(self.bits, -1, *(1,) * (len(self.shape) - 1))
        return BasisCodes(unpack(self.codes, self.shape), scale).decode().to(dtype or self.dtype)

    def fill(self, codes: BasisCodes) -> None:
        self.codes.copy_(pack(codes.codes, codes.bits))
        self.scale.copy_(codes.scale.reshape(self.scale.shape))


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
    x = layer.divide(x)
    y = kernels.run(layer, x)
    return nn.functional.linear(layer.input(x), dense(layer.weight, x.dtype), layer.bias) if y is None else y


def convolve(layer: PackedConv1d | PackedConv2d, x: Tensor) -> Tensor:
    x = layer.divide(x)
    y = run_parts(layer, x) if isinstance(layer.input, SplitGrid) else kernels.run(layer, x)
    return layer._conv_forward(layer.input(x), dense(layer.weight, x.dtype), layer.bias) if y is None else y


def run_parts(layer: PackedConv1d | PackedConv2d, x: Tensor) -> Tensor | None:
    """conv(cat(a, b)) = conv_a(a) + conv_b(b): each part of the input meets its own codes. None where no kernel multiplies."""
    if not isinstance(layer.weight, PackedWeight) or layer.groups > 1 or torch.compiler.is_compiling():
        return None
    pairs = [(part, piece) for part, (_, piece) in zip(slices_of(layer), layer.input.pairs(x))]
    outputs = [kernels.run(part, piece) for part, piece in pairs]
    if all(output is None for output in outputs):
        return None
    return sum(part(piece) if output is None else output for output, (part, piece) in zip(outputs, pairs))


def slices_of(layer: PackedConv1d | PackedConv2d) -> list[nn.Module]:
    """A layer for each part of its input, made once; what is stored stays whole."""
    codes = layer.weight.codes
    version = 0 if codes.is_inference() else codes._version
    known = SLICES.get(codes)
    if known is None or known[0] != version:
        pieces = unpack(codes, layer.weight.shape).split(layer.input.channels, 1)
        known = SLICES[codes] = version, [_slice(layer, number, piece) for number, piece in enumerate(pieces)]
    return known[1]


def _slice(layer: PackedConv1d | PackedConv2d, number: int, codes: Tensor) -> nn.Module:
    weight = type(layer.weight)(codes.shape, layer.weight.bits, dtype=layer.weight.dtype, device=codes.device)
    weight._buffers |= {**layer.weight._buffers, "codes": pack(codes.contiguous(), weight.bits)}
    part = copy(layer)
    part.in_channels = codes.shape[1]
    vars(part)["_modules"] = {"weight": weight, "input": layer.input.parts[number], "divide": nn.Identity()}
    vars(part)["_parameters"] = {"bias": None if number else layer.bias}  # of the sum it is one
    return part


def dense(weight: PackedWeight | nn.Parameter, dtype: torch.dtype) -> Tensor:
    """The values of a weight; one of 32 bits is no PackedWeight."""
    return weight.dequantize(dtype) if isinstance(weight, PackedWeight) else weight


PACKED = {nn.Linear: PackedLinear, nn.Conv1d: PackedConv1d, nn.Conv2d: PackedConv2d}
CONVOLUTION = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
OPTIONS = {nn.Linear: ("in_features", "out_features"), nn.Conv1d: CONVOLUTION, nn.Conv2d: CONVOLUTION}


@dataclass(frozen=True)
class Layout:
    """The format of each layer. The names of the overrides are layers, `*` in them any number: blocks.*.conv1."""

    default: Format
    overrides: Mapping[str, Format] = field(default_factory=dict)
    attention_bits: int = FLOAT_BITS  # of the factors of attention products
    attention_kinds: tuple[str, ...] = ()  # in what their grids are not uniform and static
    timing: Timing | None = None  # of a denoiser with temporal grids

    def format(self, name: str) -> Format:
        return self.overrides.get(name, self.overrides.get(_generalize(name), self.default))

    def unused(self, names: list[str]) -> set[str]:
        """Overrides that speak of none of these layers."""
        return set(self.overrides) - set(names) - set(map(_generalize, names))


def read_layout(denoiser: nn.Module, bits: Bits | None = None) -> Layout:
    """The formats of a quantized or packed model. The default is the most frequent one, of those with the bits given."""
    found = {name: layer_format(layer) for name, layer in layers_of(denoiser).items()}
    frequent = Counter(format for format in found.values() if bits is None or format[:2] == tuple(bits)).most_common(1)
    default = frequent[0][0] if frequent else Format(*bits)
    groups: dict[str, set[Format]] = {}
    for name, format in found.items():
        groups.setdefault(_generalize(name), set()).add(format)
    overrides = {
        _generalize(name) if len(groups[_generalize(name)]) == 1 else name: format
        for name, format in found.items()
        if format != default
    }
    clock = getattr(denoiser, "clock", None)
    timing = Timing(len(clock.timesteps), clock.lookup) if isinstance(clock, Clock) else None
    return Layout(default, overrides, *product_format(denoiser), timing)


def product_format(denoiser: nn.Module) -> tuple[int, tuple[str, ...]]:
    """Bits and kinds of the grids of the factors of attention products."""
    grids = (module.input_quantizer for module in denoiser.modules() if isinstance(module, QuantInput))
    return product_bits(denoiser) or FLOAT_BITS, getattr(next(grids, None), "kinds", ())


def layer_bits(layer: nn.Module) -> Bits:
    """Weight and activation bits of a float, quantized or packed layer."""
    return layer_format(layer)[:2]


def layer_format(layer: nn.Module) -> Format:
    """How a float, quantized or packed layer is or will be stored."""
    weight = getattr(layer, "weight_quantizer", layer.weight)
    grid = getattr(layer, "input_quantizer", getattr(layer, "input", None))
    parts = (weight, grid, getattr(layer, "divide", None))
    found = {kind for part in parts for kind in getattr(part, "kinds", ())}
    kinds = tuple(sorted(found, key=lambda kind: KINDS.index(kind.partition(":")[0])))
    return Format(getattr(weight, "bits", FLOAT_BITS), getattr(grid, "bits", FLOAT_BITS), kinds)


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
    grids = (module.input_quantizer for module in denoiser.modules() if isinstance(module, QuantInput))
    memo |= {id(grid): grid.freeze() for grid in grids if isinstance(grid, Quantizer)}
    packed = deepcopy(denoiser, memo)
    link(packed)
    return packed


@torch.no_grad()
def pack_layer(layer: nn.Module) -> nn.Module:
    """The packed layer of a quantized one; a float layer if neither its weight nor its input is quantized."""
    format = layer_format(layer)
    clock = getattr(layer.input_quantizer, "clock", None)
    packed = empty_layer(layer, format, dtype=layer.weight.dtype, device=layer.weight.device, clock=clock)
    if format.weight_bits == FLOAT_BITS:
        packed.weight = _share(layer.weight)
    else:
        packed.weight.fill(layer.weight_quantizer.encode(layer.weight))
    if format.act_bits != FLOAT_BITS:
        packed.input = layer.input_quantizer.freeze()
    if DILATED in format.kinds:
        packed.divide.load_state_dict(layer.input_quantizer.divide.state_dict())
    if layer.bias is not None:
        packed.bias = _share(layer.bias)
    return packed.train(layer.training)


def prepare_packed(denoiser: nn.Module, layout: Layout, *, dtype: torch.dtype) -> None:
    """Replaces the float layers by empty packed ones on the meta device, ready to be loaded."""
    layers = find_layers(denoiser)
    unknown = sorted(layout.unused(list(layers)))
    if unknown:
        raise ValueError(f"no Linear, Conv1d or Conv2d layer named {unknown[0]!r} in {type(denoiser).__name__}")
    clock = None if layout.timing is None else Clock(torch.zeros(layout.timing.num_steps, device="meta"), layout.timing.lookup)
    for name, layer in layers.items():
        if layout.format(name) != FLOAT:
            _replace(denoiser, name, empty_layer(layer, layout.format(name), dtype=dtype, device="meta", clock=clock))
    if clock is not None:
        attach(clock, denoiser)
    if layout.attention_bits != FLOAT_BITS:
        format = Format(FLOAT_BITS, layout.attention_bits, layout.attention_kinds)
        quantize_products(denoiser, lambda heads: empty_grid(format, device="meta", clock=clock, channels=heads))


@torch.no_grad()
def restore_float(denoiser: nn.Module) -> None:
    """Replaces packed layers by plain float ones with the same weights. Inputs are not quantized any more."""
    for name, packed in packed_layers(denoiser).items():
        weight = dense(packed.weight, packed.weight.dtype)
        if isinstance(packed.divide, Divide):
            weight = weight * spread(packed.divide.reciprocal, weight, getattr(packed, "groups", 1))
        layer = empty_layer(packed, FLOAT, dtype=weight.dtype, device=weight.device)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.bias = packed.bias
        _replace(denoiser, name, layer.train(packed.training))
    restore_products(denoiser)
    detach(denoiser)


def empty_layer(
    layer: nn.Module, format: Format, *, dtype: torch.dtype, device: torch.device | str, clock: Clock | None = None
) -> nn.Module:
    """A layer with the options of the one given, its parameters on the meta device: packed, or plain where all is float."""
    kind = next(kind for kind in PACKED if isinstance(layer, kind))
    options = {name: getattr(layer, name) for name in OPTIONS[kind]}
    new = (kind if format == FLOAT else PACKED[kind])(**options, bias=layer.bias is not None, dtype=dtype, device="meta")
    if format != FLOAT:
        channels, trailing = new.weight.shape[1] * getattr(layer, "groups", 1), new.weight.ndim - 2
        new.input = empty_grid(format, device=device, clock=clock, channels=channels)
        new.divide = Divide(channels, trailing, device) if DILATED in format.kinds else nn.Identity()
    if format.weight_bits != FLOAT_BITS:
        shape = new.weight.shape
        del new.weight
        holder = PackedBases if BASES in format.kinds else PackedWeight
        new.weight = holder(shape, format.weight_bits, dtype=dtype, device=device)
    return new


def empty_grid(format: Format, *, device: torch.device | str, clock: Clock | None, channels: int = 0) -> nn.Module:
    """What quantizes the input of a packed layer; a temporal grid has a row for each step of the clock."""
    if format.act_bits == FLOAT_BITS:
        return nn.Identity()
    place = split_place(format.kinds)
    whole = format._replace(kinds=tuple(kind for kind in format.kinds if kind != HEADS and not is_split(kind)))
    if HEADS in format.kinds:
        return HeadGrids([empty_grid(whole, device=device, clock=clock) for _ in range(channels)])
    if place is not None:
        return SplitGrid([empty_grid(whole, device=device, clock=clock) for _ in range(2)], (place, channels - place))
    return TemporalGrid(format.act_bits, clock, device) if TEMPORAL in format.kinds else FixedGrid(format.act_bits, device)


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
