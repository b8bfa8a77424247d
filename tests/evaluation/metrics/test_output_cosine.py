import copy

import pytest
import torch

from dmquant.diffusion import trajectories as samples_module
from dmquant.diffusion.pipeline import find_target, open_pipeline
from dmquant.diffusion.sampling import SamplingPlan
from dmquant.evaluation.metrics.output_cosine import cosine_of, measure_output_cosine

HOW = SamplingPlan(steps=3, batch=2)


@pytest.fixture
def pipeline(tiny_folder):
    return open_pipeline(tiny_folder)


def disturb(pipeline, scale: float):
    other = copy.deepcopy(pipeline)
    with torch.no_grad():
        for parameter in other.unet.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    return other


def test_a_model_has_cosine_one_with_itself_at_every_timestep(pipeline):
    measured = measure_output_cosine(find_target(pipeline), find_target(copy.deepcopy(pipeline)), range(3), HOW)
    assert list(measured) == sorted(measured, reverse=True) and len(measured) == 3
    assert list(measured.values()) == pytest.approx([1.0] * 3)


def test_it_is_the_cosine_of_outputs_for_the_inputs_of_the_float_model(pipeline, monkeypatch):
    other = disturb(pipeline, 0.05)
    measured = measure_output_cosine(find_target(other), find_target(pipeline), range(7, 10), HOW)

    monkeypatch.setattr(samples_module, "recording_seeds", lambda seed, count: range(7, 10))
    samples = samples_module.record(pipeline, 3, seed=0, steps=HOW.steps, batch=HOW.batch)
    cosines = cosine_of(samples.call(other.unet).detach(), samples.target)
    for timestep, value in measured.items():
        assert value == pytest.approx(cosines[samples.timestep == timestep].mean().item(), rel=1e-5)
    assert all(-1 < value < 0.9999 for value in measured.values())


def test_a_larger_disturbance_has_a_smaller_cosine(pipeline):
    base = find_target(pipeline)
    near, far = (measure_output_cosine(find_target(disturb(pipeline, scale)), base, range(2), HOW) for scale in (0.01, 0.2))
    assert sum(far.values()) < sum(near.values())


def test_no_hook_is_left(pipeline):
    measure_output_cosine(find_target(pipeline), find_target(pipeline), range(1), HOW)
    assert not pipeline.unet._forward_hooks


def test_opposite_and_orthogonal_outputs_have_cosines_of_minus_one_and_zero():
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [2.0, 2.0]])
    y = torch.tensor([[-3.0, 0.0], [0.0, 5.0], [1.0, 1.0]])
    assert cosine_of(x, y).tolist() == pytest.approx([-1, 0, 1])
