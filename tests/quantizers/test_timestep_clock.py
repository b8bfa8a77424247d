import copy
import warnings

import pytest
import torch
from torch import nn

from dmquant.quantizers.timestep_clock import LOOKUPS, Clock, Timed, attach_clock, detach_clock


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.arange(4.0))

    def forward(self, sample, timestep, encoder_hidden_states=None):
        return sample * self.clock.read_table(self.scale, len(sample)).view(-1, 1)


def make(lookup="nearest"):
    denoiser = Denoiser()
    attach_clock(Clock(torch.tensor([900.0, 600.0, 300.0, 0.0]), lookup), denoiser)
    return denoiser


def test_mixed_timesteps_give_the_same_result_as_one_by_one():
    denoiser, x = make().double(), torch.randn(4, 3, dtype=torch.float64)
    timestep = torch.tensor([0, 900, 300, 600])
    together = denoiser(x, timestep)
    alone = torch.cat([denoiser(x[i : i + 1], timestep[i]) for i in range(4)])
    assert torch.equal(together, alone)


def test_positional_keyword_scalar_and_integer_timesteps_are_read():
    denoiser, x = make(), torch.ones(2, 3)
    for answer in (denoiser(x, 300), denoiser(sample=x, timestep=torch.tensor(300)), denoiser(x, timestep=300.0)):
        assert torch.equal(answer, 2 * x)


def test_a_sampler_that_calls_twice_per_step_does_not_move_the_clock():
    denoiser, x = make(), torch.ones(1, 3)
    denoiser(x, 600)
    assert torch.equal(denoiser(x, 600), x)


def test_other_step_counts_use_the_nearest_calibrated_step_and_say_so_once():
    denoiser, x = make(), torch.ones(1, 3)
    with torch.no_grad(), pytest.warns(UserWarning, match="not calibrated: each uses the scales of the nearest"):
        assert torch.equal(denoiser(x, 740), x)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(denoiser(x, 760), 0 * x)


def test_training_draws_any_timestep_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make()(torch.ones(1, 3), 740)


@torch.no_grad()
def test_a_linear_lookup_weighs_both_neighbours_and_is_exact_at_calibrated_timesteps():
    denoiser, x = make("linear"), torch.ones(5, 3)
    with pytest.warns(UserWarning, match="interpolated"):
        between = denoiser(x, torch.tensor([750, 660, 10, 950, -3]))
    assert torch.allclose(between[:, 0], torch.tensor([0.5, 0.8, 3 - 1 / 30, 0.0, 3.0]))
    exact = denoiser(torch.ones(4, 3), torch.tensor([900, 600, 300, 0]))
    assert exact[:, 0].tolist() == [0, 1, 2, 3]
    assert len(Clock(torch.tensor([5.0]), "linear").read_table(torch.ones(1), 3)) == 3


def test_a_layer_that_reads_several_rows_per_sample_or_one_for_all_gets_the_entries_of_its_samples():
    clock, table = make().clock, torch.arange(4.0)
    clock.set(torch.tensor([0, 300]), 2)
    assert clock.read_table(table, 6).tolist() == [3, 3, 3, 2, 2, 2] and clock.read_table(table, 1).tolist() == [3]
    with pytest.raises(ValueError, match="3 rows cannot be told apart as 2 samples"):
        clock.read_table(table, 3)


@pytest.mark.parametrize("timestep", [900, 750, 660.5, 300, 10, 0, -3, 1000])
@pytest.mark.parametrize("lookup", LOOKUPS)
def test_an_entry_that_all_samples_read_is_read_once_bit_for_bit(lookup, timestep):
    clock, table = make(lookup).clock, torch.rand(4)
    clock.set(torch.tensor([0, timestep, 900]), 3)
    assert clock.read_shared(table) is None
    clock.set(torch.tensor(timestep), 3)
    assert torch.equal(clock.read_shared(table).expand(3), clock.read_table(table, 3))
    clock.set(torch.tensor([300, 300]), 2)
    assert clock.read_shared(table) == table[2]


class Follower(Timed, nn.Module):
    pass


def test_a_timed_module_follows_the_clock_of_its_denoiser_and_its_copy_that_of_the_copy():
    denoiser = Denoiser()
    denoiser.inner = Follower()
    attach_clock(Clock(torch.tensor([900.0, 0.0])), denoiser)
    twin = copy.deepcopy(denoiser)
    assert denoiser.inner.clock is denoiser.clock and twin.inner.clock is twin.clock is not denoiser.clock
    assert set(denoiser.state_dict()) == {"scale", "clock.timesteps"}


def test_a_detached_clock_leaves_nothing_behind():
    denoiser = make()
    detach_clock(denoiser)
    assert set(denoiser.state_dict()) == {"scale"} and not denoiser._forward_pre_hooks
    detach_clock(denoiser)


def test_a_denoiser_has_one_clock_however_often_one_is_attached():
    denoiser, clock = make(), Clock(torch.tensor([5.0]))
    for _ in range(2):
        attach_clock(clock, denoiser)
    denoiser(torch.ones(2, 3), 5)
    assert denoiser.clock is clock and len(denoiser._forward_pre_hooks) == 1 and clock.step.tolist() == [0, 0]


def test_timesteps_stay_whole_in_models_of_half_precision():
    denoiser = make().bfloat16()
    assert denoiser.clock.timesteps.dtype == torch.float32 and denoiser.scale.dtype == torch.bfloat16


@pytest.mark.parametrize("arguments", [(torch.zeros(0),), (torch.zeros(2, 2),), (torch.zeros(2), "cubic")])
def test_a_clock_without_steps_or_of_an_unknown_lookup_is_refused(arguments):
    with pytest.raises(ValueError, match="must be"):
        Clock(*arguments)


def test_a_deep_copy_has_a_clock_of_its_own():
    denoiser = make()
    twin = copy.deepcopy(denoiser)
    twin(torch.ones(1, 3), 0)
    assert twin.clock is not denoiser.clock
    assert twin.clock.step.item() == 3 and denoiser.clock.step.item() == 0


def test_a_call_without_a_timestep_names_the_arguments():
    with pytest.raises(ValueError, match="its arguments are sample"):
        make()(torch.ones(1, 3), None)


def test_the_step_can_be_set_outside_a_call_and_is_put_back():
    clock = make().clock
    with clock.at(torch.tensor([0, 300]), 2):
        assert clock.step.tolist() == [3, 2]
    assert clock.step.tolist() == [0]


def test_timesteps_travel_in_the_state_dict():
    assert make().state_dict()["clock.timesteps"].tolist() == [900, 600, 300, 0]


def test_twenty_steps_recompile_nothing():
    denoiser, graphs = make(), []

    def count(module, inputs):
        graphs.append(module)
        return module.forward

    compiled = torch.compile(denoiser, backend=count, fullgraph=True)
    compiled(torch.ones(2, 3), torch.tensor(900.0))
    first = len(graphs)
    for timestep in torch.linspace(900, 0, 20):
        compiled(torch.ones(2, 3), timestep)
    assert len(graphs) == first
