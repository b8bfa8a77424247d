"""Grid traits: each one is read from the text that it writes, and makes the grid that lists it."""

import pytest
import torch

from dmquant.nn.convert import empty_grid
from dmquant.nn.packed_weight import Bases
from dmquant.nn.scheme import TRAITS, LayerScheme, parse_trait, sort_traits
from dmquant.quantizers.dilated import Dilated
from dmquant.quantizers.per_part import PerHead, PerPart
from dmquant.quantizers.per_timestep import PerTimestep
from dmquant.quantizers.timestep_clock import Clock
from dmquant.quantizers.traits import traits_of

EXAMPLES = {
    "bases": Bases(), "temporal": PerTimestep(), "dilated": Dilated(), "split:2": PerPart(2), "heads": PerHead(),
}  # fmt: skip


def test_every_trait_has_an_example_here_in_the_order_in_which_traits_are_stored():
    assert tuple(map(type, EXAMPLES.values())) == TRAITS and sort_traits(reversed(EXAMPLES.values())) == (*EXAMPLES.values(),)


@pytest.mark.parametrize("text", EXAMPLES)
def test_a_trait_is_read_from_the_text_that_it_writes(text):
    assert parse_trait(text) == EXAMPLES[text] and EXAMPLES[text].text == text


@pytest.mark.parametrize("part", [(), (PerTimestep(),)], ids=["static", "temporal"])
@pytest.mark.parametrize("whole", [(), (PerPart(2),), (PerHead(),)], ids=["whole", "split", "heads"])
def test_an_empty_grid_lists_the_traits_that_it_was_made_from_in_any_order(part, whole):
    clock = Clock(torch.arange(3))
    grid = empty_grid(LayerScheme(32, 4, (*whole, *part)), device="meta", clock=clock, channels=5)
    assert traits_of(grid) == (*part, *whole) and grid.bits == 4


def test_a_grid_per_timestep_is_refused_without_a_clock():
    with pytest.raises(ValueError, match="needs the clock"):
        empty_grid(LayerScheme(32, 4, (PerTimestep(),)), device="meta", clock=None)
