"""What a denoiser costs: parameters, multiply-accumulates (MACs), operations and bytes, counted and never estimated.

Nothing is run: the architecture is built once more from its config on the meta device, where tensors have shapes but no
values, so that a packed or fake-quantized denoiser counts like the float one it came from, on any backend.

Operations follow BinaryDM (Zheng et al., 2025), eq. 16-17: a quantized layer has BOPs = MACs * weight bits * activation
bits, and OPs = BOPs / 64 + the MACs of float layers. Attention products (q.k, p.v) stay float in the papers and are not
in their numbers: they stand apart in `attention_macs`. One term is ours. The papers' 24.3, 12.3 and 6.3 G (W4A4, W2A4, W1A4
on LDM-4) exceed their formula by 0.25 G each and no text says why. Counting the float work of the quantizers themselves
(four operations per input, one per output) gives all three to the printed digit; it was chosen because it does, so those
three are a fit and only the float model's 96.0 G is an independent check. The term is `quantizer_ops`, a part of `ops`. An
input that is divided channel by channel (DilateQuant) costs one more; that a grid is looked up by timestep costs nothing.

Bytes are those of the file: the same skeleton is given packed layers, whose tensors are the ones that are written.
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
    is_divided: bool = False  # its input, channel by channel, before it is quantized

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
        per_input = OPS_PER_INPUT + self.is_divided
        return (per_input * self.num_inputs + OPS_PER_OUTPUT * self.num_outputs) if self.is_integer else 0


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
    denoiser: nn.Module, *, bits: Mapping[str, Bits] | None = None, scheme: Scheme | None = None,
    notes: Mapping[str, str] | None = None, inputs: Mapping[str, Any] | None = None,
) -> Cost:
    """Cost of a denoiser in a scheme, or with static uniform grids at the bits of each layer by name; one not named is float.

    Without both they are read off the denoiser. `inputs` replaces `example_inputs`: other sizes, more text tokens.
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
    meter, attention_macs = _run(skeleton, example_inputs(skeleton) if inputs is None else inputs)
    _pack(skeleton, scheme)
    tensors = _list_tensors(skeleton, denoiser)
    costs = tuple(
        _cost_layer(name, role, scheme.layer(name), shapes[name], meter, tensors, (notes or {}).get(name, ""))
        for name, role in roles.items()
    )
    header_bytes = _count_header(tensors)
    size_bytes = header_bytes + sum(entry.size_bytes for entry in tensors.values())
    return Cost(costs, num_params, size_bytes, header_bytes, attention_macs, scheme.attention_bits)


def build_skeleton(denoiser: ModelMixin) -> ModelMixin:
    """The float architecture of a diffusers model on the meta device: shapes without memory."""
    config = {key: value for key, value in denoiser.config.items() if key != "quantization_config"}
    with torch.device("meta"):
        return type(denoiser).from_config(config).eval()


class _Meter:
    """Counts MACs and elements of the layers that run while it is entered."""

    def __init__(self, layers: Mapping[str, nn.Module]):
        self.layers = layers
        self.macs, self.num_inputs, self.num_outputs = Counter[str](), Counter[str](), Counter[str]()
        self._names = {layer: name for name, layer in layers.items()}

    def __enter__(self) -> "_Meter":
        self._hooks = [layer.register_forward_hook(self.count) for layer in self.layers.values()]
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def count(self, layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        name = self._names[layer]
        self.macs[name] += output.numel() * layer.get_parameter("weight")[0].numel()
        self.num_inputs[name] += arguments[0].numel()
        self.num_outputs[name] += output.numel()


@torch.no_grad()
def _run(skeleton: nn.Module, inputs: Mapping[str, Any]) -> tuple[_Meter, int]:
    """One call of the skeleton: what its layers did, and the MACs of its attention products."""
    # the counter knows the plain attention kernel, not every fused one
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, _Meter(named_layers(skeleton)) as meter:
        skeleton(**inputs)
    return meter, counter.get_total_flops() // 2 - meter.macs.total()  # products that belong to no layer


def _read_scheme(denoiser: nn.Module) -> Scheme:
    """How each layer of a denoiser is stored; of one that another tool quantized, at which bits."""
    layers, scheme = named_layers(denoiser), read_scheme(denoiser)
    others = {name: bits for name, layer in layers.items() if (bits := other_tools.layer_bits(layer))}
    schemes = {name: LayerScheme(*others[name]) if name in others else layer_scheme(layer) for name, layer in layers.items()}
    return replace(scheme, default=FLOAT, overrides=schemes)


def _pack(skeleton: nn.Module, scheme: Scheme) -> None:
    """Gives the skeleton the layers that are written; layers of other tools that ours cannot stand for stay float."""
    swappable = find_layers(skeleton)
    widths = {name: [bits for bits in scheme.layer(name)[:2] if bits != FLOAT_BITS] for name in swappable}
    schemes = {name: scheme.layer(name) for name in swappable if max(widths[name], default=0) <= WIDEST_CODE}
    prepare_packed(skeleton, replace(scheme, default=FLOAT, overrides=schemes), dtype=torch.float32)


@dataclass(frozen=True)
class _Entry:
    """One tensor of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _list_tensors(packed: nn.Module, denoiser: nn.Module) -> dict[str, _Entry]:
    """What is written, by name; what stays float at the dtype that it has in the denoiser."""
    own = denoiser.state_dict()
    return {name: _Entry(own.get(name, value).dtype, tuple(value.shape)) for name, value in packed.state_dict().items()}


def _count_header(tensors: Mapping[str, _Entry]) -> int:
    """Bytes in front of the tensors of a safetensors file: its length, and their names, dtypes, shapes and places as JSON."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, entry in sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        end = begin + entry.size_bytes
        header[name] = {"dtype": DTYPES.get(entry.dtype, "F32"), "shape": entry.shape, "data_offsets": [begin, end]}
        begin = end
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-length // 8) * 8


def _cost_layer(
    name: str, role: Role, scheme: LayerScheme, shape: torch.Size, meter: _Meter, tensors: Mapping[str, _Entry], note: str
) -> LayerCost:
    own = [entry for tensor, entry in tensors.items() if tensor.startswith(f"{name}.")]
    bias = tensors.get(f"{name}.bias")
    return LayerCost(
        name=name, role=role, shape=tuple(shape), params=shape.numel() + (math.prod(bias.shape) if bias else 0),
        macs=meter.macs[name], num_inputs=meter.num_inputs[name], num_outputs=meter.num_outputs[name],
        weight_bits=scheme.weight_bits, act_bits=scheme.act_bits, size_bytes=sum(entry.size_bytes for entry in own),
        note=note, is_divided=any(trait.divides_input for trait in scheme.traits),
    )  # fmt: skip
