import copy
import warnings

import pytest
import torch
from torch import nn

from dmquant.clock import Clock, attach


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.arange(4.0))

    def forward(self, sample, timestep, encoder_hidden_states=None):
        return sample * self.scale[self.clock.step].view(-1, 1)


def make():
    denoiser = Denoiser()
    attach(Clock(torch.tensor([900.0, 600.0, 300.0, 0.0])), denoiser)
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
    with pytest.warns(UserWarning, match="not calibrated"):
        assert torch.equal(denoiser(x, 740), x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(denoiser(x, 760), 0 * x)


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
