"""."""

import torch
from torch import Tensor


def quantize(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Codes as floats: clip(round(x * (1 / scale)) + zero, 0, 2^bits - 1), ties to even.

    The one rounding expression of the project: kernels use the same, or ties would fall apart.
    """
    codes = x.mul(scale.reciprocal())
    return codes.round_().add_(zero).clamp_(0, (1 << bits) - 1)


def widen(x: Tensor) -> Tensor:
    """Half precisions in float32: a grid of 256 codes is finer than their mantissa."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
