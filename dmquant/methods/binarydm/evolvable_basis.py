"""The Evolvable-Basis Binarizer (EBB) of BinaryDM: two binary bases at the start of training, one at its end."""

import torch
from torch import Tensor

from dmquant.kernels.rounding import widen
from dmquant.nn.packed_weight import Bases
from dmquant.quantizers.base import SMALLEST_SCALE, BasisCodes, Codes
from dmquant.quantizers.binary import Binary, ScaledSign
from dmquant.quantizers.traits import GridTrait


class EvolvableBasis(Binary):
    """Quantizes w to scale * sign(w) + second_scale * sign(w - scale * sign(w)), four values per channel. BinaryDM, eq. 5.

    `bits` is the number of bases; with one, it equals `Binary`. Scales start at mean |w| and mean |residual| per channel.
    Gradients are those of autograd through both signs; eq. 7 of the paper has one sign(w) too many.
    """

    def __init__(self, *, num_channels: int, ndim: int = 4):
        super().__init__(num_channels=num_channels, ndim=ndim)
        self.second_scale = torch.nn.Parameter(torch.ones_like(self.scale))
        self.bits = 2  # one per basis

    @property
    def traits(self) -> tuple[GridTrait, ...]:
        return (Bases(),) if self.bits > 1 else ()

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        super().observe(x)
        rest = x - super().forward(x)
        self.second_scale.copy_(rest.abs().reshape(self.scale.numel(), -1).mean(1).view_as(self.scale))

    def forward(self, x: Tensor) -> Tensor:
        first = super().forward(x)
        return first if self.bits == 1 else first + ScaledSign.apply(x - first, self.second_scale)

    def encode(self, x: Tensor) -> Codes | BasisCodes:
        if self.bits == 1:
            return super().encode(x)
        first, second = (x >= 0).to(torch.uint8), (x - super().forward(x) >= 0).to(torch.uint8)
        scales = [widen(scale).clamp(min=SMALLEST_SCALE) for scale in (self.scale, self.second_scale)]
        return BasisCodes(first | second << 1, torch.stack(scales))
