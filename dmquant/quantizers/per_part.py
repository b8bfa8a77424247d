"""Quantizers and grids for tensors whose parts along dimension 1 have grids of their own: concatenated inputs, attention heads.

The up blocks of a UNet concatenate features of the block below with features of a skip connection, which differ in range. Split
shortcuts: Q-Diffusion (Li et al., 2023), also in EDA-DM and DilateQuant. We split the grid of the input only, they also split
that of the weight.
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
    """Quantizes slices of dimension 1, of `channels` entries each, on their own grids, all with the same number of bits."""

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
        """The parts with their type; torch's ModuleList is typed as modules."""
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
        """Yields each part with its slice (B, c, ...) of the tensor."""
        return zip(self.grids, x.split(self.channels, 1))

    def extra_repr(self) -> str:
        return f"channels={self.channels}"


class SplitGrid(Parts[FixedGrid]):
    """Grids for the parts of a tensor, for inference."""


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
        """Returns codes with a scale and a zero per channel: (1 or B, C, 1, ...)."""
        pieces = [cast(Codes, part.encode(piece)) for part, piece in self.pairs(x)]
        scale, zero = (
            torch.cat([_per_channel(values, size, x.ndim) for values, size in zip(tables, self.channels)], 1)
            for tables in ([piece.scale for piece in pieces], [piece.zero for piece in pieces])
        )
        return Codes(torch.cat([piece.codes for piece in pieces], 1), scale, zero, self.bits)

    def freeze(self) -> SplitGrid:
        return SplitGrid(self.freeze_parts(), self.channels)

    def freeze_parts(self) -> list[FixedGrid]:
        """Returns the grids of the parts for inference, each static or per timestep."""
        return cast(list[FixedGrid], [part.freeze() for part in self.grids])


class HeadGrids(SplitGrid):
    """A grid per head for factors of attention products (B, heads, N, C), for inference."""

    trait = PerHead()

    def __init__(self, parts: Sequence[FixedGrid]):
        super().__init__(parts, (1,) * len(parts))


class Heads(Split):
    """A quantizer per head for factors of attention products (B, heads, N, C)."""

    trait = PerHead()

    def __init__(self, parts: Sequence[Quantizer]):
        super().__init__(parts, (1,) * len(parts))

    def freeze(self) -> HeadGrids:
        return HeadGrids(self.freeze_parts())


def _per_channel(values: Tensor, size: int, ndim: int) -> Tensor:
    """Returns one value, or one per sample, repeated for `size` channels: (1 or B, size, 1, ...)."""
    rows = values.reshape(-1, *(1,) * (ndim - 1))
    return rows.expand(-1, size, *(-1,) * (ndim - 2))
