"""Conversion between float, fake-quantized and packed denoisers.

`pack_model` packs a fake-quantized denoiser, `prepare_packed` makes an empty packed one to load a file into, `restore_float`
makes a packed one float again, and `read_scheme` returns how a denoiser is stored. Scales and zeros stay float32 in every model:
a cast would move the grid.
"""

from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from dmquant.nn.attention import QuantInput, product_bits, quantize_products, restore_products
from dmquant.nn.fake_quant_layers import Layer, QuantLayer, find_layers, quantized_layers
from dmquant.nn.packed_layers import PACKED, PackedLayer
from dmquant.nn.packed_weight import PackedWeight, dense
from dmquant.nn.scheme import FLOAT, FLOAT_BITS, Bits, LayerScheme, Scheme, Timing, generalize, sort_traits
from dmquant.quantizers.base import FixedGrid, Quantizer
from dmquant.quantizers.dilated import DilatedInput, Divide, spread
from dmquant.quantizers.timestep_clock import Clock, attach_clock, detach_clock, reconnect_clock
from dmquant.quantizers.traits import GridSite, GridTrait, traits_of

CONVOLUTION = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
OPTIONS = {nn.Linear: ("in_features", "out_features"), nn.Conv1d: CONVOLUTION, nn.Conv2d: CONVOLUTION}


def read_scheme(denoiser: nn.Module, bits: Bits | None = None) -> Scheme:
    """Returns the scheme of a quantized or packed denoiser. The default is the most frequent one with the bits given."""
    found = {name: layer_scheme(layer) for name, layer in layers_of(denoiser).items()}
    frequent = Counter(scheme for scheme in found.values() if bits is None or scheme[:2] == tuple(bits)).most_common(1)
    default = frequent[0][0] if frequent else LayerScheme(*(bits or FLOAT[:2]))
    groups: dict[str, set[LayerScheme]] = {}
    for name, scheme in found.items():
        groups.setdefault(generalize(name), set()).add(scheme)
    overrides = {
        generalize(name) if len(groups[generalize(name)]) == 1 else name: scheme
        for name, scheme in found.items()
        if scheme != default
    }
    clock = getattr(denoiser, "clock", None)
    timing = Timing(len(clock.timesteps), clock.lookup) if isinstance(clock, Clock) else None
    return Scheme(default, overrides, *attention_scheme(denoiser), timing)


def attention_scheme(denoiser: nn.Module) -> tuple[int, tuple[GridTrait, ...]]:
    """Returns the bits and traits of the grids of the factors of attention products."""
    grids = (module.input_quantizer for module in denoiser.modules() if isinstance(module, QuantInput))
    return product_bits(denoiser) or FLOAT_BITS, traits_of(next(grids, None))


def layer_bits(layer: nn.Module) -> Bits:
    """Returns weight and activation bits of a float, quantized or packed layer."""
    return layer_scheme(layer)[:2]


def layer_scheme(layer: nn.Module) -> LayerScheme:
    """Returns how a float, quantized or packed layer is or will be stored."""
    weight = getattr(layer, "weight_quantizer", layer.weight)
    grid = getattr(layer, "input_quantizer", getattr(layer, "input", None))
    parts = (weight, grid, getattr(layer, "divide", None))
    traits = sort_traits({trait for part in parts for trait in traits_of(part)})
    return LayerScheme(getattr(weight, "bits", FLOAT_BITS), getattr(grid, "bits", FLOAT_BITS), traits)


def layers_of(denoiser: nn.Module) -> dict[str, nn.Module]:
    """Returns float, quantized and packed layers by name, in module order."""
    names = set(find_layers(denoiser)) | set(quantized_layers(denoiser)) | set(packed_layers(denoiser))
    return {name: layer for name, layer in denoiser.named_modules() if name in names}


def packed_layers(denoiser: nn.Module) -> dict[str, PackedLayer]:
    """Returns packed layers by name, in module order."""
    return {name: layer for name, layer in denoiser.named_modules() if isinstance(layer, PackedLayer)}


def pack_model(denoiser: nn.Module) -> nn.Module:
    """Returns a copy with packed layers. It shares the memory of all float tensors; the model given is not changed."""
    # deepcopy takes what the memo holds for an object instead of copying it
    memo: dict[int, Any] = {id(tensor): _share(tensor) for tensor in chain(denoiser.parameters(), denoiser.buffers())}
    memo |= {id(layer): pack_layer(layer) for layer in quantized_layers(denoiser).values()}
    grids = (module.input_quantizer for module in denoiser.modules() if isinstance(module, QuantInput))
    memo |= {id(grid): grid.freeze() for grid in grids if isinstance(grid, Quantizer)}
    packed = deepcopy(denoiser, memo)
    reconnect_clock(packed)
    return packed


@torch.no_grad()
def pack_layer(layer: QuantLayer) -> Layer | PackedLayer:
    """Returns the packed layer for a quantized one; a float layer if neither its weight nor its input is quantized."""
    scheme = layer_scheme(layer)
    clock = getattr(layer.input_quantizer, "clock", None)
    packed = empty_layer(layer, scheme, dtype=layer.weight.dtype, device=layer.weight.device, clock=clock)
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


def prepare_packed(denoiser: nn.Module, scheme: Scheme, *, dtype: torch.dtype) -> None:
    """Replaces float layers by empty packed ones on the meta device. Raises ValueError for an override without a layer."""
    layers = find_layers(denoiser)
    unknown = sorted(scheme.unused(list(layers)))
    if unknown:
        raise ValueError(f"no Linear, Conv1d or Conv2d layer named {unknown[0]!r} in {type(denoiser).__name__}")
    clock = None if scheme.timing is None else Clock(torch.zeros(scheme.timing.num_steps, device="meta"), scheme.timing.lookup)
    for name, layer in layers.items():
        if scheme.layer(name) != FLOAT:
            _replace(denoiser, name, empty_layer(layer, scheme.layer(name), dtype=dtype, device="meta", clock=clock))
    if clock is not None:
        attach_clock(clock, denoiser)
    if scheme.attention_bits != FLOAT_BITS:
        factor = LayerScheme(FLOAT_BITS, scheme.attention_bits, scheme.attention_traits)
        quantize_products(denoiser, lambda heads: empty_grid(factor, device="meta", clock=clock, channels=heads))


@torch.no_grad()
def restore_float(denoiser: nn.Module) -> None:
    """Replaces packed layers by float ones with the same weights. Inputs are not quantized any more."""
    for name, packed in packed_layers(denoiser).items():
        weight = dense(packed.weight, packed.weight.dtype)
        if isinstance(packed.divide, Divide):
            weight = weight * spread(packed.divide.reciprocal, weight, getattr(packed, "groups", 1))
        layer = empty_layer(packed, FLOAT, dtype=weight.dtype, device=weight.device)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.bias = packed.bias
        _replace(denoiser, name, layer.train(packed.training))
    restore_products(denoiser)
    detach_clock(denoiser)


def empty_layer(
    layer: Layer | PackedLayer, scheme: LayerScheme, *, dtype: torch.dtype, device: torch.device | str, clock: Clock | None = None
) -> Layer | PackedLayer:
    """Returns an empty layer with the options of the one given: packed, or a float layer if the scheme is `FLOAT`."""
    kind = next(kind for kind in PACKED if isinstance(layer, kind))
    options: dict[str, Any] = {name: getattr(layer, name) for name in OPTIONS[kind]}
    options |= {"bias": layer.bias is not None, "dtype": dtype, "device": "meta"}
    if scheme == FLOAT:
        return kind(**options)
    new = PACKED[kind](**options)
    shape = new.weight.shape
    channels = shape[1] * getattr(layer, "groups", 1)
    new.input = empty_grid(scheme, device=device, clock=clock, channels=channels)
    is_divided = any(trait.divides_input for trait in scheme.traits)
    new.divide = Divide(channels, len(shape) - 2, device) if is_divided else nn.Identity()
    if scheme.weight_bits != FLOAT_BITS:
        del new.weight
        holder = next((trait.weight_class for trait in scheme.traits if trait.weight_class is not None), PackedWeight)
        new.weight = holder(shape, scheme.weight_bits, dtype=dtype, device=device)
    return new


def empty_grid(scheme: LayerScheme, *, device: torch.device | str, clock: Clock | None, channels: int = 0) -> nn.Module:
    """Returns an empty quantizer for the input of a packed layer; Identity where the input stays in float."""
    if scheme.act_bits == FLOAT_BITS:
        return nn.Identity()
    site = GridSite(scheme.act_bits, device, channels, clock)
    make: Callable[[], Any] = partial(FixedGrid, site.bits, site.device)
    for trait in sort_traits(scheme.traits):
        make = partial(trait.make_grid, make, site)
    return make()


def _share(tensor: Tensor) -> Tensor:
    """Returns another tensor object in the same memory: moving a copy of a model must not move the model."""
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.detach(), requires_grad=False)
    return tensor.detach()


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)
