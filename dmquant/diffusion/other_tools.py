"""Denoisers that another tool has quantized: at which bits their layers run, and what they weigh as they are stored.

optimum-quanto puts layers of its own in place of torch's, torchao tensors of its own into torch's layers, bitsandbytes both.
None of them is imported: they are known by the modules that their classes come from, and read by what these say of themselves.
"""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from dmquant.diffusion.layer_roles import named_layers

FLOAT_BITS = 32
TOOLS = {"optimum.quanto": "quanto", "torchao": "torchao", "bitsandbytes": "bitsandbytes"}  # packages -> names in a table
DYNAMIC_BITS = 8  # of activations that torchao and bitsandbytes quantize while running; no other width is on offer


def find_tool(denoiser: nn.Module) -> str | None:
    """The tool that quantized some of the layers; None where none of the tools known here did."""
    return next((tool for layer in named_layers(denoiser).values() if (tool := _find_maker(layer))), None)


def layer_bits(layer: Any) -> tuple[int, int] | None:
    """Weight and activation bits of a layer that another tool quantized; None of any other."""
    tool = _find_maker(layer)
    if tool == "quanto":
        return _read_qtype(layer, "weight_qtype"), _read_qtype(layer, "activation_qtype")
    if tool is None:
        return None
    weight = layer.weight
    codes = max(stored_tensors(weight), key=lambda tensor: tensor.nbytes)
    # a target_dtype names a grid narrower than the integers that hold it: torch.int4 in an int8 tensor
    named = re.search(r"int(\d)$", str(getattr(weight, "target_dtype", "")))
    stored = 8 * codes.nbytes // (layer.in_features * layer.out_features)
    is_dynamic = any(getattr(weight, name, None) is not None for name in ("act_quant_kwargs", "activation_quantization"))
    is_int8 = type(layer).__name__ == "Linear8bitLt"
    return int(named[1]) if named else stored, DYNAMIC_BITS if is_dynamic or is_int8 else FLOAT_BITS


def describe(denoiser: nn.Module) -> dict[str, Any]:
    """The fields of a report that say what another tool made: its name, and the bits of most weights that it quantized."""
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
    """Bytes of everything in the state dict, codes as they are packed; names and shapes of a file's header are not in it."""
    return sum(tensor.nbytes for value in denoiser.state_dict().values() for tensor in stored_tensors(value))


def stored_tensors(value: Any) -> Iterator[Tensor]:
    """The plain tensors that a tensor is made of; itself, where it is one. What is no tensor has none."""
    if not isinstance(value, Tensor):
        return
    if type(value) in (Tensor, nn.Parameter) or not hasattr(value, "__tensor_flatten__"):
        yield value.detach().as_subclass(Tensor)
        return
    for name in value.__tensor_flatten__()[0]:
        yield from stored_tensors(getattr(value, name))


def _find_maker(layer: nn.Module) -> str | None:
    """The tool that a layer or its weight comes from."""
    homes = [kind.__module__ for part in (layer, layer.weight) for kind in type(part).__mro__]
    return next((tool for package, tool in TOOLS.items() for home in homes if f"{home}.".startswith(f"{package}.")), None)


def _read_qtype(layer: nn.Module, name: str) -> int:
    qtype = getattr(layer, name, None)
    return FLOAT_BITS if qtype is None else qtype.bits
