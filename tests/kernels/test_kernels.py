"""Every kernel computes what the reference computes, exactly in integers and to rounding in floats."""

import copy
import pickle
import threading

import pytest
import torch
from torch import Tensor, nn

from dmquant import kernels
from dmquant.kernels import catalogue, dispatch, onednn, trial
from dmquant.kernels.blocked import arrange, restore
from dmquant.kernels.catalogue import BY_NAME, KERNELS
from dmquant.packed import PackedBases, PackedConv1d, PackedConv2d, PackedLinear, PackedWeight
from dmquant.packing import pack
from dmquant.quantizers.base import FixedGrid, quantize

USABLE = [kernel.name for kernel in KERNELS if not catalogue.state(kernel)]

# channels, outputs, shape of the input behind them, kernel, stride, padding
CONVOLUTIONS = [
    (3, 5, (2, 7, 9), 3, 1, 1), (33, 37, (1, 6, 5), 3, 2, 1), (64, 32, (3, 4, 4), 3, 1, 1), (70, 40, (2, 5, 1), 1, 1, 0),
    (20, 33, (1, 9, 8), 5, 3, (2, 1)), (130, 66, (1, 3, 3), 1, 2, 0), (16, 7, (2, 3, 40), (1, 3), 1, (0, 1)),
]  # fmt: skip


@pytest.fixture(autouse=True)
def automatic(monkeypatch):
    monkeypatch.setenv("DMQUANT_KERNELS", "auto")


def make_layer(shape: tuple[int, ...], weight_bits: int, act_bits: int, *, symmetric: bool = True, bases: int = 0, **options):
    """A packed layer of random codes and grids, of a Linear, Conv1d or Conv2d of this weight's shape."""
    kind = {2: PackedLinear, 3: PackedConv1d, 4: PackedConv2d}[len(shape)]
    layer = kind(shape[1] * options.get("groups", 1), shape[0], *((shape[2:],) if len(shape) > 2 else ()), **options)
    holder, bits = (PackedBases, bases) if bases else (PackedWeight, weight_bits)
    del layer.weight
    layer.weight = holder(shape, bits, dtype=torch.float32)
    layer.weight.codes = pack(torch.randint(0, 1 << bits, shape, dtype=torch.uint8), bits)
    layer.weight.scale = torch.rand_like(layer.weight.scale) + 0.1
    if not bases and symmetric:
        layer.weight.zero.fill_(0.5 if bits == 1 else 1 << (bits - 1))
    elif not bases:
        layer.weight.zero = torch.randint(0, 1 << bits, shape[:1]).float()
    layer.input = FixedGrid(act_bits)
    layer.input.scale.fill_(5.0 / (1 << act_bits))
    layer.input.zero.fill_((1 << act_bits) // 2 if symmetric else (1 << act_bits) // 3)
    return layer.requires_grad_(False)


def expected(layer: nn.Module, x: Tensor) -> Tensor:
    """The output in float64, from the same codes of the input."""
    grid = layer.input
    codes = quantize(x, grid.scale, grid.zero, grid.bits)
    a, weight = (codes - grid.zero).double() * grid.scale.double(), layer.weight.dequantize(torch.float64)
    bias = None if layer.bias is None else layer.bias.double()
    return nn.functional.linear(a, weight, bias) if isinstance(layer, nn.Linear) else layer._conv_forward(a, weight, bias)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def convolution(case: tuple, weight_bits: int, act_bits: int, **options) -> tuple[nn.Module, Tensor]:
    channels, outputs, (images, *size), kernel, stride, padding = case
    kernel = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    layer = make_layer((outputs, channels, *kernel), weight_bits, act_bits, stride=stride, padding=padding, **options)
    return layer, torch.randn(images, channels, *size)


def test_this_machine_has_a_kernel():
    assert "scalar" in USABLE and catalogue.choice() == "auto"


@pytest.mark.parametrize("act_bits", range(1, 9))
@pytest.mark.parametrize("weight_bits", range(1, 9))
def test_every_kernel_gives_the_products_of_float64_and_all_give_the_same_bits(weight_bits, act_bits):
    torch.manual_seed(weight_bits * 16 + act_bits)
    for index, case in enumerate(CONVOLUTIONS):
        layer, x = convolution(case, weight_bits, act_bits, symmetric=bool(index + act_bits & 1))
        wanted, first = expected(layer, x), None
        for name in USABLE:
            if BY_NAME[name].fits(weight_bits, act_bits):
                layer.weight.block(name)
                found = dispatch.apply(layer, layer.weight.blocked, x)
                layer.weight.release()
                assert error(found, wanted) < 1e-5, (name, case)
                first = found if first is None else first
                assert torch.equal(found, first), (name, case)


@pytest.mark.parametrize("act_bits", [2, 4, 6, 8])
@pytest.mark.parametrize("bases", [1, 2, 3])
def test_a_sum_of_binary_bases_is_a_plane_for_each(bases, act_bits):
    torch.manual_seed(bases)
    for case in CONVOLUTIONS:
        layer, x = convolution(case, 0, act_bits, bases=bases)
        wanted = expected(layer, x)
        for name in USABLE:
            if BY_NAME[name].fits(1, act_bits):
                layer.weight.block(name)
                assert error(dispatch.apply(layer, layer.weight.blocked, x), wanted) < 1e-5, (name, case)
                layer.weight.release()


@pytest.mark.parametrize("shape", [(10,), (1, 10), (3, 31, 10), (2, 3, 33, 10), (0, 10)])
def test_linear_layers_take_any_number_of_rows(shape):
    layer, x = make_layer((7, 10), 1, 4), torch.randn(shape)
    found = layer(x)
    assert found.shape == (*shape[:-1], 7)
    assert x.numel() == 0 or (layer.weight.blocked and error(found, expected(layer, x)) < 1e-5)


@pytest.mark.parametrize("padding", [0, 1, 2, "same", "valid"])
def test_convolutions_in_one_dimension_and_padding_by_name(padding):
    layer, x = make_layer((6, 4, 4), 4, 8, padding=padding), torch.randn(2, 4, 11)
    assert error(layer(x), expected(layer, x)) < 1e-5 and layer.weight.blocked
