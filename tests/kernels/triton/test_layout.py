"""Codes come back from the order of the kernels, at the bits they were stored at."""

import pytest
import torch

from dmquant.kernels.triton.layout import from_steps, pieces, to_steps


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape, block", [((5, 3, 9), 32), ((7, 130, 1), 64), ((2, 256, 4), 128)])
def test_codes_come_back(bits, shape, block):
    codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8)
    steps = to_steps(codes, bits, block)
    assert torch.equal(from_steps(steps, shape, bits, block), codes)
    filled = -(-shape[1] // block) * block
    assert len(steps) * 8 == shape[0] * filled * shape[2] * bits, "no bit more than the channels that are filled up"


def test_a_code_is_cut_into_pieces_that_bytes_are_whole_numbers_of():
    for bits in range(1, 9):
        found = pieces(bits)
        assert sum(width for _, width in found) == bits and all(8 % width == 0 for _, width in found)
        assert [low for low, _ in found] == [sum(width for _, width in found[:index]) for index in range(len(found))]
