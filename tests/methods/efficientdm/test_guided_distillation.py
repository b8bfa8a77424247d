"""Selection of the recorded calls per training step, and the error after guidance."""

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import nn

from dmquant.diffusion.conditioning import Conditioning
from dmquant.diffusion.trajectories import Samples, record
from dmquant.methods.efficientdm.guided_distillation import find_pairs, make_guided_distillation
from dmquant.training.objectives import Distillation
from dmquant.training.trainer import step_generator
from tests.text import make_text_pipeline


class Shift(nn.Module):
    """Returns its input plus a trained number, scaled by the condition."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, sample, timestep, class_labels=None, encoder_hidden_states=None, return_dict=True):
        labels = 0 if class_labels is None else class_labels.view(-1, 1)
        text = 0 if encoder_hidden_states is None else encoder_hidden_states
        return (sample + self.shift * (1 + labels + text),)


def recorded(trajectories=4, steps=3, chunk=2):
    """Returns samples in the order of a recording: chunks of trajectories, by denoising step. x is (trajectory, step)."""
    calls = [(first, step) for first in range(0, trajectories, chunk) for step in range(steps)]
    rows = [(number, step) for first, step in calls for number in range(first, first + chunk)]
    x = torch.tensor([[float(number), float(step)] for number, step in rows])
    timestep = torch.tensor([900 - 300 * step for _, step in rows])
    return Samples(x, timestep, x.clone(), {}, {})


def paired(guidance=1.5, **conditioning):
    """Returns samples with each call for two conditions, in two halves as pipelines batch them."""
    samples = recorded()
    index = torch.cat([torch.arange(start, start + 2).repeat(2) for start in range(0, len(samples), 2)])
    second = torch.tensor([0, 0, 1, 1]).repeat(len(samples) // 2)
    doubled = samples[index]
    return replace(doubled, conditioning={name: choose(second) for name, choose in conditioning.items()}, guidance=guidance)


def loss(objective, student, step=0, batch=4):
    return objective.loss(student, batch, step=step, generator=step_generator(0, step, 0), device=torch.device("cpu"))


def seen(objective, step, batch=2):
    rows = objective.calls[objective.choose_calls(batch, step, step_generator(0, step, 0))].flatten()
    return [tuple(int(value) for value in objective.samples.x[row]) for row in rows]


def test_in_sequence_each_optimiser_step_is_the_next_denoising_step_of_the_same_trajectories():
    objective = make_guided_distillation(recorded(), torch.ones(12), in_sequence=True)
    assert [seen(objective, step) for step in range(6)] == [
        [(0, 0), (1, 0)],
        [(0, 1), (1, 1)],
        [(0, 2), (1, 2)],
        [(2, 0), (3, 0)],
        [(2, 1), (3, 1)],
        [(2, 2), (3, 2)],
    ]
    assert seen(objective, 6) == [(0, 0), (1, 0)] and seen(objective, 1, batch=3) == [(0, 1), (1, 1), (2, 1)]


def test_in_sequence_each_process_takes_different_trajectories(monkeypatch):
    objective = make_guided_distillation(recorded(8), torch.ones(24), in_sequence=True)
    taken = []
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        taken += [number for step in (0, 3) for number, _ in seen(objective, step)]
    assert sorted(taken) == list(range(8))


def test_cached_trajectories_mix_timesteps_in_a_batch_and_depend_on_the_step_alone():
    objective = make_guided_distillation(recorded(), torch.ones(12), in_sequence=False)
    assert len({step for _, step in seen(objective, 0, batch=12)}) == 3
    assert seen(objective, 3) == seen(objective, 3) and seen(objective, 3, 8) != seen(objective, 4, 8)


def test_without_pairs_the_loss_is_that_of_plain_distillation():
    samples, weight, student = recorded(), torch.rand(12), Shift()
    student.shift.data.fill_(0.3)
    plain = Distillation(samples, weight)
    objective = make_guided_distillation(samples, weight, in_sequence=False)
    assert find_pairs(samples) is None
    assert torch.allclose(loss(objective, student), loss(plain, student))


def test_pairs_are_found_by_their_input_unless_a_sample_is_left_over():
    pairs = find_pairs(paired())
    assert pairs.tolist()[:3] == [[0, 2], [1, 3], [4, 6]] and len(pairs) == 12
    assert find_pairs(paired()[:-1]) is None


@pytest.mark.parametrize(
    "name, conditional_shift, unconditional_shift",
    # the conditional sample is first with labels, second with text
    [("class_labels", 1.0, 2.0), ("encoder_hidden_states", 2.0, 1.0)],
)
def test_under_guidance_the_loss_is_the_error_of_the_combined_output(name, conditional_shift, unconditional_shift):
    samples, student = paired(3.0, **{name: lambda second: second.view(-1, 1).float()}), Shift()
    student.shift.data.fill_(0.5)  # the error of the first sample of each pair is 0.5, of the second 1.0
    objective = make_guided_distillation(samples, torch.ones(24), in_sequence=False)
    mixed = 0.5 * unconditional_shift + 3.0 * 0.5 * (conditional_shift - unconditional_shift)
    assert loss(objective, student).item() == pytest.approx(mixed**2)


def test_a_batch_of_pairs_is_no_larger_than_one_of_single_calls():
    sizes = []

    class Counting(Shift):
        def forward(self, sample, timestep, **conditioning):
            sizes.append(len(sample))
            return super().forward(sample, timestep)

    loss(make_guided_distillation(paired(), torch.ones(24), in_sequence=False), Counting(), batch=6)
    loss(make_guided_distillation(recorded(), torch.ones(12), in_sequence=False), Counting(), batch=6)
    assert sizes == [6, 6]


def make_dit():
    torch.manual_seed(0)
    network = DiTTransformer2DModel(
        num_layers=1, num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, sample_size=4, patch_size=2,
        num_embeds_ada_norm=1000,
    )  # fmt: skip
    vae = AutoencoderKL(latent_channels=4, block_out_channels=(4,), norm_num_groups=2)
    return DiTPipeline(network, vae, DDIMScheduler(clip_sample=False))


GUIDED = {
    "class labels": (make_dit, Conditioning(class_labels=(7, 8), guidance=4.0)),
    "text": (make_text_pipeline, Conditioning(prompts=("a cat", "dogs"), guidance=3.0)),
    "text at its own scale": (make_text_pipeline, Conditioning(prompts=("a cat", "dogs"))),
}


@pytest.mark.parametrize("name", GUIDED)
def test_the_combined_output_is_the_one_that_the_sampler_uses(name):
    make, wanted = GUIDED[name]
    pipeline = make()
    samples = record(pipeline, 2, steps=3, seed=0, conditioning=wanted)
    objective = make_guided_distillation(samples, torch.ones(len(samples)), in_sequence=True)
    assert samples.guidance == (wanted.guidance or 7.5) and objective.coefficients[0] != 1
    for now, then in zip(objective.sequence, objective.sequence[1:]):
        rows = objective.calls[now]
        answer = sum(coefficient * samples.target[rows[:, place], :4] for place, coefficient in enumerate(objective.coefficients))
        stepped = pipeline.scheduler.step(answer, int(samples.timestep[rows[0, 0]]), samples.x[rows[:, 0]]).prev_sample
        assert torch.allclose(stepped, samples.x[objective.calls[then][:, 0]], atol=1e-5)


def test_a_recording_with_unknown_guidance_is_distilled_call_by_call():
    assert make_guided_distillation(paired(None), torch.ones(24), in_sequence=False).coefficients == (1.0,)


def test_the_recording_of_a_guided_pipeline_comes_in_pairs_with_the_condition_first():
    pipeline = make_dit()
    samples = record(pipeline, 3, steps=2, seed=0, batch=2, conditioning=Conditioning(class_labels=(7, 8), guidance=4.0))
    pairs = find_pairs(samples)
    labels = samples.conditioning["class_labels"][pairs]
    assert len(pairs) == 6 and set(labels[:, 0].tolist()) == {7, 8} and set(labels[:, 1].tolist()) == {1000}
    assert make_guided_distillation(samples, torch.ones(12), in_sequence=True).coefficients == (4.0, -3.0)
