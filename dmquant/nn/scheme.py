"""How layers are stored: `LayerScheme` (bits and grid traits of a layer), `Scheme` (of a denoiser), `TRAITS` (the registry)."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from dmquant.nn.packed_weight import Bases
from dmquant.quantizers.dilated import Dilated
from dmquant.quantizers.per_part import PerHead, PerPart
from dmquant.quantizers.per_timestep import PerTimestep
from dmquant.quantizers.timestep_clock import NEAREST
from dmquant.quantizers.traits import GridTrait

FLOAT_BITS = 32
Bits = tuple[int, int]  # of weights, of activations
# Every trait that a stored layer can have, in the order in which they are written and applied. quantization_config calls them
# "kinds".
TRAITS: tuple[type[GridTrait], ...] = (Bases, PerTimestep, Dilated, PerPart, PerHead)


class LayerScheme(NamedTuple):
    """How a layer is stored: bits of weights and of activations, and the traits of its grids in the order of `TRAITS`."""

    weight_bits: int
    act_bits: int
    traits: tuple[GridTrait, ...] = ()


FLOAT = LayerScheme(FLOAT_BITS, FLOAT_BITS)


def parse_trait(text: object) -> GridTrait | None:
    """Returns the trait that quantization_config writes as this text; None if there is none."""
    found = (trait.parse(text) for trait in TRAITS) if isinstance(text, str) else iter(())
    return next((trait for trait in found if trait is not None), None)


def sort_traits(traits: Iterable[GridTrait]) -> tuple[GridTrait, ...]:
    """Returns the traits in the order of `TRAITS`."""
    return tuple(sorted(traits, key=lambda trait: TRAITS.index(type(trait))))


class Timing(NamedTuple):
    """The number of calibrated timesteps of grids per timestep, and the lookup for timesteps between them."""

    num_steps: int
    lookup: str = NEAREST


@dataclass(frozen=True)
class Scheme:
    """How the layers of a denoiser are stored. The keys of `overrides` are layers; `*` in them is any number: blocks.*.conv1."""

    default: LayerScheme
    overrides: Mapping[str, LayerScheme] = field(default_factory=dict)
    attention_bits: int = FLOAT_BITS  # of the factors of attention products
    attention_traits: tuple[GridTrait, ...] = ()  # of the grids of these factors
    timing: Timing | None = None  # of a denoiser with grids per timestep

    def layer(self, name: str) -> LayerScheme:
        """Returns the scheme of the layer with this name."""
        return self.overrides.get(name, self.overrides.get(generalize(name), self.default))

    def unused(self, names: list[str]) -> set[str]:
        """Returns the keys of overrides that match none of these layers."""
        return set(self.overrides) - set(names) - set(map(generalize, names))


def generalize(name: str) -> str:
    """Returns the name with `*` for every number in it."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
