"""Products on Triton's interpreter are those of float64 and, bit for bit where nothing is fused away, those of C."""

import pytest
import torch
from torch import nn

from dmquant.kernels import ops, self_check, triton_support
from dmquant.kernels.operands import NO_OPS, FusedOps, Operands
from dmquant.kernels.triton import conv
from dmquant.kernels.triton.norm import moments
from dmquant.nn import dispatch
from dmquant.nn.convert import packed_layers
from dmquant.nn.fused import unet
from tests.kernels.test_ops import CONVOLUTIONS, convolution, error, expected, make_layer
from tests.nn.fused.test_unet import resnet

ROUNDING = 1e-6
TILE_OF = conv.choose_tile


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles of an image of few pixels; the interpreter runs one after the other."""
    monkeypatch.setattr(conv, "choose_tile", lambda outputs, pixels: (32, 32))
    with torch.no_grad():
        torch.manual_seed(0)
        yield


def apply(layer, x):
    """The output by Triton, as dispatch would have it; the weight is put back."""
    layer.weight.block(triton_support.NAME)
    found = dispatch.launch(layer, layer.weight.blocked, x)
    layer.weight.release()
    return found


@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize("weight_bits, act_bits", [(1, 4), (8, 8)])
def test_products_are_those_of_float64(case, weight_bits, act_bits):
    layer, x = convolution(case, weight_bits, act_bits, symmetric=case[0] % 2 == 0)
    assert error(apply(layer, x), expected(layer, x)) < ROUNDING


@pytest.mark.parametrize("act_bits", [1, 6, 8])
@pytest.mark.parametrize("weight_bits", range(1, 9))
def test_weights_and_activations_have_any_bits(weight_bits, act_bits):
    layer, x = make_layer((5, 33, 2, 2), weight_bits, act_bits, symmetric=weight_bits % 2 == 0), torch.randn(1, 33, 3, 3)
    assert error(apply(layer, x), expected(layer, x)) < ROUNDING


@pytest.mark.parametrize("bases", [1, 2, 3])
def test_a_sum_of_binary_bases_is_a_plane_for_each(bases):
    layer, x = convolution(CONVOLUTIONS[1], 0, 4, bases=bases)
    assert error(apply(layer, x), expected(layer, x)) < ROUNDING


@pytest.mark.parametrize("shape", [(10,), (1, 10), (3, 31, 10)])
def test_linear_layers_take_any_number_of_rows(shape):
    layer, x = make_layer((7, 10), 1, 4), torch.randn(shape)
    assert error(apply(layer, x), expected(layer, x)) < ROUNDING and apply(layer, x).shape == (*shape[:-1], 7)


def test_each_image_may_have_its_own_grid_and_bias():
    layer, x = make_layer((37, 33, 3, 3), 4, 6, symmetric=False, padding=1), torch.randn(3, 33, 4, 5)
    layer.weight.block(triton_support.NAME)
    blocked, weight, bias = layer.weight.blocked, layer.weight, torch.randn(3, 37)
    grids = torch.tensor([0.1, 0.2, 0.4]), torch.tensor([3.0, 63.0, 0.0])

    def run(images, bias, scale, zero):
        operands = Operands(blocked, weight.scale, weight.zero, scale, zero, 6, bias)
        return ops.quantized_conv(images, operands, dispatch.geometry_of(layer))

    together = run(x.permute(0, 2, 3, 1), bias, *grids)
    for i, (scale, zero) in enumerate(zip(*grids)):
        layer.bias, layer.input.scale, layer.input.zero = nn.Parameter(bias[i]), scale, zero
        assert error(together[i], expected(layer, x[i : i + 1])[0].permute(1, 2, 0)) < ROUNDING
        assert torch.equal(run(x[i : i + 1].permute(0, 2, 3, 1), bias[i], scale, zero)[0], together[i])


def test_half_precisions_in_give_the_same_out_rounded_once():
    layer, x = make_layer((37, 33), 2, 8), torch.randn(5, 33).half()
    assert torch.equal(apply(layer, x), apply(layer, x.float()).half())
    found, wanted = apply(layer, x.bfloat16()), apply(layer, x.bfloat16().float())
    assert found.dtype == torch.bfloat16 and error(found, wanted) < 2**-7, "the interpreter cuts off what a GPU rounds"


def test_the_residual_is_added_in_float32():
    layer, x, residual = make_layer((37, 33), 2, 8), torch.randn(5, 33), torch.randn(5, 37)
    layer.weight.block(triton_support.NAME)
    found = dispatch.launch(layer, layer.weight.blocked, x, FusedOps(residual=residual))
    assert torch.equal(found, dispatch.launch(layer, layer.weight.blocked, x) + residual)


@pytest.mark.needs_compiler
def test_the_floats_of_a_gpu_are_those_of_c():
    """Where sums need no fma the interpreter rounds as a GPU does: without a bias."""
    for bits in (1, 4):
        layer, x = make_layer((40, 70, 3, 3), bits, 4, padding=1, bias=False), torch.randn(2, 70, 3, 4)
        layer.weight.block("scalar")
        wanted = dispatch.launch(layer, layer.weight.blocked, x)
        layer.weight.release()
        assert torch.equal(apply(layer, x), wanted)


def test_a_check_on_a_gpu_runs_every_tile():
    shapes = [(shape[-1], shape[1] * shape[2]) for shape in (*self_check.LARGE, self_check.ODD)]
    assert [TILE_OF(*shape) for shape in shapes] == list(conv.TILES)


@pytest.mark.needs_compiler
def test_a_block_is_fused_as_by_the_kernels_of_c(monkeypatch):
    monkeypatch.setenv("DMQUANT_KERNELS", "c")
    block, x, time = resnet(), torch.randn(2, 12, 3, 4), torch.randn(2, 16)
    unet.fuse(block)
    wanted = block(x, time)
    for layer in packed_layers(block).values():
        layer.weight.release()
        layer.weight.block(triton_support.NAME)
    assert block.can_fuse(x)
    assert (block(x, time) - wanted).abs().median() < 1e-5 and error(block(x, time), wanted) < 0.1


@pytest.mark.needs_compiler
def test_a_block_in_half_precision_is_fused_on_a_gpu(monkeypatch):
    monkeypatch.setitem(dispatch.DTYPES, "cpu", dispatch.DTYPES["cuda"])
    monkeypatch.setattr(unet, "is_free", lambda *norms: True)

    def moments_of(norm, x):
        return moments(x.permute(0, 2, 3, 1), norm.weight, norm.bias, norm.num_groups, norm.eps)

    monkeypatch.setattr(unet, "moments_of", moments_of)
    block, x, time = resnet().bfloat16(), torch.randn(2, 12, 3, 4).bfloat16(), torch.randn(2, 16).bfloat16()
    for layer in packed_layers(block).values():
        layer.weight.block(triton_support.NAME)
    plain = block(x, time)
    unet.fuse(block)
    found = block(x, time)
    assert found.dtype == torch.bfloat16 and (found - plain).abs().median() < 0.05 and block.can_fuse(x)


def test_the_operator_tells_its_shape_and_dtype_without_computing():
    layer, x = make_layer((7, 10, 3, 3), 1, 4, stride=2, padding=1), torch.randn(2, 5, 6, 10)
    layer.weight.block(triton_support.NAME)
    operands = dispatch.operands_of(layer, layer.weight.blocked, x)
    arguments = ops.flatten(operands, dispatch.geometry_of(layer), NO_OPS)
    torch.library.opcheck(ops.conv_op, (x, *arguments), test_utils=("test_schema", "test_faketensor"))
