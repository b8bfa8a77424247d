"""Scaled channels: the law, what is stored of them, and what a packed layer makes of it."""

import copy

import pytest
import torch
from torch import nn

from dmquant.nn.convert import layer_scheme, pack_layer, restore_float
from dmquant.nn.fake_quant_layers import bypassed, quantized
from dmquant.quantizers.dilated import Dilated, DilatedInput, DilatedWeight, spread
from dmquant.quantizers.per_timestep import PerTimestep, TemporalStep
from dmquant.quantizers.timestep_clock import Clock
from dmquant.quantizers.uniform import LearnedStep

LAYERS = {
    "linear": (lambda: nn.Linear(8, 6), (2, 5, 8)),
    "conv1d": (lambda: nn.Conv1d(8, 6, 3, padding=1), (2, 8, 9)),
    "conv2d": (lambda: nn.Conv2d(8, 6, 3, padding=1), (2, 8, 7, 7)),
    "grouped": (lambda: nn.Conv2d(8, 6, 3, groups=2), (2, 8, 7, 7)),
}
every_layer = pytest.mark.parametrize("name", LAYERS)
FACTOR = torch.tensor([1.0, 2.0, 1.5, 1.0, 1.3, 7.0, 1.0, 1.1])


def dilated(name, factor=FACTOR, temporal=False):
    """A layer whose channels are dilated, and an input."""
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape)
    clock, groups, ndim = Clock(torch.tensor([5.0, 0.0])), getattr(layer, "groups", 1), layer.weight.ndim
    weight = DilatedWeight(LearnedStep(4, num_channels=6, ndim=ndim), 8, groups)
    grid = DilatedInput(TemporalStep(4, clock) if temporal else LearnedStep(4, symmetric=False), 8, ndim - 2)
    weight.factor.copy_(factor)
    grid.divide.reciprocal.copy_(factor.reciprocal())
    weight.observe(layer.weight)
    with clock.at(torch.tensor(5), len(x)):
        grid.observe(x)
    return quantized(layer, weight, grid), x


@every_layer
@pytest.mark.parametrize("temporal", [False, True])
@torch.no_grad()
def test_the_law_holds_and_a_packed_layer_computes_the_same(name, temporal):
    layer, x = dilated(name, temporal=temporal)
    for quantizer, value in ((layer.weight_quantizer, layer.weight), (layer.input_quantizer, x)):
        assert torch.equal(quantizer(value), quantizer.encode(value).decode()) and quantizer.bits == 4
    packed = pack_layer(layer)
    assert torch.equal(packed(x), layer(x))
    assert layer_scheme(packed) == layer_scheme(layer) == (4, 4, (PerTimestep(), Dilated()) if temporal else (Dilated(),))
    assert torch.equal(packed.divide.reciprocal, FACTOR.reciprocal())


@every_layer
@torch.no_grad()
def test_in_float_factors_cancel(name):
    layer, x = dilated(name)
    weight, quotient = layer.weight_quantizer.dilate(layer.weight), layer.input_quantizer.divide(x)
    with bypassed(nn.ModuleList([layer])):
        expected = layer(x)
        layer.weight = nn.Parameter(weight)
        assert torch.allclose(layer(quotient), expected, atol=1e-5)


@every_layer
@torch.no_grad()
def test_a_layer_made_float_again_reads_undivided_inputs(name):
    layer, _x = dilated(name)
    model = nn.Sequential(pack_layer(layer))
    weight = layer.weight_quantizer(layer.weight) / spread(FACTOR, layer.weight, getattr(layer, "groups", 1))
    restore_float(model)
    assert torch.allclose(model[0].weight, weight, atol=1e-6) and Dilated() not in layer_scheme(model[0]).traits


def test_a_layer_without_a_dilated_channel_is_stored_like_any_other():
    layer, _x = dilated("conv2d", torch.ones(8))
    assert layer_scheme(layer) == (4, 4, ())
    assert sorted(pack_layer(layer).state_dict()) == [
        "bias", "input.scale", "input.zero", "weight.codes", "weight.scale", "weight.zero"
    ]  # fmt: skip


def test_factors_move_with_a_model_and_keep_their_precision():
    layer, _ = dilated("linear")
    packed = pack_layer(layer)
    packed.divide.reciprocal.mul_(1 / 3)
    kept = packed.divide.reciprocal.clone()
    assert torch.equal(packed.half().divide.reciprocal, kept) and packed.divide(torch.ones(1, 8).half()).dtype == torch.half
    assert copy.deepcopy(packed).divide.reciprocal.device == kept.device


def test_calibration_shows_the_grid_what_is_left_after_division():
    layer, x = dilated("linear")
    ((leaf, part),) = layer.input_quantizer.leaves(x)
    assert leaf is layer.input_quantizer.inner and torch.equal(part, x * FACTOR.reciprocal())


def test_gradients_reach_weights_and_grids_through_factors():
    layer, x = dilated("conv2d")
    layer(x).square().mean().backward()
    names = {name for name, parameter in layer.named_parameters() if parameter.grad is not None and parameter.grad.any()}
    assert names == {name for name, _ in layer.named_parameters()}
