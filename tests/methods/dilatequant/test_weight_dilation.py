"""Dilation factors are the largest that leave the range of every output channel unchanged."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dmquant.methods.dilatequant.weight_dilation import (
    MAX_FACTOR,
    describe_dilation,
    dilated_layers,
    dilation_factors,
    set_factors,
    smoothing_factors,
    wrap_layers,
)
from dmquant.nn.fake_quant_layers import swap
from dmquant.quantizers.dilated import spread
from dmquant.quantizers.uniform import LearnedStep

MAKES = {
    "linear": lambda outputs, inputs: nn.Linear(inputs, outputs),
    "conv1d": lambda outputs, inputs: nn.Conv1d(inputs, outputs, 3),
    "conv2d": lambda outputs, inputs: nn.Conv2d(inputs, outputs, 3),
    "grouped": lambda outputs, inputs: nn.Conv2d(2 * inputs, 2 * outputs, 3, groups=2),
}
INPUTS = {"linear": (3, 5), "conv1d": (3, 5, 7), "conv2d": (3, 5, 6, 6), "grouped": (3, 10, 6, 6)}


@st.composite
def layers(draw):
    """Draws a layer with channels of different magnitudes, sometimes with one-sided rows or a channel of zeros."""
    kind, outputs, inputs = draw(st.sampled_from(list(MAKES))), draw(st.integers(1, 5)), draw(st.integers(1, 9))
    layer, generator = MAKES[kind](outputs, inputs), torch.Generator().manual_seed(draw(st.integers(0, 1 << 20)))
    weight = torch.randn(layer.weight.shape, generator=generator)
    size = 10.0 ** torch.empty(weight.shape[1]).uniform_(-draw(st.integers(0, 12)), 0, generator=generator)
    weight *= size.view(1, -1, *(1,) * (weight.ndim - 2))
    if draw(st.booleans()):
        weight[0] = weight[0].abs() * draw(st.sampled_from([-1, 1]))
    if draw(st.booleans()):
        weight[:, draw(st.integers(0, inputs - 1))] = 0
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def ranges(weight):
    """Returns minimum and maximum of each output channel, zero included."""
    rows = weight.flatten(1)
    return rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)


@settings(max_examples=300, deadline=None)
@given(layers(), st.booleans())
def test_dilation_keeps_every_range_bit_for_bit_and_every_factor_is_at_least_one(layer, is_double):
    weight, groups = layer.weight.double() if is_double else layer.weight, getattr(layer, "groups", 1)
    factor = dilation_factors(weight, groups)
    assert factor.isfinite().all() and (factor >= 1).all() and (factor <= MAX_FACTOR).all()
    after = weight * spread(factor, weight, groups)
    assert all(torch.equal(one, other) for one, other in zip(ranges(weight), ranges(after)))


@settings(max_examples=200, deadline=None)
@given(layers())
def test_a_larger_factor_would_change_a_range(layer):
    weight, groups = layer.weight, getattr(layer, "groups", 1)
    factor = dilation_factors(weight, groups)
    rows = weight.reshape(groups, -1, weight.shape[1], weight[0, 0].numel())
    is_bounded = (factor < MAX_FACTOR) & (rows != 0).any(3).any(1).flatten()
    for channel in is_bounded.nonzero().flatten():
        more = factor.clone()
        more[channel] *= 1 + 1e-5
        after = ranges(weight * spread(more, weight, groups))
        assert any((one != other).any() for one, other in zip(ranges(weight), after))


@settings(max_examples=100, deadline=None)
@given(layers(), st.integers(0, 1 << 20))
def test_dividing_inputs_and_dilating_weights_leaves_the_output_unchanged(layer, seed):
    groups = getattr(layer, "groups", 1)
    channels = layer.weight.shape[1] * groups
    shape = (3, channels, *(6,) * (layer.weight.ndim - 2))
    x, factor = torch.randn(shape, generator=torch.Generator().manual_seed(seed)), dilation_factors(layer.weight, groups)
    expected = layer(x)
    layer.weight = nn.Parameter(layer.weight * spread(factor, layer.weight, groups), requires_grad=False)
    quotient = x * factor.reciprocal().view(-1, *(1,) * (layer.weight.ndim - 2))
    assert torch.allclose(layer(quotient), expected, atol=1e-5 * max(1.0, expected.abs().max().item()))


def test_channels_with_an_extreme_weight_and_channels_of_zeros_are_not_dilated():
    weight = torch.tensor([[4.0, -1.0, 0.5, 0.0], [1.0, -2.0, -1.0, 0.0]])
    factor = dilation_factors(weight)
    assert factor[[0, 1, 3]].tolist() == [1, 1, 1] and factor[2].item() == pytest.approx(2)


def test_smoothing_factors_follow_the_input_magnitudes_up_to_the_dilation_factors():
    torch.manual_seed(0)
    weight, magnitude = torch.randn(4, 12) * torch.linspace(0.1, 1, 12), torch.rand(12) + 0.01
    limit = dilation_factors(weight)
    factor = smoothing_factors(weight, magnitude)
    assert (factor >= 1).all() and (factor <= limit).all() and not torch.equal(factor, limit)
    assert torch.allclose(smoothing_factors(weight, magnitude * 100), factor)
    magnitude[5] = 1e6
    assert smoothing_factors(weight, magnitude)[5] == limit[5]
    assert (smoothing_factors(weight, torch.zeros(12)) == 1).all()


def test_only_layers_with_quantized_weights_and_inputs_are_wrapped():
    model = nn.Sequential(nn.Linear(8, 2), nn.Conv2d(8, 2, 3), nn.Linear(2, 2))
    inputs = [LearnedStep(4, symmetric=False), LearnedStep(4, symmetric=False), nn.Identity()]
    swap(model, lambda name, layer: (LearnedStep(4, num_channels=2, ndim=layer.weight.ndim), inputs[int(name)]))
    wrap_layers(model)
    assert list(dilated_layers(model)) == ["0", "1"]
    factor = torch.tensor([1.0, 2, 1, 1, 3, 1, 1, 1])
    set_factors(model[0], factor)
    assert torch.equal(model[0].weight_quantizer.factor, factor)
    assert torch.equal(model[0].input_quantizer.divide.reciprocal, 1 / factor)


def test_dilated_channels_of_a_float_model_are_counted():
    model = nn.ModuleDict({"first": nn.Linear(4, 2), "second": nn.Conv2d(4, 2, 1)})
    weight = torch.tensor([[4.0, -1.0, 0.5, 0.0], [1.0, -2.0, -1.0, 0.0]])
    model["first"].weight.data = weight
    model["second"].weight.data = torch.ones(2, 4, 1, 1)
    assert describe_dilation(model, ["first", "second"], fold=True) == {
        "first": "1 of 4 channels dilated", "second": "0 of 4 channels dilated"
    }  # fmt: skip
