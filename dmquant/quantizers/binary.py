"""Binary weights: a sign per weight and a learned scale per output channel."""

import torch
from torch import Tensor, nn

from dmquant.kernels.rounding import widen
from dmquant.quantizers.base import SMALLEST_SCALE, BasisCodes, Codes, Context, Quantizer


class Binary(Quantizer):
    """Returns scale * sign(w) with sign(0) = +1 and one scale per slice of dimension 0, calibrated to mean |w|.

    XNOR-Net (Rastegari et al., 2016); the learnable-scale baseline of BinaryDM, section 3.1. The straight-through gradient
    passes where |w| <= 1.
    """

    bits = 1

    def __init__(self, *, num_channels: int, ndim: int = 4):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(num_channels, *(1,) * (ndim - 1)))

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        self.scale.copy_(x.abs().reshape(self.scale.numel(), -1).mean(1).view_as(self.scale))

    def forward(self, x: Tensor) -> Tensor:
        return ScaledSign.apply(x, self.scale)

    def grid(self) -> tuple[Tensor, Tensor]:
        """Returns a step of 2 * scale and a zero of 1/2: the codes {0, 1} decode to {-scale, +scale}."""
        scale = widen(self.scale).clamp(min=SMALLEST_SCALE)
        return 2 * scale, torch.full_like(scale, 0.5)

    def encode(self, x: Tensor) -> Codes | BasisCodes:
        scale, zero = self.grid()
        return Codes((x >= 0).to(torch.uint8), scale, zero, 1)


class ScaledSign(torch.autograd.Function):
    """Returns scale * sign(x); the gradient of x is straight-through where |x| <= 1."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, scale: Tensor) -> Tensor:
        scale = widen(scale).clamp(min=SMALLEST_SCALE)
        ctx.save_for_backward(x, scale)
        return torch.where(x >= 0, scale, -scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, scale = ctx.saved_tensors
        by_scale = torch.where(x >= 0, gradient, -gradient).sum_to_size(scale.shape)
        return torch.where(x.abs() <= 1, gradient * scale, 0).to(x.dtype), by_scale
