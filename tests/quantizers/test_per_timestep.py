"""A grid per timestep: mixed batches, their gradients, what calibration sets and what inference keeps."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmquant.quantizers.base import FixedGrid
from dmquant.quantizers.per_timestep import PerTimestep, TemporalGrid, TemporalStep
from dmquant.quantizers.timestep_clock import Clock
from dmquant.quantizers.uniform import LearnedStep

TIMESTEPS = torch.tensor([900.0, 600.0, 300.0, 0.0])
SHAPES = {"convolution": (6, 3, 4, 5), "sequence": (6, 7, 3), "embedding": (6, 9)}
MIXED = torch.tensor([0, 900, 300, 300, 900, 0])  # nobody is at 600
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def make(bits=4, lookup="nearest", timesteps=TIMESTEPS, seed=0):
    """A quantizer calibrated on inputs that grow from step to step."""
    quantizer = TemporalStep(bits, Clock(timesteps, lookup))
    generator = torch.Generator().manual_seed(seed)
    step = torch.arange(len(timesteps)).repeat(5)
    x = (torch.randn(len(step), 40, generator=generator) + 0.3) * (1.0 + step.view(-1, 1)) ** 2
    with quantizer.clock.at(timesteps[step], len(step)):
        quantizer.observe(x)
    return quantizer


@every_shape
@pytest.mark.parametrize("lookup", ["nearest", "linear"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_law_holds_in_batches_of_mixed_timesteps_and_for_the_frozen_grid(shape, lookup, bits):
    quantizer, x = make(bits, lookup), torch.randn(shape) * 4
    frozen = quantizer.freeze()
    for timestep in (MIXED, torch.tensor(600), MIXED + 70, torch.tensor([-20, 70, 450, 640, 899, 2000])):
        with torch.no_grad(), quantizer.clock.at(timestep, 6):
            quantizer.clock.has_warned = True
            assert torch.equal(quantizer(x), quantizer.encode(x).decode())
            assert torch.equal(quantizer(x), frozen(x)) and quantizer(x).shape == x.shape


@given(seed=st.integers(0, 999), bits=st.integers(1, 8), exponent=st.integers(-6, 6))
@settings(max_examples=40, deadline=None)
def test_the_law_holds_at_every_magnitude(seed, bits, exponent):
    x = torch.randn(6, 17, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    quantizer = TemporalStep(bits, Clock(TIMESTEPS))
    with quantizer.clock.at(MIXED, 6):
        quantizer.observe(x)
        assert torch.equal(quantizer(x), quantizer.encode(x).decode())
        assert torch.equal(quantizer(x), quantizer.freeze()(x))


@every_shape
def test_a_mixed_batch_equals_its_samples_one_by_one_and_unused_rows_get_no_gradient(shape):
    torch.manual_seed(0)
    x, gradient = torch.randn(shape, dtype=torch.float64) * 40, torch.randn(shape, dtype=torch.float64)
    together = make().double()
    apart = copy.deepcopy(together)
    leaf = x.clone().requires_grad_()
    with together.clock.at(MIXED, 6):
        answer = together(leaf)
        answer.backward(gradient)
    for index, timestep in enumerate(MIXED):
        single = x[index : index + 1].clone().requires_grad_()
        with apart.clock.at(timestep, 1):
            alone = apart(single)
            alone.backward(gradient[index : index + 1])
        assert torch.equal(alone[0], answer[index]) and torch.equal(single.grad[0], leaf.grad[index])
    for ours, theirs in ((together.log_scale, apart.log_scale), (together.zero, apart.zero)):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-12)
        assert ours.grad[1] == 0 and (ours.grad[[0, 2, 3]] != 0).all()


def test_gradients_equal_the_formulas_of_lsq_with_a_learned_zero():
    torch.manual_seed(1)
    quantizer = make(3).double()
    x = (torch.randn(4, 50, dtype=torch.float64) * 6).requires_grad_()
    gradient = torch.randn_like(x)
    with quantizer.clock.at(TIMESTEPS, 4):
        quantizer(x).backward(gradient)
    scale, zero = (table.detach().unsqueeze(1) for table in quantizer.tables())
    level = x.detach() / scale
    inside = (level > -zero) & (level < 7 - zero)
    by_scale = torch.where(inside, level.round() - level, torch.where(level <= -zero, -zero, 7 - zero))
    factor = (50 * 7) ** -0.5
    assert torch.allclose(x.grad, gradient * inside)
    assert torch.allclose(quantizer.log_scale.grad, (gradient * by_scale * scale).sum(1) * factor)
    assert torch.allclose(quantizer.zero.grad, -(gradient * ~inside * scale).sum(1) * factor)


def test_gradients_of_clipped_values_equal_finite_differences():
    # where every value is clipped the output depends on the scale smoothly: no straight-through estimate is involved
    quantizer = TemporalStep(4, Clock(TIMESTEPS)).double()
    with torch.no_grad():
        quantizer.zero.fill_(5)
        quantizer.log_scale.fill_(-1.0)
    x = torch.tensor([[9.0, 10.0], [-9.0, -11.0]], dtype=torch.float64)
    weight = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64)
    with quantizer.clock.at(torch.tensor([900, 0]), 2):
        (quantizer(x) * weight).sum().backward()
        for row in (0, 3):
            values = []
            for delta in (1e-6, -2e-6):
                with torch.no_grad():
                    quantizer.log_scale[row] += delta
                    values.append((quantizer(x) * weight).sum())
            with torch.no_grad():
                quantizer.log_scale[row] += 1e-6
            numeric = (values[0] - values[1]) / 2e-6
            assert torch.allclose(quantizer.log_scale.grad[row], numeric * (2 * 15) ** -0.5, rtol=1e-5)


def test_between_timesteps_a_linear_lookup_trains_both_neighbours_by_their_share():
    quantizer, x = make(lookup="linear").double(), torch.randn(1, 30, dtype=torch.float64) * 20
    with quantizer.clock.at(torch.tensor(375), 1):
        quantizer(x).sum().backward()
    assert quantizer.log_scale.grad[2] == pytest.approx(3 * quantizer.log_scale.grad[1].item()) and quantizer.log_scale.grad[1]
    assert quantizer.log_scale.grad[[0, 3]].tolist() == [0, 0]


@every_shape
def test_channels_last_and_half_precision_inputs_give_the_gradients_of_plain_ones(shape):
    torch.manual_seed(2)
    x, gradient, results = torch.randn(shape), torch.randn(shape), []
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    for leaf in (x.clone(), x.clone(memory_format=layout), x.bfloat16()):
        quantizer = make(8)
        leaf.requires_grad_()
        with quantizer.clock.at(MIXED, 6):
            answer = quantizer(leaf)
            answer.backward(gradient.to(leaf.dtype))
        assert answer.dtype == leaf.grad.dtype == leaf.dtype
        results.append((leaf.grad.float(), quantizer.log_scale.grad, quantizer.zero.grad))
    for one, other in zip(results[0], results[1]):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)
    assert torch.allclose(results[0][0], results[2][0], atol=0.02) and results[2][1].isfinite().all()


def test_calibration_gives_each_step_the_grid_of_its_own_samples():
    quantizer = TemporalStep(4, Clock(TIMESTEPS))
    x = torch.randn(6, 50) * torch.tensor([1.0, 30.0, 5.0, 5.0, 30.0, 1.0]).view(-1, 1)
    with quantizer.clock.at(MIXED, 6):
        quantizer.observe(x)
    scale, zero = quantizer.tables()
    for row, timestep in ((0, 900), (2, 300), (3, 0)):
        alone = LearnedStep(4, symmetric=False)
        alone.observe(x[timestep == MIXED])
        assert torch.allclose(scale[row], alone.grid()[0], rtol=1e-5) and zero[row] == alone.grid()[1]
    assert scale[1] == scale[0] and zero[1] == zero[0]  # nobody was at 600: the nearest step's, the first of two


def test_calibration_of_a_layer_that_reads_several_rows_per_sample():
    quantizer = TemporalStep(4, Clock(TIMESTEPS))
    x = torch.randn(6, 2, 50) * torch.tensor([1.0, 30.0, 5.0, 5.0, 30.0, 1.0]).view(-1, 1, 1)
    twin = copy.deepcopy(quantizer)
    with quantizer.clock.at(MIXED, 6), twin.clock.at(MIXED, 6):
        quantizer.observe(x)
        twin.observe(x.flatten(0, 1))
        assert torch.equal(quantizer(x).flatten(0, 1), twin(x.flatten(0, 1)))
    assert torch.equal(quantizer.log_scale, twin.log_scale)


def test_one_grid_per_step_loses_less_than_one_for_all():
    step = torch.arange(4).repeat(5)
    x = torch.nn.functional.silu(torch.randn(20, 200, generator=torch.Generator().manual_seed(3))) * 3.0 ** step.view(-1, 1)
    static, temporal = LearnedStep(4, symmetric=False), TemporalStep(4, Clock(TIMESTEPS))
    static.observe(x)
    with temporal.clock.at(TIMESTEPS[step], 20):
        temporal.observe(x)
        error = ((temporal(x) - x) / 3.0 ** step.view(-1, 1)).square().mean()
    assert error < 0.2 * ((static(x) - x) / 3.0 ** step.view(-1, 1)).square().mean()


def test_no_update_however_large_changes_the_sign_of_a_scale():
    quantizer, x = make(), torch.randn(6, 30)
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=1e4)
    for _ in range(3):
        with quantizer.clock.at(MIXED, 6):
            quantizer(x).square().sum().backward()
            optimizer.step()
            assert (quantizer.tables()[0] > 0).all() and torch.equal(quantizer(x), quantizer.encode(x).decode())


def test_zero_stays_on_every_grid():
    quantizer = make(lookup="linear")
    quantizer.clock.has_warned = True
    with torch.no_grad(), quantizer.clock.at(torch.tensor([10, 200, 333, 480, 700, 850]), 6):
        assert quantizer(torch.zeros(6, 3)).abs().max() == 0


def test_a_frozen_grid_has_one_row_per_step_in_float32_and_follows_the_same_clock():
    quantizer = make()
    frozen = quantizer.freeze().bfloat16()
    assert isinstance(frozen, FixedGrid) and frozen.traits == quantizer.traits == (PerTimestep(),)
    assert {name: (tuple(value.shape), value.dtype) for name, value in frozen.state_dict().items()} == {
        "scale": ((4,), torch.float32),
        "zero": ((4,), torch.float32),
    }
    assert frozen.clock is quantizer.clock and not list(frozen.parameters())


def test_rates_are_relative_a_log_to_one_and_a_zero_to_its_codes():
    quantizer = make()
    assert quantizer.sizes() == {"log_scale": 1.0, "zero": pytest.approx(quantizer.zero.abs().mean().item())}


@pytest.mark.parametrize("arguments", [(0,), (9,)])
def test_impossible_bits_are_refused(arguments):
    with pytest.raises(ValueError, match="bits"):
        TemporalStep(*arguments, Clock(TIMESTEPS))


def test_an_unknown_start_is_refused():
    with pytest.raises(ValueError, match="init must be one of"):
        TemporalStep(4, Clock(TIMESTEPS), init="best")


def test_steps_compile_to_one_graph():
    quantizer, graphs = TemporalGrid(4, Clock(TIMESTEPS)), []

    def count(module, inputs):
        graphs.append(module)
        return module.forward

    compiled = torch.compile(quantizer, backend=count, fullgraph=True)
    for timestep in TIMESTEPS:
        quantizer.clock.set(timestep, 2)
        compiled(torch.randn(2, 5))
    assert len(graphs) == 1
