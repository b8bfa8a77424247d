"""Norms and activations of C are those of float64."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from dmquant.kernels import norm as normal
from dmquant.kernels.norm import GATED, GELU, SILU, TANH_GELU
from dmquant.nn.fused import transformer
from tests.kernels.test_ops import error

pytestmark = [pytest.mark.needs_compiler, pytest.mark.usefixtures("by_kernels")]

SMALLEST = 2.0**-149  # the step between float32 numbers next to zero
SHARES = {  # activation -> its number, the share of x that it lets through, relative error of that share, and the least it tells
    "SiLU": (SILU, torch.sigmoid, 2e-7, 2e-35),
    "GELU": (GELU, lambda x: torch.special.erfc(-x / math.sqrt(2)) / 2, 4e-7, 8e-8),
    # e^t is as wrong as t is, times t: 80 at most
    "GELU by tanh": (TANH_GELU, lambda x: (math.sqrt(8 / math.pi) * (x + 0.044715 * x**3)).sigmoid(), 7e-6, 2e-35),
}


def test_normalized_images_are_those_of_torch():
    for shape, groups in (((3, 5, 7, 48), 16), ((2, 1, 2, 6), 1), ((1, 9, 9, 130), 26)):
        x = torch.randn(shape) * 3 + 100 * torch.randn(shape[-1])  # means far from zero
        norm = nn.GroupNorm(groups, shape[-1])
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
        wanted = copy.deepcopy(norm).double()(x.permute(0, 3, 1, 2).double()).permute(0, 2, 3, 1)
        gain, offset = normal.moments_of(norm, x.permute(0, 3, 1, 2))
        assert error(normal.normalize(x, gain, offset), wanted) < 1e-6
        assert error(normal.normalize(x, gain, offset, activation=True), nn.functional.silu(wanted)) < 1e-6


@pytest.mark.parametrize("name", SHARES)
def test_activations_are_those_of_float64_each_by_itself(name):
    number, share, relative, least = SHARES[name]
    x = torch.cat([torch.logspace(-44, 38, 40000, dtype=torch.float64).float(), torch.linspace(0, 100, 60000)])
    x = torch.cat([x, -x]).view(1, 1, -1, 4)
    wanted = x.double() * share(x.double())
    distance = (normal.normalize(x, activation=number) - wanted).abs()
    assert (distance <= relative * wanted.abs() + least * x.abs() + SMALLEST).all()


def test_a_gate_is_the_gelu_of_what_lies_behind():
    x, gate = torch.randn(2, 2, 3, 5, 70) * 10
    gated = x * normal.normalize(gate, activation=GELU)
    assert torch.equal(normal.normalize(torch.cat([x, gate], 3), activation=GATED), gated)


def test_a_constant_image_has_no_variance_and_no_harm_is_done():
    x = torch.full((1, 4, 4, 8), 3.0)
    assert normal.normalize(x, *normal.moments_of(nn.GroupNorm(2, 8), x.permute(0, 3, 1, 2))).abs().max() < 1e-3


def normed(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    fused = transformer.norm_of(norm)
    gain, offset = (part if part is None else part.expand(len(x), -1).contiguous() for part in (fused.gain, fused.offset))
    return normal.normalize(x.unsqueeze(1), gain, offset, epsilon=fused.epsilon).squeeze(1)


@pytest.mark.parametrize("channels", [2, 16, 31, 72, 130, 320])
def test_layer_norms_are_those_of_float64_however_far_values_are_from_zero(channels):
    x = torch.randn(2, 15, channels) + torch.linspace(-500, 500, 15).view(-1, 1)
    for options in ({}, {"bias": False}, {"elementwise_affine": False}):
        norm = nn.LayerNorm(channels, **options)
        for parameter in norm.parameters():
            nn.init.normal_(parameter)
        wanted = copy.deepcopy(norm).double()(x.double())
        # half a unit in the last place of 500 is 1.5e-5: values are exact, a mean of two of them is not always
        assert error(normed(x, norm), wanted) < 1e-6


def test_a_token_of_one_value_has_no_variance_and_no_harm_is_done():
    assert normed(torch.full((1, 3, 50), 1e6), nn.LayerNorm(50)).abs().max() < 1e-3


def test_the_moments_tell_their_shape_without_computing():
    torch.library.opcheck(normal.moments_op, (torch.randn(2, 3, 4, 6), torch.randn(6), None, 3, 1e-5))


@pytest.mark.needs_compiler
@pytest.mark.parametrize("channels", [6, 128, 272])
def test_the_number_of_threads_changes_no_bit_of_the_moments(channels):
    x, threads = torch.randn(2, 9, 15, channels) * 2 + 5, torch.get_num_threads()  # more pixels than a run
    weight, bias = torch.randn(2, channels).unbind()
    wanted = normal.moments(x, weight, bias, 2, 1e-5)
    try:
        torch.set_num_threads(3)
        assert all(torch.equal(*pair) for pair in zip(normal.moments(x, weight, bias, 2, 1e-5), wanted))
    finally:
        torch.set_num_threads(threads)
