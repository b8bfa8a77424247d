"""Inputs of two parts: the law, the grids of the parts, through packed layers and back."""

import pytest
import torch
from torch import nn

from dmquant.nn import dispatch
from dmquant.nn.convert import empty_layer, layer_scheme, pack_layer, restore_float
from dmquant.nn.fake_quant_layers import quantized
from dmquant.nn.packed_layers import slices_of
from dmquant.nn.scheme import parse_trait
from dmquant.quantizers.dilated import Dilated, DilatedInput, DilatedWeight
from dmquant.quantizers.per_part import Heads, PerHead, PerPart, Split, SplitGrid
from dmquant.quantizers.per_timestep import PerTimestep, TemporalStep
from dmquant.quantizers.timestep_clock import Clock
from dmquant.quantizers.uniform import LearnedStep
from dmquant.training.calibration import Collector

SIZES = (5, 3)
MAKES = {
    "conv1d": (lambda: nn.Conv1d(8, 6, 3, padding=1), (3, 8, 9)),
    "shortcut": (lambda: nn.Conv2d(8, 6, 1), (3, 8, 7, 7)),
    "conv2d": (lambda: nn.Conv2d(8, 6, 3, padding=1), (3, 8, 7, 7)),
}
every_layer = pytest.mark.parametrize("name", MAKES)
FACTOR = torch.tensor([1.0, 2, 1, 1.5, 1, 3, 1, 1.1])
CLOCK = Clock(torch.tensor([9.0, 5.0, 0.0]))


def split_layer(name, *, temporal=True, factor=None):
    """A layer whose input has a second part far larger than the first, and such inputs, one at each timestep."""
    torch.manual_seed(0)
    make, shape = MAKES[name]
    layer, x = make(), torch.randn(shape)
    x[:, SIZES[0] :] *= 20
    weight = LearnedStep(4, num_channels=6, ndim=layer.weight.ndim)
    grid = Split([TemporalStep(4, CLOCK) if temporal else LearnedStep(4, symmetric=False) for _ in SIZES], SIZES)
    if factor is not None:
        weight, grid = DilatedWeight(weight, 8), DilatedInput(grid, 8, layer.weight.ndim - 2)
        weight.factor.copy_(factor)
        grid.divide.reciprocal.copy_(factor.reciprocal())
    weight.observe(layer.weight)
    CLOCK.set(CLOCK.timesteps, 3)
    grid.observe(x)
    return quantized(layer, weight, grid), x


@every_layer
@pytest.mark.parametrize("temporal", [False, True])
@torch.no_grad()
def test_the_law_holds_and_each_part_is_rounded_as_alone(name, temporal):
    layer, x = split_layer(name, temporal=temporal)
    grid = layer.input_quantizer
    y, codes = grid(x), grid.encode(x)
    assert torch.equal(y, codes.decode()) and codes.bits == grid.bits == 4 and codes.codes.shape == x.shape
    first, second = x.split(SIZES, 1)
    assert torch.equal(y, torch.cat([grid.parts[0](first), grid.parts[1](second)], 1))
    assert grid.parts[1].encode(second).scale.min() > 5 * grid.parts[0].encode(first).scale.max()


@every_layer
@pytest.mark.parametrize("factor", [None, FACTOR], ids=["plain", "dilated"])
@torch.no_grad()
def test_a_packed_layer_computes_the_same_and_says_where_the_second_part_begins(name, factor):
    layer, x = split_layer(name, factor=factor)
    packed = pack_layer(layer)
    assert torch.equal(packed(x), layer(x)) and type(packed.input) is SplitGrid
    traits = (PerTimestep(), PerPart(5)) if factor is None else (PerTimestep(), Dilated(), PerPart(5))
    assert layer_scheme(packed) == layer_scheme(layer) == (4, 4, traits)
    empty = empty_layer(layer, layer_scheme(layer), dtype=torch.float32, device="cpu", clock=CLOCK)
    empty.load_state_dict(packed.state_dict(), assign=True)
    assert torch.equal(empty(x), layer(x))
    model = nn.Sequential(packed)
    restore_float(model)
    assert type(model[0]) in (nn.Conv1d, nn.Conv2d)


@every_layer
@pytest.mark.parametrize("temporal, factor", [(False, None), (True, None), (True, FACTOR)], ids=["static", "temporal", "dilated"])
@torch.no_grad()
def test_kernels_multiply_each_part_by_its_own_codes(name, temporal, factor, monkeypatch, has_compiler):
    layer, x = split_layer(name, temporal=temporal, factor=factor)
    packed = pack_layer(layer)
    expected, stored = packed(x), {key: value.clone() for key, value in packed.state_dict().items()}
    monkeypatch.setenv("DMQUANT_KERNELS", "c")
    assert torch.allclose(packed(x), expected, atol=1e-5 * expected.abs().max().item())
    parts = slices_of(packed)
    assert [part.weight.shape[1] for part in parts] == [5, 3]
    assert all(bool(part.weight.blocked) == has_compiler for part in parts)
    assert slices_of(packed) is parts and all(torch.equal(value, stored[key]) for key, value in packed.state_dict().items())
    run = dispatch.run_kernel
    monkeypatch.setattr(dispatch, "can_fuse", lambda part, piece: False)
    monkeypatch.setattr(dispatch, "run_kernel", lambda part, piece: None if part is parts[1] else run(part, piece))
    assert torch.allclose(packed(x), expected, atol=1e-5 * expected.abs().max().item()), "one part has no kernel"
    packed.weight.codes.zero_()
    values = packed.weight.dequantize()
    expected = packed._conv_forward(packed.input(packed.divide(x)), values, packed.bias)
    assert torch.allclose(packed(x), expected, rtol=1e-4, atol=1e-3)


def test_calibration_draws_from_each_part_by_itself():
    layer, x = split_layer("conv2d", factor=torch.tensor([1.0, 2, 1, 1, 1, 1, 1, 1]))
    collector = Collector(0, layer.input_quantizer)
    collector.note(layer, (x,))
    assert list(collector.rows) == list(layer.input_quantizer.inner.parts)
    for rows, part in zip(collector.rows.values(), (x[:, :5], x[:, 5:])):
        assert torch.equal(torch.cat(rows)[:, -1], part.flatten(1).amax(1)) and len(rows[0]) == 3


def test_gradients_reach_both_parts_and_only_rows_in_use():
    layer, x = split_layer("conv2d")
    x = x[:1].clone().requires_grad_()
    CLOCK.set(torch.tensor(5.0), 1)
    layer(x).square().mean().backward()
    assert x.grad.abs().flatten(2).amax(2).gt(0).all()
    for part in layer.input_quantizer.parts:
        assert part.log_scale.grad[1] != 0 and (part.log_scale.grad[[0, 2]] == 0).all()


@torch.no_grad()
def test_each_head_is_rounded_on_its_own_grid_for_inference_too():
    torch.manual_seed(0)
    x = torch.randn(3, 4, 7, 5) * torch.tensor([1.0, 10, 0.1, 3]).view(4, 1, 1)
    CLOCK.set(CLOCK.timesteps, 3)
    heads = Heads([TemporalStep(8, CLOCK) for _ in range(4)])
    heads.observe(x)
    y, codes = heads(x), heads.encode(x)
    assert torch.equal(y, codes.decode()) and codes.scale.shape == (3, 4, 1, 1) and heads.traits == (PerTimestep(), PerHead())
    assert torch.equal(heads.freeze()(x), y) and heads.freeze().traits == heads.traits
    assert torch.equal(y[:, 2:3], heads.parts[2](x[:, 2:3])) and (codes.scale[:, 1] > 5 * codes.scale[:, 0]).all()
    alone = []
    for index, timestep in enumerate(CLOCK.timesteps):
        CLOCK.set(timestep, 1)
        alone.append(heads(x[index : index + 1].double()))
    CLOCK.set(CLOCK.timesteps, 3)
    assert torch.equal(heads(x.double()), torch.cat(alone))


@pytest.mark.parametrize("text", ["split", "split:", "split:0", "split:-1", "split:x", "split:5.0", "other", "split:٣", 5, None])
def test_a_split_without_a_count_of_channels_is_no_trait(text):
    assert parse_trait(text) is None
    assert parse_trait("split:12") == PerPart(12)


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="give each part a grid and channels"):
        Split([LearnedStep(4, symmetric=False)] * 2, (5, 0))
    with pytest.raises(ValueError, match="equally many bits"):
        Split([LearnedStep(4, symmetric=False), LearnedStep(8, symmetric=False)], (5, 3))
