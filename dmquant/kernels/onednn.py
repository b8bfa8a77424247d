"""Bytes by oneDNN, through operators that torch has for its own quantizer: where there is no compiler.

The operators are private to torch, so they are tried before they are believed. Weights are held as bytes, whatever their bits,
twice: as they were stored, and as oneDNN wants them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dmquant.kernels.conv_shape import ConvGeometry
from dmquant.kernels.operands import Operands
from dmquant.kernels.rounding import quantize

NAME = "onednn"
PREPACKED = WeakTensorKeyDictionary()  # levels -> what oneDNN makes of them, by grid and window; gone with the levels


def find_missing() -> str:
    """Empty if this torch has the operators, otherwise what is missing."""
    for name in ("qconv_prepack", "qconv_pointwise"):
        if not hasattr(torch.ops.onednn, name):
            return f"this torch has no onednn.{name}"
    return ""


def levels(bits: int) -> tuple[int, int]:
    """Level = step * code + least: without a shift on symmetric grids, for it knows none."""
    return (2, -1) if bits == 1 else (1, -(1 << (bits - 1)))


def is_centered(weight: Any) -> bool:
    """Whether the zeros of codes are those of signed bytes: oneDNN knows no other."""
    zero = weight._buffers.get("zero")
    return zero is not None and bool(zero.eq(0.5 if weight.bits == 1 else 1 << (weight.bits - 1)).all())


def arrange(levels: Tensor) -> Tensor:
    """Signed bytes (1, O, C, taps)."""
    return levels.to(torch.int8).unsqueeze(0)


def conv(x: Tensor, operands: Operands, geometry: ConvGeometry) -> Tensor:
    """Computes ops.quantized_conv for a weight without zero points and one input grid: x (B, H, W, C) -> (B, H', W', O)."""
    act_scale, act_zero, (top, bottom, left, right) = operands.act_scale, operands.act_zero, geometry.padding
    codes = quantize(x.permute(0, 3, 1, 2), act_scale, act_zero, operands.act_bits)
    if top != bottom or left != right:
        codes = torch.nn.functional.pad(codes, (left, right, top, bottom), value=float(act_zero))
        top = left = 0
    codes = codes.to(torch.uint8).contiguous(memory_format=torch.channels_last)
    scale = operands.scale.view(-1) * (0.5 if operands.weight.half_scale else 1)
    grid, place = (float(act_scale), int(act_zero)), (list(geometry.stride), [top, left], [1, 1], 1)
    packed = prepack(operands.weight.weight, scale, grid, place, geometry.kernel_size, list(codes.shape))
    no_zeros = torch.zeros(len(scale), dtype=torch.int32)
    out = torch.ops.onednn.qconv_pointwise(
        codes, *grid, packed, scale, no_zeros, operands.bias, *place, 1.0, 0, torch.float32, "none", [], ""
    )  # fmt: skip
    return out.permute(0, 2, 3, 1)


def prepack(
    weight: Tensor, scale: Tensor, grid: tuple[float, int], place: tuple, kernel: tuple[int, ...], shape: list[int]
) -> Tensor:
    """The weight in oneDNN's own order, made at the first call."""
    made, key = PREPACKED.setdefault(weight, {}), (grid, repr(place))
    if key not in made:
        levels = weight[0].unflatten(2, kernel).contiguous()
        made.clear()  # a grid that has changed does not come back
        made[key] = torch.ops.onednn.qconv_prepack(levels, scale, *grid, *place, shape)
    return made[key]
