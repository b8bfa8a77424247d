"""Convolution of bytes by oneDNN, through the operators of torch's own quantizer. Needs no C compiler.

The operators are private to torch, so their output is checked before they are used. Weights take one byte each whatever their
bits, and are held twice: as signed bytes, and in oneDNN's order.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dmquant.kernels.conv_shape import ConvGeometry
from dmquant.kernels.operands import Operands
from dmquant.kernels.rounding import quantize

NAME = "onednn"
# weight -> {(input grid, geometry): weight in oneDNN's order}. The order depends on the input's grid, which a BlockedWeight does
# not know, so it cannot be made when the weight is blocked. An entry is freed with its weight; DMQUANT_KERNELS=torch avoids it.
PREPACKED = WeakTensorKeyDictionary()


def find_missing() -> str:
    """Returns "" if this torch has the operators, otherwise what is missing."""
    for name in ("qconv_prepack", "qconv_pointwise"):
        if not hasattr(torch.ops.onednn, name):
            return f"this torch has no onednn.{name}"
    return ""


def levels(bits: int) -> tuple[int, int]:
    """Returns (step, minimum) of level = step * code + minimum, such that symmetric grids need no zero point."""
    return (2, -1) if bits == 1 else (1, -(1 << (bits - 1)))


def is_centered(weight: Any) -> bool:
    """Returns whether the zero points of a packed weight are those of signed bytes; oneDNN supports no others."""
    zero = weight._buffers.get("zero")
    return zero is not None and bool(zero.eq(0.5 if weight.bits == 1 else 1 << (weight.bits - 1)).all())


def arrange(levels: Tensor) -> Tensor:
    """Returns levels (O, C, K) as signed bytes (1, O, C, K)."""
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
    grid, window = (float(act_scale), int(act_zero)), (list(geometry.stride), [top, left], [1, 1], 1)
    packed = prepack(operands.weight.weight, scale, grid, window, geometry.kernel_size, list(codes.shape))
    no_zeros = torch.zeros(len(scale), dtype=torch.int32)
    out = torch.ops.onednn.qconv_pointwise(
        codes, *grid, packed, scale, no_zeros, operands.bias, *window, 1.0, 0, torch.float32, "none", [], ""
    )  # fmt: skip
    return out.permute(0, 2, 3, 1)


def prepack(
    weight: Tensor, scale: Tensor, grid: tuple[float, int], window: tuple, kernel: tuple[int, ...], shape: list[int]
) -> Tensor:
    """Returns the weight (1, O, C, K) in oneDNN's order; it is made at the first call and cached."""
    made, key = PREPACKED.setdefault(weight, {}), (grid, repr(window))
    if key not in made:
        levels = weight[0].unflatten(2, kernel).contiguous()
        made.clear()  # a grid that has changed is not used again
        made[key] = torch.ops.onednn.qconv_prepack(levels, scale, *grid, *window, shape)
    return made[key]
