"""Every kernel computes what the reference computes, exactly in integers and to rounding in floats."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dmquant.kernels import attention, ops, registry
from dmquant.kernels.operands import FusedOps, Operands
from dmquant.kernels.packing import pack
from dmquant.kernels.registry import BY_NAME, EXACT, KERNELS
from dmquant.kernels.rounding import quantize
from dmquant.nn import dispatch
from dmquant.nn.packed_layers import PackedConv1d, PackedConv2d, PackedLinear
from dmquant.nn.packed_weight import PackedBases, PackedWeight
from dmquant.quantizers.base import FixedGrid

# plain C runs everywhere: where it does not compile, these tests fail
USABLE = [EXACT.name, *(kernel.name for kernel in KERNELS if kernel.is_portable or not registry.find_missing(kernel))]

# channels, outputs, shape of the input behind them, kernel, stride, padding
CONVOLUTIONS = [
    (3, 5, (2, 7, 9), 3, 1, 1), (33, 37, (1, 6, 5), 3, 2, 1), (64, 32, (3, 4, 4), 3, 1, 1), (70, 40, (2, 5, 1), 1, 1, 0),
    (20, 33, (1, 9, 8), 5, 3, (2, 1)), (130, 66, (1, 3, 3), 1, 2, 0), (16, 7, (2, 3, 40), (1, 3), 1, (0, 1)),
    (65, 16, (1, 5, 6), 1, 2, 2), (66, 33, (2, 3, 3), 3, 1, 0), (40, 34, (3, 5, 36), 3, 1, 2), (5, 3, (2, 4, 3), 3, 1, (2, 0)),
]  # fmt: skip

pytestmark = pytest.mark.needs_compiler


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
    layer.divide, layer.input = nn.Identity(), FixedGrid(act_bits)
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


def fitting(layer: nn.Module) -> list[str]:
    """The kernels that multiply such a layer, by name."""
    bits = 1 if isinstance(layer.weight, PackedBases) else layer.weight.bits
    return [name for name in USABLE if BY_NAME[name].fits(bits, layer.input.bits, dispatch.geometry_of(layer))]


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def convolution(case: tuple, weight_bits: int, act_bits: int, **options) -> tuple[nn.Module, Tensor]:
    channels, outputs, (images, *size), kernel, stride, padding = case
    kernel = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    layer = make_layer((outputs, channels, *kernel), weight_bits, act_bits, stride=stride, padding=padding, **options)
    return layer, torch.randn(images, channels, *size)


@pytest.mark.parametrize("kernel", [*KERNELS, *attention.VARIANTS], ids=lambda kernel: kernel.name)
def test_a_kernel_is_missing_for_want_of_instructions_only(kernel):
    assert "cannot compile" not in registry.find_missing(kernel)


@pytest.mark.parametrize("act_bits", [1, 4, 5, 6, 8])  # benchmarks/sanitize_kernels.py draws from all
@pytest.mark.parametrize("weight_bits", [1, 2, 3, 5, 8])
def test_every_kernel_gives_the_products_of_float64_and_all_give_the_same_bits(weight_bits, act_bits):
    torch.manual_seed(weight_bits * 16 + act_bits)
    for index, case in enumerate(CONVOLUTIONS):
        layer, x = convolution(case, weight_bits, act_bits, symmetric=bool(index + act_bits & 1))
        wanted, first = expected(layer, x), None
        for name in fitting(layer):
            layer.weight.block(name)
            found = dispatch.launch(layer, layer.weight.blocked, x)
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
        for name in fitting(layer):
            layer.weight.block(name)
            assert error(dispatch.launch(layer, layer.weight.blocked, x), wanted) < 1e-5, (name, case)
            layer.weight.release()


@pytest.mark.parametrize("shape", [(10,), (1, 10), (3, 31, 10), (2, 3, 33, 10)])
def test_linear_layers_take_any_number_of_rows(shape):
    layer, x = make_layer((7, 10), 1, 4), torch.randn(shape)
    for name in fitting(layer):
        layer.weight.block(name)
        found = dispatch.launch(layer, layer.weight.blocked, x)
        assert found.shape == (*shape[:-1], 7)
        assert error(found, expected(layer, x)) < 1e-5
        layer.weight.release()


@pytest.mark.parametrize("size, stride", [(1, 1), (3, 2), (5, 1)])
def test_a_kernel_refuses_geometries_that_it_does_not_support(size, stride):
    layer, x = make_layer((6, 4, size, size), 1, 4, stride=stride), torch.randn(1, 4, 7, 7)
    for name in USABLE:
        layer.weight.block(name)
        if name in fitting(layer):
            assert error(dispatch.launch(layer, layer.weight.blocked, x), expected(layer, x)) < 1e-5
        else:
            with pytest.raises(ValueError, match=f"the kernel {name} does not support"):
                dispatch.launch(layer, layer.weight.blocked, x)
        layer.weight.release()


@pytest.mark.parametrize("padding", [0, 1, 2, "same", "valid"])
def test_convolutions_in_one_dimension_and_padding_by_name(padding):
    layer, x = make_layer((6, 4, 5), 1, 4, padding=padding), torch.randn(2, 4, 11)
    for name in fitting(layer):
        layer.weight.block(name)
        assert error(dispatch.launch(layer, layer.weight.blocked, x), expected(layer, x)) < 1e-5
        layer.weight.release()


@pytest.mark.parametrize("name", USABLE)
def test_values_that_lie_between_two_codes_round_as_the_quantizer_rounds_them(name):
    size = 3 if BY_NAME[name].geometries else 1
    layer = make_layer((3, 16, size, size), 1, 4, padding=size // 2)
    layer.input.scale.fill_(0.3)
    ties = (torch.arange(-40, 40) / 2.0).mul(0.3).view(1, 16, 5, 1)  # many are exact ties only after rounding
    x = torch.cat([ties, ties.nextafter(torch.tensor(torch.inf)), ties.nextafter(-torch.tensor(torch.inf)), ties * 1e30], 3)
    layer.weight.block(name)
    assert error(dispatch.launch(layer, layer.weight.blocked, x), expected(layer, x)) < 1e-6


@pytest.mark.parametrize("name", USABLE)
def test_each_image_may_have_its_own_grid(name):
    layer, x = make_layer((5, 40, 3, 3), 4, 6, padding=1), torch.randn(3, 40, 4, 5)
    layer = layer if name in fitting(layer) else make_layer((5, 40, 3, 3), 1, 4, padding=1)
    layer.weight.block(name)
    scale, zero = torch.tensor([0.1, 0.2, 0.4]), torch.tensor([3.0, 7.0, 5.0])
    blocked, weight = layer.weight.blocked, layer.weight
    geometry, images = dispatch.geometry_of(layer), x.permute(0, 2, 3, 1)
    operands = Operands(blocked, weight.scale, None, scale, zero, layer.input.bits)
    together = ops.quantized_conv(images, operands, geometry)
    for i in range(3):
        own = replace(operands, act_scale=scale[i], act_zero=zero[i])
        alone = ops.quantized_conv(images[i : i + 1], own, geometry)
        assert torch.equal(together[i], alone[0])


@pytest.mark.parametrize("threads", [2, 3])
def test_the_number_of_threads_changes_no_bit(threads):
    before = torch.get_num_threads()
    cases = [((70, 40, 3, 3), (3, 40, 9, 8)), ((200, 40, 3, 3), (1, 40, 3, 3)), ((8, 40, 1, 1), (1, 40, 1, 1))]
    try:
        for shape, size in cases:
            layer, x = make_layer(shape, 1, 4, padding=shape[-1] // 2), torch.randn(size)
            for name in fitting(layer):
                layer.weight.block(name)
                torch.set_num_threads(1)
                alone = dispatch.launch(layer, layer.weight.blocked, x)
                torch.set_num_threads(threads)
                assert torch.equal(dispatch.launch(layer, layer.weight.blocked, x), alone)
                layer.weight.release()
    finally:
        torch.set_num_threads(before)


def test_a_large_image_is_worked_through_in_bands():
    torch.manual_seed(0)
    layer, x = make_layer((34, 96, 3, 3), 2, 4, padding=1), torch.randn(2, 96, 70, 90)
    wanted = expected(layer, x)
    for name in set(fitting(layer)) - {"scalar"}:
        layer.weight.block(name)
        assert error(dispatch.launch(layer, layer.weight.blocked, x), wanted) < 1e-5
        layer.weight.release()


def test_the_operator_tells_its_shape_without_computing():
    layer, x = make_layer((7, 10, 3, 3), 1, 4, stride=2, padding=1), torch.randn(2, 5, 6, 10)
    layer.weight.block(USABLE[0])
    operands = dispatch.operands_of(layer, layer.weight.blocked, x)
    arguments = ops.flatten(operands, dispatch.geometry_of(layer), FusedOps(upsample=2))
    torch.library.opcheck(ops.conv_op, (x, *arguments))
