"""Blocked layouts hold the codes and nothing else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmquant.kernels import layouts
from dmquant.kernels.layouts import from_steps, pieces, to_steps
from dmquant.kernels.registry import KERNELS
from dmquant.kernels.weight_packing import arrange, levels, restore


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(KERNELS), st.integers(1, 8), st.integers(1, 70), st.integers(1, 130), st.integers(1, 9), st.booleans())
def test_codes_come_back_from_every_layout(kernel, bits, outputs, channels, taps, is_uniform):
    if is_uniform and bits > kernel.max_weight_bits:
        return
    codes = torch.randint(0, 1 << bits, (outputs, channels, taps), dtype=torch.uint8)
    blocked = arrange(codes, bits, torch.zeros(outputs) if is_uniform else None, kernel.name)
    assert torch.equal(restore(blocked, codes.shape), codes)
    filled = layouts.fill_up(outputs, 32) * layouts.fill_up(channels, kernel.block_for(channels)) * taps
    assert blocked.weight.nbytes * 8 == filled * bits


@pytest.mark.parametrize("bits", range(1, 9))
def test_totals_are_sums_of_levels_and_levels_are_signed_bytes(bits):
    codes = torch.randint(0, 1 << bits, (5, 33, 4), dtype=torch.uint8)
    step, least = levels(bits)
    assert least >= -128 and step * ((1 << bits) - 1) + least <= 127
    blocked = arrange(codes, bits, torch.zeros(5), "scalar")
    assert torch.equal(blocked.weight_sums[0].long(), (codes.long() * step + least).sum((1, 2)))


def test_the_block_that_wastes_least_is_taken_and_the_larger_of_equals():
    kernel = next(kernel for kernel in KERNELS if kernel.blocks == (64, 32))
    assert [kernel.block_for(channels) for channels in (3, 32, 33, 64, 65, 96, 256)] == [32, 32, 64, 64, 32, 32, 64]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape, block", [((5, 3, 9), 32), ((7, 130, 1), 64), ((2, 256, 4), 128)])
def test_codes_come_back_from_steps(bits, shape, block):
    codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8)
    steps = to_steps(codes, bits, block)
    assert torch.equal(from_steps(steps, shape, bits, block), codes)
    filled = -(-shape[1] // block) * block
    assert len(steps) * 8 == shape[0] * filled * shape[2] * bits, "no bit more than the channels that are filled up"


def test_a_code_is_cut_into_pieces_that_divide_a_byte():
    for bits in range(1, 9):
        found = pieces(bits)
        assert sum(width for _, width in found) == bits and all(8 % width == 0 for _, width in found)
        assert [low for low, _ in found] == [sum(width for _, width in found[:index]) for index in range(len(found))]
