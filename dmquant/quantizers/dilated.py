"""Quantizers for dilated layers: the weight is multiplied by a factor per input channel, the input is divided by it.

(x / s) (s W) = x W, so the factor s changes the quantization grids only: the grid of the inputs becomes finer.
DilateQuant (Liu et al., 2024), eq. 5-9.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dmquant.quantizers.base import BasisCodes, Codes, Float32Buffers, Quantizer
from dmquant.quantizers.timestep_clock import Clock
from dmquant.quantizers.traits import GridTrait, traits_of


@dataclass(frozen=True)
class Dilated(GridTrait):
    """The layer divides its input, channel by channel, before it quantizes it."""

    name = "dilated"
    divides_input = True


class DilatedWeight(Quantizer):
    """Quantizes s W with `inner`. The codes contain the factor, so it is not stored."""

    factor: Tensor

    def __init__(self, inner: Quantizer, channels: int, groups: int = 1):
        super().__init__()
        self.inner, self.groups, self.bits = inner, groups, inner.bits
        self.register_buffer("factor", torch.ones(channels))  # per input channel of the layer

    @property
    def traits(self) -> tuple[GridTrait, ...]:
        return traits_of(self.inner)

    def dilate(self, weight: Tensor) -> Tensor:
        """Returns s W."""
        return weight * spread(self.factor, weight, self.groups)

    def observe(self, x: Tensor) -> None:
        self.inner.observe(self.dilate(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.dilate(x))

    def encode(self, x: Tensor) -> Codes | BasisCodes:
        return self.inner.encode(self.dilate(x))


class Divide(Float32Buffers):
    """Multiplies each channel by a reciprocal (C,). `trailing` counts the dimensions after the channels: 0 for a linear layer."""

    traits = (Dilated(),)
    reciprocal: Tensor

    def __init__(self, channels: int, trailing: int, device: torch.device | str | None = None):
        super().__init__()
        self.trailing = trailing
        self.register_buffer("reciprocal", torch.ones(channels, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.reciprocal.view(-1, *(1,) * self.trailing).to(x.dtype)

    def find_fault(self, name: str, value: Tensor) -> str | None:
        return None if (value > 0).all() else f"holds a {name} that is not positive"

    def cut(self, place: int, channels: int) -> "Divide":
        """Returns the module for `channels` channels from index `place` on. It shares the memory."""
        part = Divide(channels, self.trailing, self.reciprocal.device)
        part.reciprocal = self.reciprocal[place : place + channels]
        return part


class DilatedInput(Quantizer):
    """Quantizes x / s with `inner` and returns the quotient: the factor is part of the weight."""

    def __init__(self, inner: Quantizer, channels: int, trailing: int):
        super().__init__()
        self.divide, self.inner, self.bits = Divide(channels, trailing), inner, inner.bits

    @property
    def clock(self) -> Clock | None:
        return getattr(self.inner, "clock", None)

    @property
    def traits(self) -> tuple[GridTrait, ...]:
        """Those of `inner`, and `Dilated` if the factor of some channel is not 1."""
        own = (Dilated(),) if bool(self.divide.reciprocal.ne(1).any()) else ()
        return (*traits_of(self.inner), *own)

    def leaves(self, x: Tensor) -> Iterator[tuple[Quantizer, Tensor]]:
        yield from self.inner.leaves(self.divide(x))

    def observe(self, x: Tensor) -> None:
        self.inner.observe(self.divide(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.divide(x))

    def encode(self, x: Tensor) -> Codes | BasisCodes:
        return self.inner.encode(self.divide(x))

    def freeze(self) -> nn.Module:
        """Returns the grid of the quotient. The packed layer has a `Divide` of its own."""
        return self.inner.freeze()


def spread(factor: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
    """Returns a factor per input channel (C,) in a shape that broadcasts against the weight (O, C / groups, ...)."""
    rows = factor.view(groups, -1).repeat_interleave(len(weight) // groups, 0) if groups > 1 else factor.view(1, -1)
    return rows.view(*rows.shape, *(1,) * (weight.ndim - 2)).to(weight.dtype)
