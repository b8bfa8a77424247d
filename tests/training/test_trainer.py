import math
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from dmquant.diffusion.trajectories import Samples
from dmquant.errors import DmquantError
from dmquant.nn.fake_quant_layers import swap
from dmquant.quantizers.base import Quantizer
from dmquant.quantizers.uniform import LearnedStep
from dmquant.training.objectives import Distillation, min_snr_weights
from dmquant.training.trainer import (
    SNAPSHOT_EVERY,
    Group,
    Guard,
    Training,
    fit,
    parameter_groups,
    schedule,
    start_optimizer,
    step_generator,
)

RATES = dict(batch=8, learning_rate=1e-2, quantizer_rate=1e-2)


class Line(nn.Module):
    """A denoiser of one layer."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 6)

    def forward(self, sample, timestep, return_dict=True):
        return (self.body(sample),)


def make(seed=0):
    torch.manual_seed(seed)
    teacher = Line()
    x = torch.randn(64, 6)
    samples = Samples(x, torch.zeros(64), teacher(x, 0)[0].detach(), {}, {})
    student = Line()
    student.load_state_dict({name: value + 0.2 * torch.randn_like(value) for name, value in teacher.state_dict().items()})
    swap(student, lambda name, layer: (LearnedStep(3, num_channels=6, ndim=2), LearnedStep(4, symmetric=False)))
    student.body.weight_quantizer.observe(student.body.weight)
    student.body.input_quantizer.observe(x)
    return student, samples


def follow(samples):
    return Distillation(samples, torch.ones(len(samples)))


def distance(student, samples):
    with torch.no_grad():
        return nn.functional.mse_loss(samples.call(student), samples.target).item()


def test_training_brings_the_student_nearer_to_the_teacher():
    student, samples = make()
    before = distance(student, samples)
    losses = fit(student, follow(samples), Training(max_steps=150, **RATES), seed=0)
    assert len(losses) == 150 and distance(student, samples) < 0.5 * before


def test_channels_that_the_sampler_drops_are_not_followed():
    student, samples = make()
    samples = replace(samples, target=samples.target[:, :4])
    loss = follow(samples).loss(student, 8, step=0, generator=step_generator(0, 0, 0), device=torch.device("cpu"))
    loss.backward()
    seen = student.body.weight.grad.abs().sum(1)
    assert seen[:4].all() and not seen[4:].any()


def test_equal_seeds_train_alike_whatever_was_drawn_before():
    states = []
    for noise in (1, 2):
        student, samples = make()
        torch.manual_seed(noise)
        fit(student, follow(samples), Training(max_steps=5, **RATES), seed=3)
        states.append(student.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_zero_steps_change_nothing():
    student, samples = make()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    assert fit(student, follow(samples), Training(max_steps=0, **RATES), seed=0) == []
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())


def test_steps_and_ranks_draw_different_numbers_and_the_same_ones_again():
    def first(*key):
        return torch.rand(4, generator=step_generator(*key)).tolist()

    assert first(0, 1, 0) == first(0, 1, 0)
    assert len({tuple(first(*key)) for key in ((0, 1, 0), (0, 2, 0), (1, 1, 0), (0, 1, 1))}) == 4


def test_quantizer_rates_are_relative_to_each_parameter():
    student, _ = make()
    with torch.no_grad():
        student.body.weight_quantizer.scale.fill_(0.002)
    groups = {id(group.parameters[0]): group for group in parameter_groups(student, Training(max_steps=1, **RATES))}
    assert groups[id(student.body.weight_quantizer.scale)].rate == pytest.approx(2e-5)
    counted = sum(len(group.parameters) for group in groups.values())
    assert counted == len(list(student.parameters()))


class Nested(Quantizer):
    """A quantizer around another one, with a parameter that says its own size."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.shift = inner, nn.Parameter(torch.zeros(3))

    def sizes(self):
        return {"shift": 7.0}


def test_a_quantizer_inside_another_is_found_and_each_says_the_size_of_its_own_parameters():
    student, _ = make()
    inner = student.body.weight_quantizer
    student.body.weight_quantizer = Nested(inner)
    groups = {id(group.parameters[0]): group for group in parameter_groups(student, Training(max_steps=1, **RATES))}
    assert groups[id(student.body.weight_quantizer.shift)].rate == pytest.approx(7e-2)
    assert groups[id(inner.scale)].rate == pytest.approx(1e-2 * inner.scale.mean().item())
    assert sum(len(group.parameters) for group in groups.values()) == len(list(student.parameters()))


def test_only_the_parameters_of_the_groups_are_trained():
    student, samples = make()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    training = Training(max_steps=5, ema_decay=0.5, **RATES)
    fit(student, follow(samples), training, [Group([student.body.bias], 1e-2, 0.1)], seed=0)
    changed = [name for name, value in student.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["body.bias"]
    assert [name for name, parameter in student.named_parameters() if parameter.requires_grad] == ["body.bias"]


def test_each_group_has_its_rate_and_decay():
    student, _ = make()
    trained, optimizer = start_optimizer([Group([student.body.bias], 0.3, 0.1), Group([student.body.weight], 0.2)])
    assert trained == [student.body.bias, student.body.weight]
    assert [(group["lr"], group["peak"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (0.3, 0.3, 0.1),
        (0.2, 0.2, 0.0),
    ]


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_rates_warm_up_and_end_at_zero(decay):
    assert schedule(0, 1000, decay) < schedule(9, 1000, decay) and schedule(999, 1000, decay) < 2e-3
    assert max(schedule(step, 1000, decay) for step in range(1000)) == pytest.approx(1, abs=1e-2)


def test_a_linear_decay_falls_by_the_same_amount_at_each_step():
    assert [schedule(step, 100, "linear") for step in (20, 50, 80)] == pytest.approx([0.8, 0.5, 0.2])


class Faulty(Distillation):
    """Answers NaN at chosen calls."""

    bad: range = range(0)

    def __init__(self, samples, bad):
        super().__init__(samples, torch.ones(len(samples)))
        object.__setattr__(self, "bad", bad)

    def loss(self, student, batch, *, step, generator, device):
        loss = super().loss(student, batch, step=step, generator=generator, device=device)
        return loss * math.nan if step in self.bad else loss


def test_single_bad_steps_are_skipped():
    student, samples = make()
    losses = fit(student, Faulty(samples, range(4, 6)), Training(max_steps=20, **RATES), seed=0)
    assert sum(map(math.isnan, losses)) == 2
    assert all(torch.isfinite(value).all() for value in student.state_dict().values())


@pytest.mark.parametrize("start", [SNAPSHOT_EVERY - 1, SNAPSHOT_EVERY, SNAPSHOT_EVERY + 10])
def test_many_bad_steps_roll_back_once_and_the_run_goes_on(start):
    student, samples = make()
    losses = fit(student, Faulty(samples, range(start, start + 3)), Training(max_steps=start + 40, **RATES), seed=0)
    assert all(map(math.isfinite, losses[start + 3 :]))
    assert distance(student, samples) < losses[0]


def test_a_student_that_starts_almost_perfect_is_not_taken_for_one_that_diverges():
    # one batch's first loss may be thousands of times below the next one's: both are tiny against an answer of zero
    student, _samples = make()
    losses = [1e-9] + [1e-5] * 20
    guard = Guard(list(student.parameters()), torch.optim.SGD(student.parameters()))
    assert not any(guard.refuses(step, loss) for step, loss in enumerate(losses))
    assert guard.refuses(21, 2.0)


@pytest.mark.parametrize("destroyed_at", [SNAPSHOT_EVERY - 2, SNAPSHOT_EVERY - 1, SNAPSHOT_EVERY])
def test_a_rollback_never_returns_to_a_state_that_one_update_destroyed(destroyed_at):
    student, samples = make()

    class Destroying(Distillation):
        def loss(self, student, batch, *, step, generator, device):
            if step == destroyed_at - 1:
                with torch.no_grad():
                    student.body.bias.add_(1e6)  # as an update gone wrong would
            return super().loss(student, batch, step=step, generator=generator, device=device)

    objective = Destroying(samples, torch.ones(len(samples)))
    losses = fit(student, objective, Training(max_steps=destroyed_at + 60, ema_decay=0.5, **RATES), seed=0)
    assert max(losses) > 1e6 and distance(student, samples) < 2 * max(losses[: destroyed_at - 1])


def test_a_second_divergence_stops_with_a_diagnosis():
    student, samples = make()
    with pytest.raises(DmquantError, match="diverged at step 10 .*learning_rate"):
        fit(student, Faulty(samples, range(5, 99)), Training(max_steps=40, **RATES), seed=0)


def test_a_moving_average_trails_the_weights():
    plain, samples = make()
    averaged, _ = make()
    objective = follow(samples)
    before = plain.body.weight.detach().clone()
    fit(plain, objective, Training(max_steps=30, **RATES), seed=0)
    fit(averaged, objective, Training(max_steps=30, ema_decay=0.99, **RATES), seed=0)
    moved = [(model.body.weight.detach() - before).norm() for model in (averaged, plain)]
    assert 0 < moved[0] < moved[1]


def test_bf16_training_leaves_a_float32_student_without_wrappers():
    student, samples = make()
    fit(student, follow(samples), Training(max_steps=3, precision="bf16", **RATES), seed=0)
    assert "forward" not in vars(student) and student.body.weight.dtype == torch.float32


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_weights_make_every_prediction_type_count_as_the_image_it_leads_to(kind):
    # a small error d of the image is d * sqrt(SNR) in the noise and d * sqrt(SNR + 1) in the velocity (Salimans & Ho, 2022)
    _, samples = make()
    samples = replace(samples, timestep=torch.arange(64) * 15)
    scheduler = DDIMScheduler(prediction_type=kind)
    alpha = scheduler.alphas_cumprod[samples.timestep]
    snr = alpha / (1 - alpha)
    size = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones(64)}[kind]
    assert torch.allclose(min_snr_weights(samples, scheduler, 5.0) * size, snr.clamp(max=5.0), rtol=1e-4)


def test_flow_matching_counts_every_sample_alike():
    _, samples = make()
    assert torch.equal(min_snr_weights(samples, FlowMatchEulerDiscreteScheduler(), 5.0), torch.ones(64))


def test_a_sample_of_no_weight_teaches_nothing():
    student, samples = make()
    spoilt = replace(samples, target=torch.where(torch.arange(64).view(-1, 1) < 32, samples.target, 100.0))
    fit(student, Distillation(spoilt, (torch.arange(64) < 32).float()), Training(max_steps=100, **RATES), seed=0)
    assert distance(student, samples) < 1 < spoilt.target[32:].square().mean() / 100
