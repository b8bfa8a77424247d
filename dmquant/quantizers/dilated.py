"""Quantizers of a tensor whose input channels were scaled first: weights dilated by a factor, what they read divided by it.

(x / s) (s W) = x W: the factor changes nothing but grids. That of the weights stays, that of the inputs becomes finer.
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
    """inner(s W): the factor is part of the codes, nothing of it is stored."""

    factor: Tensor

    def __init__(self, inner: Quantizer, channels: int, groups: int = 1):
        super().__init__()
        self.inner, self.groups, self.bits = inner, groups, inner.bits
        self.register_buffer("factor", torch.ones(channels))  # of each input channel of the layer

    @property
    def traits(self) -> tuple[GridTrait, ...]:
        return traits_of(self.inner)

    def dilate(self, weight: Tensor) -> Tensor:
        return weight * spread(self.factor, weight, self.groups)

    def observe(self, x: Tensor) -> None:
        self.inner.observe(self.dilate(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.dilate(x))

    def encode(self, x: Tensor) -> Codes | BasisCodes:
        return self.inner.encode(self.dilate(x))


class Divide(Float32Buffers):
    """Each channel times a reciprocal (C,). `trailing` is the number of dimensions behind the channels: 0 for a linear layer."""

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
        """The same for so many channels from a place on, in the same memory."""
        part = Divide(channels, self.trailing, self.reciprocal.device)
        part.reciprocal = self.reciprocal[place : place + channels]
        return part


class DilatedInput(Quantizer):
    """inner(x / s). Its codes are those of the quotient, and so is the tensor it gives: the weight has the factor."""

    def __init__(self, inner: Quantizer, channels: int, trailing: int):
        super().__init__()
        self.divide, self.inner, self.bits = Divide(channels, trailing), inner, inner.bits

    @property
    def clock(self) -> Clock | None:
        return getattr(self.inner, "clock", None)

    @property
    def traits(self) -> tuple[GridTrait, ...]:
        """A layer of which no channel is dilated is stored like any other."""
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
        """The grid of the quotient: a packed layer divides by itself."""
        return self.inner.freeze()


def spread(factor: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
    """A factor for each input channel of a layer (C,), as it broadcasts against its weight (O, C / groups, ...)."""
    rows = factor.view(groups, -1).repeat_interleave(len(weight) // groups, 0) if groups > 1 else factor.view(1, -1)
    return rows.view(*rows.shape, *(1,) * (weight.ndim - 2)).to(weight.dtype)
