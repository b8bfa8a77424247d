"""Counts the cost of a denoiser: parameters, multiply-accumulates (MACs), operations and bytes.

The architecture is built from the denoiser's config on the meta device, where tensors have shapes but no values, and called
once. A packed, a fake-quantized and a float denoiser of one architecture therefore have equal counts of MACs on any backend.

Operations follow BinaryDM (Zheng et al., 2025), eq. 16-17: a quantized layer has BOPs = MACs * weight bits * activation
bits, and OPs = BOPs / 64 + the MACs of float layers. Attention products (q.k, p.v) stay float in the papers, whose
numbers do not contain them: `attention_macs` counts them separately. `ops` has one term that is not in the papers,
`quantizer_ops`: four operations per input and one per output of a quantized layer. The papers' 24.3, 12.3 and 6.3 G (W4A4,
W2A4, W1A4 on LDM-4) exceed their formula by 0.25 G each without an explanation. With this term all three agree to the printed
digit. The term was chosen for that reason: the three numbers are a fit, and only the float model's 96.0 G is an independent
check. An input that is divided channel by channel (DilateQuant) costs one operation more per value. Selecting a grid by
timestep costs none.

Bytes are those of the file: the architecture on the meta device gets packed layers, whose tensors are the ones written.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dmquant.diffusion import other_tools
from dmquant.diffusion.example_inputs import example_inputs
from dmquant.diffusion.layer_roles import Role, find_roles, named_layers
from dmquant.errors import InputError
from dmquant.nn.convert import layer_scheme, prepare_packed, read_scheme
from dmquant.nn.fake_quant_layers import find_layers
from dmquant.nn.scheme import FLOAT, FLOAT_BITS, Bits, LayerScheme, Scheme

BINARY_OPS_PER_WORD = 64  # one-bit products that a 64-bit word does at once
OPS_PER_INPUT = 4  # divide, round, clip below, clip above
OPS_PER_OUTPUT = 1  # multiply by the step sizes
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8"}
WIDEST_CODE = 8  # bits that packed layers hold


@dataclass(frozen=True)
class LayerCost:
    """Cost of one layer in one denoiser call at batch 1: MACs, input and output elements, and its bytes in the file."""

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
    is_divided: bool = False  # whether the input is divided channel by channel before it is quantized

    @property
    def is_integer(self) -> bool:
        """Whether weight and input are both quantized; products with one float factor are float products."""
        return max(self.weight_bits, self.act_bits) < FLOAT_BITS

    @property
    def ops(self) -> float:
        """Operations: BOPs / 64 + quantizer operations of a quantized layer, the MACs of a float layer."""
        return self.bops / BINARY_OPS_PER_WORD + self.quantizer_ops if self.is_integer else self.macs

    @property
    def bops(self) -> int:
        return self.macs * self.weight_bits * self.act_bits

    @property
    def quantizer_ops(self) -> int:
        per_input = OPS_PER_INPUT + self.is_divided
        return (per_input * self.num_inputs + OPS_PER_OUTPUT * self.num_outputs) if self.is_integer else 0


@dataclass(frozen=True)
class Cost:
    """Cost of one denoiser call at batch 1, and the size of the denoiser's file, of which `header_bytes` are names and shapes."""

    layers: tuple[LayerCost, ...]
    num_params: int
    size_bytes: int
    header_bytes: int
    attention_macs: int
    attention_bits: int = FLOAT_BITS  # bits of the factors of attention products

    @property
    def float_size_bytes(self) -> int:
        """Size of all parameters in float32, which the papers compare with."""
        return 4 * self.num_params

    @property
    def scaled_size_bytes(self) -> float:
        """Size as the papers count it: each weight at its bits, other parameters in float32, scales not counted."""
        saved = sum((FLOAT_BITS - layer.weight_bits) * math.prod(layer.shape) for layer in self.layers)
        return self.float_size_bytes - saved / 8

    @property
    def weight_bits_effective(self) -> float:
        """Bits of the file per parameter; the file includes scales, biases and norms."""
        return 8 * self.size_bytes / self.num_params

    @property
    def macs(self) -> int:
        """MACs of convolutions and linear layers, as the papers count them."""
        return sum(layer.macs for layer in self.layers)

    @property
    def bops(self) -> int:
        """Bit operations of all layers, 32 x 32 per MAC of a float layer (EfficientDM)."""
        return sum(layer.bops for layer in self.layers)

    @property
    def quantizer_ops(self) -> int:
        """Float operations of the quantizers of all layers."""
        return sum(layer.quantizer_ops for layer in self.layers)

    @property
    def ops(self) -> float:
        """Operations in float MACs: BOPs / 64 of quantized layers, their quantizers, and MACs of float layers."""
        return sum(layer.ops for layer in self.layers)


def measure_cost(
    denoiser: nn.Module,
    *,
    bits: Mapping[str, Bits] | None = None,
    scheme: Scheme | None = None,
    notes: Mapping[str, str] | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> Cost:
    """Returns the cost of a denoiser with the layers of `scheme`, or with static uniform grids of `bits`.

    Args:
        bits: Layer name -> (weight bits, activation bits); layers that it does not name are float.
        scheme: How each layer is stored. Without `bits` and `scheme`, the layers that the denoiser has.
        notes: Layer name -> text for `LayerCost.note`.
        inputs: Arguments of the denoiser on the meta device, such as other image sizes or more text tokens.

    Raises:
        InputError: `bits` names a layer that the denoiser does not have.
    """
    roles = find_roles(denoiser)
    unknown = sorted(set(bits or ()) - set(roles))
    if unknown:
        raise InputError(f"the denoiser has no layer {unknown[0]!r} to give bits to")
    if bits is not None:
        scheme = Scheme(FLOAT, {name: LayerScheme(*pair) for name, pair in bits.items()})
    scheme = scheme or _read_scheme(denoiser)
    skeleton = build_skeleton(denoiser)
    num_params = sum(parameter.numel() for parameter in skeleton.parameters())
    shapes = {name: layer.get_parameter("weight").shape for name, layer in named_layers(skeleton).items()}
    counter, attention_macs = _count_call(skeleton, example_inputs(skeleton) if inputs is None else inputs)
    _convert_to_packed(skeleton, scheme)
    tensors = _list_tensors(skeleton, denoiser)
    costs = tuple(
        _cost_layer(name, role, scheme.layer(name), shapes[name], counter, tensors, (notes or {}).get(name, ""))
        for name, role in roles.items()
    )
    header_bytes = _count_header(tensors)
    size_bytes = header_bytes + sum(entry.size_bytes for entry in tensors.values())
    return Cost(costs, num_params, size_bytes, header_bytes, attention_macs, scheme.attention_bits)


def build_skeleton(denoiser: ModelMixin) -> ModelMixin:
    """Returns the float architecture of a diffusers model on the meta device; it takes no memory."""
    config = {key: value for key, value in denoiser.config.items() if key != "quantization_config"}
    with torch.device("meta"):
        return type(denoiser).from_config(config).eval()


class _LayerCounter:
    """Counts MACs, inputs and outputs of each layer by forward hooks, which exist inside a `with` block."""

    def __init__(self, layers: Mapping[str, nn.Module]):
        self.layers = layers
        self.macs, self.num_inputs, self.num_outputs = Counter[str](), Counter[str](), Counter[str]()
        self._names = {layer: name for name, layer in layers.items()}

    def __enter__(self) -> "_LayerCounter":
        self._hooks = [layer.register_forward_hook(self._count) for layer in self.layers.values()]
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _count(self, layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        name = self._names[layer]
        self.macs[name] += output.numel() * layer.get_parameter("weight")[0].numel()
        self.num_inputs[name] += arguments[0].numel()
        self.num_outputs[name] += output.numel()


@torch.no_grad()
def _count_call(skeleton: nn.Module, inputs: Mapping[str, Any]) -> tuple[_LayerCounter, int]:
    """Calls the skeleton once; returns the counts of its layers and the MACs of its attention products."""
    # FlopCounterMode counts the MATH backend; it does not know every fused attention kernel
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops, _LayerCounter(named_layers(skeleton)) as layers:
        skeleton(**inputs)
    return layers, flops.get_total_flops() // 2 - layers.macs.total()  # the products outside of layers are attention's


def _read_scheme(denoiser: nn.Module) -> Scheme:
    """Returns how each layer of a denoiser is stored; layers of other tools get static uniform grids of their bits."""
    layers, scheme = named_layers(denoiser), read_scheme(denoiser)
    others = {name: bits for name, layer in layers.items() if (bits := other_tools.layer_bits(layer))}
    schemes = {name: LayerScheme(*others[name]) if name in others else layer_scheme(layer) for name, layer in layers.items()}
    return replace(scheme, default=FLOAT, overrides=schemes)


def _convert_to_packed(skeleton: nn.Module, scheme: Scheme) -> None:
    """Replaces layers by packed ones; layers with more than WIDEST_CODE bits (of other tools) stay float."""
    swappable = find_layers(skeleton)
    widths = {name: [bits for bits in scheme.layer(name)[:2] if bits != FLOAT_BITS] for name in swappable}
    schemes = {name: scheme.layer(name) for name in swappable if max(widths[name], default=0) <= WIDEST_CODE}
    prepare_packed(skeleton, replace(scheme, default=FLOAT, overrides=schemes), dtype=torch.float32)


@dataclass(frozen=True)
class _TensorEntry:
    """Dtype and shape of one tensor of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _list_tensors(packed: nn.Module, denoiser: nn.Module) -> dict[str, _TensorEntry]:
    """Returns the tensors of the file by name; those that are not packed keep their dtype in the denoiser."""
    own = denoiser.state_dict()
    return {name: _TensorEntry(own.get(name, value).dtype, tuple(value.shape)) for name, value in packed.state_dict().items()}


def _count_header(tensors: Mapping[str, _TensorEntry]) -> int:
    """Returns the size in bytes of a safetensors header: its length (8 bytes), then names, dtypes, shapes and offsets as JSON."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, entry in sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        end = begin + entry.size_bytes
        header[name] = {"dtype": DTYPES.get(entry.dtype, "F32"), "shape": entry.shape, "data_offsets": [begin, end]}
        begin = end
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-length // 8) * 8


def _cost_layer(
    name: str,
    role: Role,
    scheme: LayerScheme,
    shape: torch.Size,
    counter: _LayerCounter,
    tensors: Mapping[str, _TensorEntry],
    note: str,
) -> LayerCost:
    """Returns the cost of one layer; its bytes are those of all tensors whose names begin with that of the layer."""
    own = [entry for tensor, entry in tensors.items() if tensor.startswith(f"{name}.")]
    bias = tensors.get(f"{name}.bias")
    return LayerCost(
        name=name, role=role, shape=tuple(shape), params=shape.numel() + (math.prod(bias.shape) if bias else 0),
        macs=counter.macs[name], num_inputs=counter.num_inputs[name], num_outputs=counter.num_outputs[name],
        weight_bits=scheme.weight_bits, act_bits=scheme.act_bits, size_bytes=sum(entry.size_bytes for entry in own),
        note=note, is_divided=any(trait.divides_input for trait in scheme.traits),
    )  # fmt: skip
