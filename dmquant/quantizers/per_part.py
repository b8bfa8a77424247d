"""A tensor of several parts along its channels, each on a grid of its own: two feature maps in one, or the heads of attention.

What an up block of a UNet reads is a concatenation: one part comes from below, the other over a skip, and they differ in range.
The split shortcuts of Q-Diffusion (Li et al., 2023), which EDA-DM and DilateQuant take over; theirs split the weight's grid too.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from dmquant.quantizers.base import Codes, FixedGrid, Quantizer
from dmquant.quantizers.timestep_clock import Clock
from dmquant.quantizers.traits import GridSite, GridTrait, traits_of

Grid = TypeVar("Grid", Quantizer, FixedGrid)


@dataclass(frozen=True)
class PerPart(GridTrait):
    """The input of a layer is on two grids: one for its first channels, one for the rest. Stored as split:<first_channels>."""

    name = "split"
    first_channels: int

    @property
    def text(self) -> str:
        return f"{self.name}:{self.first_channels}"

    @classmethod
    def parse(cls, text: str) -> Self | None:
        name, _, count = text.partition(":")
        is_count = count.isascii() and count.isdecimal() and count[0] != "0" and len(count) < 10
        return cls(int(count)) if name == cls.name and is_count else None

    def make_grid(self, make_part: Callable[[], FixedGrid], site: GridSite) -> nn.Module:
        return SplitGrid([make_part(), make_part()], (self.first_channels, site.channels - self.first_channels))


@dataclass(frozen=True)
class PerHead(GridTrait):
    """Each head of a factor of an attention product is on a grid of its own."""

    name = "heads"

    def make_grid(self, make_part: Callable[[], FixedGrid], site: GridSite) -> nn.Module:
        return HeadGrids([make_part() for _ in range(site.channels)])


class Parts(nn.Module, Generic[Grid]):
    """Slices of dimension 1, with so many `channels` each, on their own grids. All have the same number of bits."""

    def __init__(self, parts: Iterable[Grid], channels: Sequence[int]):
        super().__init__()
        self.parts, self.channels = nn.ModuleList(parts), tuple(channels)
        if len(self.parts) != len(self.channels) or not self.channels or min(self.channels) < 1:
            raise ValueError(f"give each part a grid and channels, got {len(self.parts)} grids for {self.channels}")
        if len({part.bits for part in self.grids}) > 1:
            raise ValueError(f"the parts of a tensor have equally many bits, got {[part.bits for part in self.grids]}")
        self.bits = self.grids[0].bits

    @property
    def grids(self) -> Sequence[Grid]:
        """The parts as what they are; torch's ModuleList knows modules only."""
        return cast(Sequence[Grid], self.parts)

    @property
    def trait(self) -> GridTrait:
        return PerPart(self.channels[0])

    @property
    def traits(self) -> tuple[GridTrait, ...]:
        return (*traits_of(self.parts[0]), self.trait)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(piece) for part, piece in self.pairs(x)], 1)

    def pairs(self, x: Tensor) -> Iterator[tuple[Grid, Tensor]]:
        """Each part with its slice (B, c, ...) of the tensor."""
        return zip(self.grids, x.split(self.channels, 1))

    def extra_repr(self) -> str:
        return f"channels={self.channels}"


class SplitGrid(Parts[FixedGrid]):
    """The grids for inference."""


class Split(Parts[Quantizer], Quantizer):
    """Quantizers for the parts of a tensor."""

    @property
    def clock(self) -> Clock | None:
        return getattr(self.parts[0], "clock", None)

    def leaves(self, x: Tensor) -> Iterator[tuple[Quantizer, Tensor]]:
        for part, piece in self.pairs(x):
            yield from part.leaves(piece)

    def observe(self, x: Tensor) -> None:
        for part, piece in self.pairs(x):
            part.observe(piece)

    def encode(self, x: Tensor) -> Codes:
        """Codes with a scale and a zero for each channel: (1 or B, C, 1, ...)."""
        pieces = [cast(Codes, part.encode(piece)) for part, piece in self.pairs(x)]
        scale, zero = (
            torch.cat([_per_channel(values, size, x.ndim) for values, size in zip(tables, self.channels)], 1)
            for tables in ([piece.scale for piece in pieces], [piece.zero for piece in pieces])
        )
        return Codes(torch.cat([piece.codes for piece in pieces], 1), scale, zero, self.bits)

    def freeze(self) -> SplitGrid:
        return SplitGrid(self.freeze_parts(), self.channels)

    def freeze_parts(self) -> list[FixedGrid]:
        """The parts for inference: each has a grid for the whole tensor, or one per timestep."""
        return cast(list[FixedGrid], [part.freeze() for part in self.grids])


class HeadGrids(SplitGrid):
    """A grid for each head of an attention, whose factors are (B, heads, N, C)."""

    trait = PerHead()

    def __init__(self, parts: Sequence[FixedGrid]):
        super().__init__(parts, (1,) * len(parts))


class Heads(Split):
    """A quantizer for each head of an attention, whose factors are (B, heads, N, C)."""

    trait = PerHead()

    def __init__(self, parts: Sequence[Quantizer]):
        super().__init__(parts, (1,) * len(parts))

    def freeze(self) -> HeadGrids:
        return HeadGrids(self.freeze_parts())


def _per_channel(values: Tensor, size: int, ndim: int) -> Tensor:
    """One value, or one per sample, for each of `size` channels: (1 or B, size, 1, ...)."""
    rows = values.reshape(-1, *(1,) * (ndim - 1))
    return rows.expand(-1, size, *(-1,) * (ndim - 2))
