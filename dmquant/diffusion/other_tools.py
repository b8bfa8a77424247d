"""Bits and stored bytes of denoisers that other tools quantized.

optimum-quanto replaces torch's layers, torchao replaces the weight tensors of layers, bitsandbytes does both. None of these
packages is imported: classes are recognised by their module names, and read through their public attributes.
"""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from dmquant.diffusion.layer_roles import named_layers

FLOAT_BITS = 32
TOOLS = {"optimum.quanto": "quanto", "torchao": "torchao", "bitsandbytes": "bitsandbytes"}  # package -> name in reports
DYNAMIC_BITS = 8  # of activations that torchao and bitsandbytes quantize at run time; they have no other width


def find_tool(denoiser: nn.Module) -> str | None:
    """Returns the name of the tool that quantized some of the layers, None for no known tool."""
    return next((tool for layer in named_layers(denoiser).values() if (tool := _find_maker(layer))), None)


def layer_bits(layer: Any) -> tuple[int, int] | None:
    """Returns weight and activation bits of a layer that another tool quantized, None for any other layer."""
    tool = _find_maker(layer)
    if tool == "quanto":
        return _read_qtype(layer, "weight_qtype"), _read_qtype(layer, "activation_qtype")
    if tool is None:
        return None
    weight = layer.weight
    codes = max(stored_tensors(weight), key=lambda tensor: tensor.nbytes)
    # target_dtype names the grid, which may be narrower than its storage: torch.int4 in an int8 tensor
    named = re.search(r"int(\d)$", str(getattr(weight, "target_dtype", "")))
    stored = 8 * codes.nbytes // (layer.in_features * layer.out_features)
    is_dynamic = any(getattr(weight, name, None) is not None for name in ("act_quant_kwargs", "activation_quantization"))
    is_int8 = type(layer).__name__ == "Linear8bitLt"
    return int(named[1]) if named else stored, DYNAMIC_BITS if is_dynamic or is_int8 else FLOAT_BITS


def describe(denoiser: nn.Module) -> dict[str, Any]:
    """Returns the fields of a report for another tool: its name, and the bits of most weights that it quantized."""
    tool = find_tool(denoiser)
    if tool is None:
        return {}
    weights: Counter[tuple[int, int]] = Counter()
    for layer in named_layers(denoiser).values():
        bits = layer_bits(layer)
        if bits is not None:
            weights[bits] += _count_weights(layer)
    weight_bits, act_bits = weights.most_common(1)[0][0]
    return {"method": tool, "weight_bits": weight_bits, "act_bits": act_bits}


def _count_weights(layer: Any) -> int:
    return layer.in_features * layer.out_features if hasattr(layer, "in_features") else layer.weight.numel()


def count_bytes(denoiser: nn.Module) -> int:
    """Returns the bytes of all tensors of the state dict, codes as they are packed, without the header of a file."""
    return sum(tensor.nbytes for value in denoiser.state_dict().values() for tensor in stored_tensors(value))


def stored_tensors(value: Any) -> Iterator[Tensor]:
    """Yields the plain tensors that a tensor consists of: itself if it is plain, none for other values."""
    if not isinstance(value, Tensor):
        return
    if type(value) in (Tensor, nn.Parameter) or not hasattr(value, "__tensor_flatten__"):
        yield value.detach().as_subclass(Tensor)
        return
    for name in value.__tensor_flatten__()[0]:
        yield from stored_tensors(getattr(value, name))


def _find_maker(layer: nn.Module) -> str | None:
    """Returns the tool whose package defines the class of a layer or of its weight."""
    homes = [kind.__module__ for part in (layer, layer.weight) for kind in type(part).__mro__]
    return next((tool for package, tool in TOOLS.items() for home in homes if f"{home}.".startswith(f"{package}.")), None)


def _read_qtype(layer: nn.Module, name: str) -> int:
    qtype = getattr(layer, name, None)
    return FLOAT_BITS if qtype is None else qtype.bits
