"""Attention on codes is that of float64 on the same grids, bit for bit the same by every variant."""

import pytest
import torch
from torch import Tensor, nn

from dmquant.kernels import attention, registry
from dmquant.nn.attention import quantized_attention
from dmquant.quantizers.base import FixedGrid
from dmquant.quantizers.per_part import HeadGrids
from dmquant.quantizers.per_timestep import TemporalGrid
from dmquant.quantizers.timestep_clock import Clock
from tests.kernels.test_ops import error

USABLE = [number for number, kernel in enumerate(attention.VARIANTS) if kernel.is_portable or not registry.find_missing(kernel)]
SIZES = [  # images, heads, queries, keys, channels
    (1, 2, 5, 3, 7), (2, 1, 33, 330, 40), (1, 3, 16, 64, 64), (2, 2, 17, 97, 100), (1, 1, 1, 1, 1), (1, 1, 40, 1, 16),
]  # fmt: skip


pytestmark = [pytest.mark.needs_compiler, pytest.mark.usefixtures("by_kernels")]


def factors(images: int, heads: int, queries: int, keys: int, channels: int) -> list[Tensor]:
    """Query, key and value as projections leave them: heads side by side in each token."""
    return [torch.randn(images, tokens, heads, channels).transpose(1, 2) for tokens in (queries, keys, keys)]


def grids(images: int, heads: int, bits: int) -> tuple[Tensor, Tensor]:
    """Scales and zeros at random; few probabilities are too large for their grid, and some grids have a zero of one."""
    scales, zeros = torch.rand(4, images, heads) * 4 / (1 << bits) + 0.01, torch.randint(1 << bits, (4, images, heads)).float()
    scales[2], zeros[2] = 0.5 / (1 << bits), torch.randint(2, (images, heads)).float()
    return scales, zeros


def fixed(bits: int, scale: float, zero: float) -> FixedGrid:
    grid = FixedGrid(bits)
    grid.scale.fill_(scale), grid.zero.fill_(zero)
    return grid


def four(bits: int = 8) -> list[FixedGrid]:
    """Grids of the four factors."""
    middle = 1 << (bits - 1)
    return [fixed(bits, 1 / (1 << bits) if number == 2 else 6 / (1 << bits), 0 if number == 2 else middle) for number in range(4)]


@pytest.mark.parametrize("bits", [1, 2, 4, 7, 8])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_variant_gives_the_attention_of_float64_and_all_give_the_same_bits(size, bits):
    arguments = (*factors(*size), *grids(*size[:2], bits), bits, 0.3)
    wanted = attention.reference(*arguments)
    found = [attention.attend(*arguments, number) for number in USABLE]
    assert all(torch.equal(other, found[0]) for other in found)
    assert (found[0] - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("scale", [0.0, 1e-12, 100.0, 1e9])
@pytest.mark.parametrize("keys", [3, 40, 600])
def test_scores_that_are_far_apart_do_no_harm(keys, scale):
    query, key, value = factors(1, 2, 5, keys, 32)
    arguments = (query * 1e4, key * 1e4, value * 1e30, *grids(1, 2, 8), 8, scale)
    for number in USABLE:
        found = attention.attend(*arguments, number)
        assert found.isfinite().all() and error(found, attention.reference(*arguments)) < 1e-5


@pytest.mark.parametrize("place", [0, 70, 199])
def test_the_best_key_may_be_anywhere_and_2_to_the_300_better_than_the_others(place):
    query, key, value = torch.full((1, 2, 33, 32), 2.9), torch.randn(1, 2, 200, 32) / 10, torch.randn(1, 2, 200, 32)
    key[:, :, place] = 2.9
    scales, zeros = torch.full((4, 1, 2), 6 / 256), torch.full((4, 1, 2), 128.0)
    scales[2], zeros[2] = 1 / 255, 0
    arguments = (query, key, value, scales, zeros, 8, 1.0)
    for number in USABLE:
        assert error(attention.attend(*arguments, number), attention.reference(*arguments)) < 1e-6


def test_a_query_for_which_a_late_key_is_far_better_changes_no_bit_of_another():
    query, key, value = torch.randn(1, 1, 16, 32) / 10, torch.randn(1, 1, 2000, 32), torch.randn(1, 1, 2000, 32)
    query[:, :, 10], key[:, :, 1995] = 2.9, 2.9
    scales, zeros = torch.full((4, 1, 1), 6 / 256), torch.full((4, 1, 1), 128.0)
    scales[2], zeros[2] = 1 / 200000, 0  # codes around 100: shares that differ in their last bit become other codes now and then
    alone = attention.attend(query[:, :, :10], key, value, scales, zeros, 8, 1.0, USABLE[0])
    for number in USABLE:
        assert torch.equal(attention.attend(query, key, value, scales, zeros, 8, 1.0, number)[:, :10], alone)


@pytest.mark.parametrize("threads", [2, 3])
def test_the_number_of_threads_changes_no_bit(threads):
    before, arguments = torch.get_num_threads(), (*factors(2, 3, 40, 50, 24), *grids(2, 3, 8), 8, 0.2)
    try:
        for number in USABLE:
            torch.set_num_threads(1)
            alone = attention.attend(*arguments, number)
            torch.set_num_threads(threads)
            assert torch.equal(attention.attend(*arguments, number), alone)
    finally:
        torch.set_num_threads(before)


def test_factors_may_lie_in_memory_as_they_like():
    query, key, value = factors(2, 3, 9, 11, 20)
    wanted = quantized_attention(query, key, value, four(), 0.2)
    assert torch.equal(quantized_attention(query.contiguous(), key.mT.contiguous().mT, value.contiguous(), four(), 0.2), wanted)


def test_each_head_and_each_sample_has_the_grid_that_is_its_own():
    clock, tensors = Clock(torch.tensor([0.0, 10.0])), factors(2, 3, 9, 11, 20)

    def timed(number: int) -> TemporalGrid:
        grid = TemporalGrid(8, clock)
        grid.scale.copy_(torch.tensor([0.02, 0.03]) + number / 100)
        grid.zero.copy_(torch.tensor([120.0, 140.0]) - number)
        return grid

    per_head = [HeadGrids([timed(3 * factor + head) for head in range(3)]) for factor in range(4)]
    with clock.at(torch.tensor([10.0, 0.0]), 2):
        found = quantized_attention(*tensors, per_head, 0.2)
        query, key, value = (grid(x) for grid, x in zip((per_head[0], per_head[1], per_head[3]), tensors))
        wanted = (per_head[2]((query @ key.mT * 0.2).softmax(-1)) @ value).transpose(1, 2).flatten(2)
    assert error(found, wanted) < 1e-5


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, parts: [x.double() for x in tensors], lambda tensors, parts: [tensors[0].requires_grad_(), *tensors[1:]],
        lambda tensors, parts: parts.__setitem__(1, fixed(4, 0.1, 3)) or tensors,
        lambda tensors, parts: parts.__setitem__(3, nn.Identity()) or tensors,
        lambda tensors, parts: parts[0].register_forward_hook(lambda *_: None) and tensors,
        lambda tensors, parts: parts[0].zero.fill_(0.5) is not None and tensors,
    ],
    ids=["float64", "gradients", "mixed bits", "float factor", "watched", "fractional zero"],
)  # fmt: skip
def test_what_no_kernel_takes_is_left_to_torch(change):
    tensors, parts = factors(1, 2, 5, 6, 8), four()
    assert quantized_attention(*tensors, parts, 0.3) is not None
    with torch.enable_grad():
        assert quantized_attention(*change(tensors, parts), parts, 0.3) is None


def test_a_variant_that_is_wrong_is_disabled_with_a_warning(monkeypatch):
    attention.check.cache_clear()
    right = attention.attend
    monkeypatch.setattr(attention, "attend", lambda *arguments: right(*arguments) * 1.001)
    try:
        with pytest.warns(RuntimeWarning, match="attention is not used: it is wrong by"):
            assert quantized_attention(*factors(1, 2, 5, 6, 8), four(), 0.3) is None
        assert attention.find_missing().startswith("wrong by")
    finally:
        attention.check.cache_clear()


def test_it_is_chosen_like_every_kernel(monkeypatch):
    assert attention.find_missing() == ""
    monkeypatch.setenv("DMQUANT_KERNELS", "torch")
    assert attention.find_missing() == "DMQUANT_KERNELS=torch"
    assert quantized_attention(*factors(1, 2, 5, 6, 8), four(), 0.3) is None


def test_the_operator_tells_its_shape_without_computing():
    arguments = (*factors(2, 3, 5, 7, 8), *grids(2, 3, 8), 8, 0.3, USABLE[0])
    torch.library.opcheck(attention.attend_op, arguments)
