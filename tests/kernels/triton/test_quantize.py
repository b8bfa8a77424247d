"""What a product reads are the quantizer's codes, padding and all, of what the norm and the activation make of an image."""

import pytest
import torch
from torch import nn

from dmquant.kernels import norm
from dmquant.kernels.conv_shape import POINTWISE, ConvGeometry
from dmquant.kernels.operands import NO_OPS, FusedOps, Operands
from dmquant.kernels.triton import quantize as module
from dmquant.quantizers import base

PADDED = ConvGeometry((3, 3), (1, 1), (1, 2, 0, 3))  # a padding that differs at the top, bottom, left and right


def grid(*scales: float, zero: float = 5.0) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(scales), torch.full((len(scales),), zero)


def quantize(x, scale, zero, bits, geometry, block, fused=NO_OPS):
    """The codes of an input, which do not depend on the weight."""
    return module.quantize(x, Operands(None, None, None, scale, zero, bits), geometry, fused, block)


def wanted(x, scale, zero, bits, geometry, block):
    """The codes less half of them, from the quantizer, padded with the code of 0 and filled up with channels of 0."""
    top, bottom, left, right = geometry.padding
    column = (value.view(-1, 1, 1, 1) for value in (scale, zero))
    levels = base.quantize(x.float(), *column, bits)
    padded = torch.stack([
        nn.functional.pad(image, (0, 0, left, right, top, bottom), value=float(middle))
        for image, middle in zip(levels, zero.expand(len(x)))
    ]) - (1 << (bits - 1))  # fmt: skip
    return nn.functional.pad(padded, (0, -x.shape[3] % block)).to(torch.int8)


@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("scales", [(0.3,), (0.1, 0.2)], ids=["one grid", "a grid for each image"])
def test_codes_are_those_of_the_quantizer_on_ties_as_well(bits, scales):
    scale, zero = grid(*scales, zero=float((1 << bits) // 3))
    ties = torch.arange(-40, 40).mul(0.5 * scale[-1]).view(1, 2, 4, 10)  # many are exact ties only after rounding
    near = [ties, ties.nextafter(torch.tensor(torch.inf)), ties.nextafter(-torch.tensor(torch.inf)), ties * 1e30]
    x = torch.cat(near, 3).expand(2, -1, -1, -1)
    assert torch.equal(quantize(x, scale, zero, bits, PADDED, 64), wanted(x, scale, zero, bits, PADDED, 64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precisions_are_quantized_in_float32(dtype):
    x, (scale, zero) = torch.randn(1, 3, 2, 33).to(dtype), grid(0.02, zero=128.0)
    assert torch.equal(quantize(x, scale, zero, 8, PADDED, 32), wanted(x, scale, zero, 8, PADDED, 32))


@pytest.mark.needs_compiler
@pytest.mark.parametrize("activate", [False, True])
def test_an_image_is_normalized_activated_and_divided_on_the_way(activate):
    torch.manual_seed(0)
    x, factor, (scale, zero) = torch.randn(2, 5, 4, 36), torch.rand(36) + 0.5, grid(0.05, zero=100.0)
    gain, offset = norm.moments(x, torch.randn(36), torch.randn(36), 6, 1e-5)
    made = norm.normalize(x, gain, offset, factor=factor, activation=activate)
    found = quantize(x, scale, zero, 8, PADDED, 64, FusedOps(gain, offset, int(activate), factor))
    # the interpreter's fma rounds twice
    differs = (found.int() - wanted(made, scale, zero, 8, PADDED, 64).int()).abs()
    assert differs.max() <= 1 and differs.float().mean() < 1e-3


def test_silu_is_that_of_float64_over_its_whole_range():
    x = torch.cat([torch.linspace(-90, 90, 251), torch.tensor([-1e30, 1e30, -100.0, 100.0, 0.0])]).view(1, 1, 1, -1)
    for scale, zero in ((0.002, 250.0), (0.25, 2.0)):
        one, nothing = torch.ones(1, x.shape[3]), torch.zeros(1, x.shape[3])
        found = quantize(x, *grid(scale, zero=zero), 8, POINTWISE, 32, FusedOps(one, nothing, norm.SILU))
        value = (nn.functional.silu(x.double()) / scale).clamp(-zero, 255 - zero)
        assert (found.double() + 128 - zero - value).abs().max() < 0.5 + 1e-3


def test_an_upsampled_image_reads_each_pixel_several_times():
    x, (scale, zero) = torch.randn(2, 3, 2, 20), grid(0.3, zero=7.0)
    larger = x.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert torch.equal(quantize(x, scale, zero, 4, PADDED, 32, FusedOps(upsample=2)), wanted(larger, scale, zero, 4, PADDED, 32))
