"""The rounding expression of quantizers and kernels."""

import torch
from torch import Tensor


def quantize(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Returns codes as floats: clip(round(x * (1 / scale)) + zero, 0, 2^bits - 1), ties to even.

    Kernels use the same expression: with a division instead of the reciprocal, values near a tie would get other codes.
    """
    codes = x.mul(scale.reciprocal())
    return codes.round_().add_(zero).clamp_(0, (1 << bits) - 1)


def widen(x: Tensor) -> Tensor:
    """Returns half-precision tensors as float32, because a grid of 256 codes is finer than their mantissa; others unchanged."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
