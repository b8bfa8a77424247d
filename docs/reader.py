"""Reads the weights of a quantized denoiser with torch and safetensors alone. file-format.md specifies what it reads.

The shapes are those of the float model's parameters, {"conv_in.weight": (48, 3, 3, 3), ...}:

    float_model.load_state_dict(read_weights("out/unet", shapes))
"""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


def read_weights(folder: str | Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Returns the parameters of the float model by name, with the values that the quantized model computes with."""
    config = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
    if (config["quant_method"], config["format_version"]) != ("dmquant", 1):
        raise ValueError(f"expected dmquant, format version 1, got {config['quant_method']}, {config['format_version']}")
    stored = {name: tensor for file in Path(folder).glob("*.safetensors") for name, tensor in load_file(file).items()}
    return {name: read_parameter(stored, config, name, shape) for name, shape in shapes.items()}


def read_parameter(stored: dict[str, Tensor], config: dict, name: str, shape: tuple[int, ...]) -> Tensor:
    """Returns one parameter: as it is stored where it is float, decoded where it is quantized."""
    layer = name.removesuffix(".weight")
    weight = stored[name] if name in stored else decode(stored, find_traits(config, layer), name, shape)
    reciprocal = stored.get(f"{layer}.divide.reciprocal")  # the layer multiplies its input by it, so the weight absorbs it
    if reciprocal is None:
        return weight
    groups = len(reciprocal) // shape[1]
    rows = reciprocal.view(groups, 1, shape[1]).expand(groups, shape[0] // groups, shape[1]).reshape(shape[0], shape[1])
    return weight * rows.view(*shape[:2], *(1,) * (len(shape) - 2))


def find_traits(config: dict, layer: str) -> list[str]:
    """Returns the traits of a layer: its own entry in overrides, the entry of its pattern, or the default."""
    pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", layer)
    overrides = config["overrides"]
    return next((overrides[key][2:] for key in (layer, pattern) if key in overrides), config["kinds"])


def decode(stored: dict[str, Tensor], traits: list[str], name: str, shape: tuple[int, ...]) -> Tensor:
    """Returns a quantized weight of the given shape in float32."""
    column = (-1, *(1,) * (len(shape) - 1))  # one value per output channel
    planes, scale = unpack(stored[f"{name}.codes"], shape), stored[f"{name}.scale"]
    if "bases" in traits:
        return sum(torch.where(plane == 1, s.view(column), -s.view(column)) for plane, s in zip(planes, scale))
    codes = sum(plane.float() * 2**bit for bit, plane in enumerate(planes))
    return (codes - stored[f"{name}.zero"].view(column)) * scale.view(column)


def unpack(planes: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Returns the bits (bits, *shape) of codes from their bit planes (bits, bytes), lowest bit first."""
    bits = planes.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1
    return bits.flatten(1)[:, : torch.Size(shape).numel()].reshape(-1, *shape)
