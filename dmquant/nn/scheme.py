"""How layers are stored: bits, and what is said where a grid is not uniform and static."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from dmquant.quantizers.dilated import DILATED
from dmquant.quantizers.per_part import HEADS, SPLIT, is_split
from dmquant.quantizers.per_timestep import TEMPORAL
from dmquant.quantizers.timestep_clock import NEAREST

FLOAT_BITS = 32
Bits = tuple[int, int]  # of weights, of activations
BASES = "bases"  # every bit plane of the weight is a binary basis with a scale of its own
KINDS = (BASES, TEMPORAL, DILATED, SPLIT, HEADS)


class Format(NamedTuple):
    """How a layer is stored: bits of weights and of activations, and in what its grids are not uniform and static."""

    weight_bits: int
    act_bits: int
    kinds: tuple[str, ...] = ()


FLOAT = Format(FLOAT_BITS, FLOAT_BITS)


def is_kind(text: object) -> bool:
    """Whether this is a kind that layers are stored in."""
    return isinstance(text, str) and (is_split(text) or (text in KINDS and text != SPLIT))


class Timing(NamedTuple):
    """How many calibrated timesteps the tables of temporal grids have, and how timesteps between them are looked up."""

    num_steps: int
    lookup: str = NEAREST


@dataclass(frozen=True)
class Layout:
    """The format of each layer. The names of the overrides are layers, `*` in them any number: blocks.*.conv1."""

    default: Format
    overrides: Mapping[str, Format] = field(default_factory=dict)
    attention_bits: int = FLOAT_BITS  # of the factors of attention products
    attention_kinds: tuple[str, ...] = ()  # in what their grids are not uniform and static
    timing: Timing | None = None  # of a denoiser with temporal grids

    def format(self, name: str) -> Format:
        return self.overrides.get(name, self.overrides.get(generalize(name), self.default))

    def unused(self, names: list[str]) -> set[str]:
        """Overrides that speak of none of these layers."""
        return set(self.overrides) - set(names) - set(map(generalize, names))


def generalize(name: str) -> str:
    """A name with `*` for every number in it."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
