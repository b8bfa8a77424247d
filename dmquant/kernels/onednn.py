"""Bytes by oneDNN, through operators that torch has for its own quantizer: where there is no compiler.

The operators are private to torch, so they are tried before they are believed. Weights are held as bytes, whatever their bits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dmquant.quantizers.base import quantize

NAME = "onednn"


def state() -> str:
    """Empty if this torch has the operators, otherwise what is missing."""
    for name in ("qconv_prepack", "qconv_pointwise"):
        if not hasattr(torch.ops.onednn, name):
            return f"this torch has no onednn.{name}"
    return ""


def levels(bits: int) -> tuple[int, int]:
    """Level = step * code + least: without a shift on symmetric grids, for it knows none."""
    return (2, -1) if bits == 1 else (1, -(1 << (bits - 1)))


def arrange(levels: Tensor) -> Tensor:
    """Signed bytes (1, O, C, taps)."""
    return levels.to(torch.int8).unsqueeze(0)


def multiply(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, act_scale: Tensor, act_zero: Tensor, act_bits: int,
    window: Sequence[int],
) -> Tensor:  # fmt: skip
    """As ops.multiply, for weights without shift and one grid of activations: x (N, H, W, C) -> (N, H', W', O)."""
    kernel, stride, (top, bottom, left, right) = window[:2], window[2:4], window[4:]
    codes = quantize(x.permute(0, 3, 1, 2), act_scale, act_zero, act_bits)
    if top != bottom or left != right:
        codes = torch.nn.functional.pad(codes, (left, right, top, bottom), value=float(act_zero))
        top = left = 0
    codes = codes.to(torch.uint8).contiguous(memory_format=torch.channels_last)
    grid, place = (float(act_scale), int(act_zero)), (list(stride), [top, left], [1, 1], 1)
    levels = weight[0].unflatten(2, tuple(kernel)).contiguous()
    packed = torch.ops.onednn.qconv_prepack(levels, scale, *grid, *place, list(codes.shape))
    no_zeros = torch.zeros(len(scale), dtype=torch.int32)
    out = torch.ops.onednn.qconv_pointwise(
        codes, *grid, packed, scale, no_zeros, bias, *place, 1.0, 0, torch.float32, "none", [], ""
    )  # fmt: skip
    return out.permute(0, 2, 3, 1)
