"""Grid traits: how a stored layer differs from one static, uniform grid per tensor.

A quantizer, a grid or a packed weight lists its traits in an attribute `traits`. A trait defines its text in
quantization_config and what an empty layer with that trait consists of, so that a checkpoint is read without the code of the
method that wrote it. Each trait class stands beside its grid; `TRAITS` in nn/scheme.py lists them in the order in which they
are stored and applied.

To add a stored grid, write its quantizer, its grid for inference (with `find_fault`) and its trait in one file, and add the
trait to `TRAITS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import nn

from dmquant.quantizers.base import FixedGrid
from dmquant.quantizers.timestep_clock import Clock


@dataclass(frozen=True)
class GridSite:
    """The place of an empty inference grid: bits, device, number of channels (or heads) of its input, clock of the denoiser."""

    bits: int
    device: torch.device | str
    channels: int = 0
    clock: Clock | None = None


@dataclass(frozen=True)
class GridTrait:
    """Base class. The defaults are those of a trait that changes nothing."""

    name: ClassVar[str]
    needs_clock: ClassVar[bool] = False  # the grid has one entry per calibrated timestep
    divides_input: ClassVar[bool] = False  # the layer divides its input by a factor per channel before it quantizes it
    weight_class: ClassVar[Any] = None  # class that stores the weight; None stands for PackedWeight

    @property
    def text(self) -> str:
        """The trait as it is written in quantization_config."""
        return self.name

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Returns the trait with this text, or None if the text names another one."""
        return cls() if text == cls.name else None

    def make_grid(self, make_part: Callable[[], FixedGrid], site: GridSite) -> nn.Module:
        """Returns an empty inference grid. `make_part` makes the grid that the layer would have without this trait."""
        return make_part()


def traits_of(module: object) -> tuple[GridTrait, ...]:
    """Returns the traits that a quantizer, a grid or a weight lists; none for modules that list none, such as Identity."""
    return getattr(module, "traits", ())
