"""The arithmetic that kernels are compared with rounds where they do, and nowhere else."""

from fractions import Fraction

import pytest
import torch

from dmquant.kernels.reference import fma

HALF = 1 + 2.0**-12  # its square is half way between two floats


@pytest.mark.parametrize("rest, wanted", [(0.0, 1 + 2.0**-11), (2.0**-80, 1 + 2.0**-11 + 2.0**-23), (-(2.0**-80), 1 + 2.0**-11)])
def test_a_sum_next_to_the_middle_of_two_floats_is_rounded_once(rest, wanted):
    assert fma(*(torch.tensor([value]) for value in (HALF, HALF, rest))).item() == wanted
    assert fma(*(torch.tensor([value]) for value in (-HALF, HALF, -rest))).item() == -wanted


def test_what_comes_of_it_is_the_float_nearest_to_the_true_sum():
    torch.manual_seed(0)
    a, b, c = torch.randn(3, 3000)
    c[1000:2000] = -(a * b)[1000:2000]  # cancels all but what the product would have lost
    c[2000:] *= 2.0**-30
    found = fma(a, b, c)
    infinity = torch.full_like(found, torch.inf)
    for x, y, z, *near in torch.stack([a, b, c, found, found.nextafter(infinity), found.nextafter(-infinity)], 1).tolist():
        ours, above, below = (abs(Fraction(value) - (Fraction(x) * Fraction(y) + Fraction(z))) for value in near)
        assert ours <= min(above, below)


def test_what_is_not_finite_stays_so():
    infinity = torch.tensor([torch.inf, -torch.inf, torch.nan])
    assert torch.equal(fma(torch.ones(3), torch.ones(3), infinity).nan_to_num(1, 2, 3), infinity.nan_to_num(1, 2, 3))
