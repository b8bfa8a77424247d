"""What a denoiser costs: parameters, multiply-accumulates (MACs), operations and bytes, counted and never estimated.

Nothing is run: the architecture is built once more from its config on the meta device, where tensors have shapes but no
values, so that a packed or fake-quantized denoiser counts like the float one it came from, on any backend.

Operations follow BinaryDM (Zheng et al., 2025), eq. 16-17: a quantized layer has BOPs = MACs * weight bits * activation
bits, and OPs = BOPs / 64 + the MACs of float layers. Attention products (q.k, p.v) stay float in the papers and are not
in their numbers: they stand apart in `attention_macs`. One term is ours. The papers' 24.3, 12.3 and 6.3 G (W4A4, W2A4, W1A4
on LDM-4) exceed their formula by 0.25 G each and no text says why. Counting the float work of the quantizers themselves
(four operations per input, one per output) gives all three to the printed digit; it was chosen because it does, so those
three are a fit and only the float model's 96.0 G is an independent check. The term is `quantizer_ops`, a part of `ops`.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dmquant import foreign
from dmquant.attention import product_bits
from dmquant.denoiser import Role, named_layers, find_roles
from dmquant.errors import InputError
from dmquant.inputs import example_inputs
from dmquant.packed import FLOAT_BITS, layer_bits

BINARY_OPS_PER_WORD = 64  # one-bit products that a 64-bit word does at once
OPS_PER_INPUT = 4  # divide, round, clip below, clip above
OPS_PER_OUTPUT = 1  # multiply by the step sizes
ENTRY_BYTES = 62  # of one tensor in the header of a safetensors file, beside its name: dtype, shape, offsets as JSON
SCALE_BYTES = 8  # float32 scale and zero: per output channel of the weight, once for the input


@dataclass(frozen=True)
class LayerCost:
    """One layer at batch 1: MACs and elements in and out of one denoiser call, bytes in our file."""

    name: str
    role: Role
    shape: tuple[int, ...]  # of the weight
    params: int
    macs: int
    num_inputs: int
    num_outputs: int
    weight_bits: int
    act_bits: int
    size_bytes: int
    note: str = ""

    @property
    def is_integer(self) -> bool:
        """Whether both factors are codes: with one of them float the products are float products."""
        return max(self.weight_bits, self.act_bits) < FLOAT_BITS

    @property
    def ops(self) -> float:
        """BOPs / 64 plus the quantizers' own work, or the MACs of a float layer."""
        return self.bops / BINARY_OPS_PER_WORD + self.quantizer_ops if self.is_integer else self.macs

    @property
    def bops(self) -> int:
        return self.macs * self.weight_bits * self.act_bits

    @property
    def quantizer_ops(self) -> int:
        return (OPS_PER_INPUT * self.num_inputs + OPS_PER_OUTPUT * self.num_outputs) if self.is_integer else 0


@dataclass(frozen=True)
class Cost:
    """One denoiser call at batch 1, and the bytes of the denoiser's file: `header_bytes` of them are names and shapes."""

    layers: tuple[LayerCost, ...]
    num_params: int
    size_bytes: int
    header_bytes: int
    attention_macs: int
    attention_bits: int = FLOAT_BITS  # of their factors

    @property
    def float_size_bytes(self) -> int:
        """Size in float32, the papers' base."""
        return 4 * self.num_params

    @property
    def scaled_size_bytes(self) -> float:
        """The papers' size, f + (1 - f) * bits / 32 of the float32 one: weights by their bits, scales not counted."""
        saved = sum((FLOAT_BITS - layer.weight_bits) * math.prod(layer.shape) for layer in self.layers)
        return self.float_size_bytes - saved / 8

    @property
    def weight_bits_effective(self) -> float:
        """Bits of the file per parameter, scales, biases and norms included."""
        return 8 * self.size_bytes / self.num_params

    @property
    def macs(self) -> int:
        """MACs of convolutions and linear layers, as the papers count them."""
        return sum(layer.macs for layer in self.layers)

    @property
    def bops(self) -> int:
        """Bit operations of all layers, a float layer at 32 x 32. EfficientDM's measure."""
        return sum(layer.bops for layer in self.layers)

    @property
    def quantizer_ops(self) -> int:
        return sum(layer.quantizer_ops for layer in self.layers)

    @property
    def ops(self) -> float:
        """Operations worth one float MAC each: see the module's text."""
        return sum(layer.ops for layer in self.layers)


def measure_cost(
    denoiser: nn.Module, *, bits: Mapping[str, tuple[int, int]] | None = None, notes: Mapping[str, str] | None = None,
    attention_bits: int | None = None, inputs: Mapping[str, Any] | None = None,
) -> Cost:
    """Cost of a denoiser at the bits given per layer name, (weight, activation); a layer not named is float.

    Without `bits` and `attention_bits` they are read off the denoiser. `inputs` replaces `example_inputs`: other sizes, more
    text tokens.
    """
    roles = find_roles(denoiser)
    if bits is None:
        bits = {name: foreign.layer_bits(layer) or layer_bits(layer) for name, layer in named_layers(denoiser).items()}
    unknown = sorted(set(bits) - set(roles))
    if unknown:
        raise InputError(f"the denoiser has no layer {unknown[0]!r} to give bits to")
    skeleton = build_skeleton(denoiser)
    meter, attention_macs = _run(skeleton, example_inputs(skeleton) if inputs is None else inputs)
    widths = _tensor_bytes(skeleton, denoiser)
    costs = [
        _cost_layer(name, role, bits.get(name, (FLOAT_BITS, FLOAT_BITS)), (notes or {}).get(name, ""), meter, widths)
        for name, role in roles.items()
    ]
    inside = {f"{cost.name}.{leaf}" for cost in costs for leaf in ("weight", "bias")}
    others = {name: width for name, width in widths.items() if name not in inside}
    num_params = sum(parameter.numel() for parameter in skeleton.parameters())
    names = [*others, *chain.from_iterable(_tensor_names(cost, widths) for cost in costs)]
    header_bytes = sum(len(name) + ENTRY_BYTES for name in names)
    size_bytes = header_bytes + sum(others.values()) + sum(cost.size_bytes for cost in costs)
    attention_bits = attention_bits or product_bits(denoiser) or FLOAT_BITS
    return Cost(tuple(costs), num_params, size_bytes, header_bytes, attention_macs, attention_bits)


def build_skeleton(denoiser: nn.Module) -> nn.Module:
    """The float architecture of a diffusers model on the meta device: shapes without memory."""
    config = {key: value for key, value in denoiser.config.items() if key != "quantization_config"}
    with torch.device("meta"):
        return type(denoiser).from_config(config).eval()


class _Meter:
    """Counts MACs and elements of the layers that run while it is entered."""

    def __init__(self, layers: Mapping[str, nn.Module]):
        self.layers = layers
        self.macs, self.num_inputs, self.num_outputs = Counter(), Counter(), Counter()
        self._names = {layer: name for name, layer in layers.items()}

    def __enter__(self) -> "_Meter":
        self._hooks = [layer.register_forward_hook(self.count) for layer in self.layers.values()]
        return self

    def __exit__(self, *exception) -> None:
        for hook in self._hooks:
            hook.remove()

    def count(self, layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        name = self._names[layer]
        self.macs[name] += output.numel() * layer.weight[0].numel()
        self.num_inputs[name] += arguments[0].numel()
        self.num_outputs[name] += output.numel()


@torch.no_grad()
def _run(skeleton: nn.Module, inputs: Mapping[str, Any]) -> tuple[_Meter, int]:
    """One call of the skeleton: what its layers did, and the MACs of its attention products."""
    # the counter knows the plain attention kernel, not every fused one
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, _Meter(named_layers(skeleton)) as meter:
        skeleton(**inputs)
    return meter, counter.get_total_flops() // 2 - meter.macs.total()  # products that belong to no layer


def _tensor_bytes(skeleton: nn.Module, denoiser: nn.Module) -> dict[str, int]:
    """Bytes of each float tensor by name, at the dtype that it has in the denoiser."""
    own = denoiser.state_dict()
    return {name: value.numel() * own.get(name, value).element_size() for name, value in skeleton.state_dict().items()}


def _cost_layer(
    name: str, role: Role, bits: tuple[int, int], note: str, meter: _Meter, widths: Mapping[str, int]
) -> LayerCost:
    weight_bits, act_bits = bits
    layer = meter.layers[name]
    size_bytes = widths.get(f"{name}.bias", 0) + (SCALE_BYTES if act_bits < FLOAT_BITS else 0)
    if weight_bits < FLOAT_BITS:  # bit planes [bits, ceil(n / 8)] and one scale and zero per output channel
        size_bytes += weight_bits * -(-layer.weight.numel() // 8) + SCALE_BYTES * len(layer.weight)
    else:
        size_bytes += widths[f"{name}.weight"]
    return LayerCost(
        name=name, role=role, shape=tuple(layer.weight.shape), params=sum(value.numel() for value in layer.parameters()),
        macs=meter.macs[name], num_inputs=meter.num_inputs[name], num_outputs=meter.num_outputs[name],
        weight_bits=weight_bits, act_bits=act_bits, size_bytes=size_bytes, note=note,
    )


def _tensor_names(cost: LayerCost, widths: Mapping[str, int]) -> list[str]:
    """What a layer's tensors are called in the file."""
    weight = ("weight",) if cost.weight_bits == FLOAT_BITS else ("weight.codes", "weight.scale", "weight.zero")
    grid = () if cost.act_bits == FLOAT_BITS else ("input.scale", "input.zero")
    bias = ("bias",) if f"{cost.name}.bias" in widths else ()
    return [f"{cost.name}.{leaf}" for leaf in (*weight, *grid, *bias)]
