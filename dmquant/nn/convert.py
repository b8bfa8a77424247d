"""Packed layers: bit planes in, the arithmetic of the quantized layer out.

A packed layer keeps its weight as integer codes. A kernel multiplies them as they are where there is one; elsewhere the float
values are made anew in every forward, the reference that every kernel has to match. Scales and zeros stay in float32 whatever
the model computes in; a cast would move the grid.
"""

from collections import Counter
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from dmquant.nn.attention import QuantInput, product_bits, quantize_products, restore_products
from dmquant.nn.fake_quant_layers import Layer, QuantLayer, find_layers, quantized_layers
from dmquant.nn.packed_layers import PACKED, PackedLayer
from dmquant.nn.packed_weight import PackedBases, PackedWeight, dense
from dmquant.nn.scheme import BASES, FLOAT, FLOAT_BITS, KINDS, Bits, Format, Layout, Timing, generalize
from dmquant.quantizers.base import FixedGrid, Quantizer
from dmquant.quantizers.dilated import DILATED, DilatedInput, Divide, spread
from dmquant.quantizers.per_part import HEADS, HeadGrids, SplitGrid, split_place
from dmquant.quantizers.per_timestep import TEMPORAL, TemporalGrid
from dmquant.quantizers.timestep_clock import Clock, attach, detach, link

CONVOLUTION = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
OPTIONS = {nn.Linear: ("in_features", "out_features"), nn.Conv1d: CONVOLUTION, nn.Conv2d: CONVOLUTION}


def read_layout(denoiser: nn.Module, bits: Bits | None = None) -> Layout:
    """The formats of a quantized or packed model. The default is the most frequent one, of those with the bits given."""
    found = {name: layer_format(layer) for name, layer in layers_of(denoiser).items()}
    frequent = Counter(format for format in found.values() if bits is None or format[:2] == tuple(bits)).most_common(1)
    default = frequent[0][0] if frequent else Format(*(bits or FLOAT[:2]))
    groups: dict[str, set[Format]] = {}
    for name, format in found.items():
        groups.setdefault(generalize(name), set()).add(format)
    overrides = {
        generalize(name) if len(groups[generalize(name)]) == 1 else name: format
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


def packed_layers(denoiser: nn.Module) -> dict[str, PackedLayer]:
    """Packed layers by name, in module order."""
    return {name: layer for name, layer in denoiser.named_modules() if isinstance(layer, PackedLayer)}


def pack_model(denoiser: nn.Module) -> nn.Module:
    """A copy with packed layers. It shares the memory of everything that stays in float; the model given is not touched."""
    # deepcopy takes what the memo holds for an object instead of copying it
    memo: dict[int, Any] = {id(tensor): _share(tensor) for tensor in chain(denoiser.parameters(), denoiser.buffers())}
    memo |= {id(layer): pack_layer(layer) for layer in quantized_layers(denoiser).values()}
    grids = (module.input_quantizer for module in denoiser.modules() if isinstance(module, QuantInput))
    memo |= {id(grid): grid.freeze() for grid in grids if isinstance(grid, Quantizer)}
    packed = deepcopy(denoiser, memo)
    link(packed)
    return packed


@torch.no_grad()
def pack_layer(layer: QuantLayer) -> Layer | PackedLayer:
    """The packed layer of a quantized one; a float layer if neither its weight nor its input is quantized."""
    format = layer_format(layer)
    clock = getattr(layer.input_quantizer, "clock", None)
    packed = empty_layer(layer, format, dtype=layer.weight.dtype, device=layer.weight.device, clock=clock)
    if isinstance(packed.weight, PackedWeight) and isinstance(layer.weight_quantizer, Quantizer):
        packed.weight.fill(layer.weight_quantizer.encode(layer.weight))
    else:
        packed.weight = nn.Parameter(layer.weight.detach(), requires_grad=False)
    if isinstance(packed, PackedLayer) and isinstance(layer.input_quantizer, Quantizer):
        packed.input = layer.input_quantizer.freeze()
        if isinstance(packed.divide, Divide) and isinstance(layer.input_quantizer, DilatedInput):
            packed.divide.load_state_dict(layer.input_quantizer.divide.state_dict())
    if layer.bias is not None:
        packed.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
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
    layer: Layer | PackedLayer, format: Format, *, dtype: torch.dtype, device: torch.device | str, clock: Clock | None = None
) -> Layer | PackedLayer:
    """A layer with the options of the one given, its parameters on the meta device: packed, or plain where all is float."""
    kind = next(kind for kind in PACKED if isinstance(layer, kind))
    options: dict[str, Any] = {name: getattr(layer, name) for name in OPTIONS[kind]}
    options |= {"bias": layer.bias is not None, "dtype": dtype, "device": "meta"}
    if format == FLOAT:
        return kind(**options)
    new = PACKED[kind](**options)
    shape = new.weight.shape
    channels = shape[1] * getattr(layer, "groups", 1)
    new.input = empty_grid(format, device=device, clock=clock, channels=channels)
    new.divide = Divide(channels, len(shape) - 2, device) if DILATED in format.kinds else nn.Identity()
    if format.weight_bits != FLOAT_BITS:
        del new.weight
        holder = PackedBases if BASES in format.kinds else PackedWeight
        new.weight = holder(shape, format.weight_bits, dtype=dtype, device=device)
    return new


def empty_grid(format: Format, *, device: torch.device | str, clock: Clock | None, channels: int = 0) -> nn.Module:
    """What quantizes the input of a packed layer; a temporal grid has a row for each step of the clock."""
    if format.act_bits == FLOAT_BITS:
        return nn.Identity()
    place = split_place(format.kinds)
    if HEADS in format.kinds:
        return HeadGrids([_whole_grid(format, device, clock) for _ in range(channels)])
    if place is not None:
        return SplitGrid([_whole_grid(format, device, clock) for _ in range(2)], (place, channels - place))
    return _whole_grid(format, device, clock)


def _whole_grid(format: Format, device: torch.device | str, clock: Clock | None) -> FixedGrid:
    """One grid for a whole tensor, or for one of its parts."""
    if TEMPORAL not in format.kinds:
        return FixedGrid(format.act_bits, device)
    if clock is None:
        raise ValueError("a grid per timestep needs the clock that it follows")
    return TemporalGrid(format.act_bits, clock, device)


def _share(tensor: Tensor) -> Tensor:
    """A tensor of its own in the same memory: moving the copy of a model must not move the model."""
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.detach(), requires_grad=False)
    return tensor.detach()


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)
