import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmquant.kernels.packing import pack, unpack


@given(bits=st.integers(1, 8), shape=st.lists(st.integers(0, 9), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_unpacking_gives_back_what_was_packed(bits, shape, seed):
    codes = torch.randint(0, 1 << bits, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    planes = pack(codes, bits)
    assert planes.dtype == torch.uint8 and planes.shape == (bits, -(-codes.numel() // 8))
    assert torch.equal(unpack(planes, codes.shape), codes)


def test_one_bit_agrees_with_numpy_packbits_and_padding_is_zero():
    codes = torch.randint(0, 2, (3, 7), dtype=torch.uint8)
    expected = np.packbits(codes.numpy().ravel(), bitorder="little")
    assert np.array_equal(pack(codes, 1)[0].numpy(), expected)
    assert pack(torch.ones(9, dtype=torch.uint8), 1)[0].tolist() == [255, 1]


@pytest.mark.parametrize("bits", [0, 9])
def test_other_bit_widths_are_refused(bits):
    with pytest.raises(ValueError, match="1 to 8"):
        pack(torch.zeros(4, dtype=torch.uint8), bits)


def test_codes_that_do_not_fit_and_planes_of_the_wrong_length_are_refused():
    with pytest.raises(ValueError, match="below 4"):
        pack(torch.tensor([4], dtype=torch.uint8), 2)
    with pytest.raises(ValueError, match="planes of 2 bytes"):
        unpack(torch.zeros(1, 1, dtype=torch.uint8), (9,))
