import copy
import math

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, EulerDiscreteScheduler, UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput

from dmquant.checkpoint import serialization
from dmquant.diffusion.clip_range import RANGE, WIDER, clip_like, clips, draw_images, fit_clipping
from dmquant.diffusion.pipeline import find_target
from dmquant.diffusion.sampling import SamplingPlan
from dmquant.quantization import quantize

SPREAD = 0.3  # of the colours
HOW = SamplingPlan(steps=10, batch=8)
QUICK = dict(trajectories=2, sampling_steps=2, calibration_samples=4, max_steps=0, batch=2, init="minmax")


class Plain(UNet2DModel):
    """The perfect denoiser of images of one normally distributed colour each, with errors of a given size of its own."""

    error = 0.0

    def forward(self, sample, timestep, return_dict=True):
        alpha = DDIMScheduler().alphas_cumprod[timestep]
        seen = sample.mean((2, 3), keepdim=True) / alpha.sqrt()
        doubt = (1 - alpha) / alpha / sample.shape[2:].numel()
        answer = (sample - alpha.sqrt() * seen * SPREAD**2 / (SPREAD**2 + doubt)) / (1 - alpha).sqrt()
        noise = torch.randn(sample.shape, generator=torch.Generator().manual_seed(int(timestep)))
        return UNet2DOutput(answer + self.error * noise)


class Diverging(Plain):
    def forward(self, sample, timestep, return_dict=True):
        return UNet2DOutput(sample * math.nan)


def make_pipeline(kind: type = Plain, **settings) -> DDIMPipeline:
    network = kind(sample_size=32, block_out_channels=(8,), norm_num_groups=4, down_block_types=("DownBlock2D",),
                   up_block_types=("UpBlock2D",), layers_per_block=1)  # fmt: skip
    return DDIMPipeline(network, DDIMScheduler(**settings))


def noisy(teacher: DDIMPipeline, error: float = 0.1) -> DDIMPipeline:
    student = make_pipeline(**{key: teacher.scheduler.config[key] for key in ("clip_sample", RANGE)})
    student.unet.error = error
    return student


def colours(pipeline: DDIMPipeline) -> torch.Tensor:
    return draw_images(find_target(pipeline), range(8), HOW).mean((2, 3)) / 127.5 - 1


def test_errors_of_the_denoiser_make_images_pale_and_a_fitted_range_gives_the_colour_back():
    teacher = make_pipeline()
    student, wanted = noisy(teacher), colours(teacher)
    pale = colours(student)
    fit_clipping(find_target(student), find_target(teacher), range(8), HOW)
    assert pale.norm() < 0.8 * wanted.norm()
    assert (colours(student) - wanted).norm() < 0.5 * (pale - wanted).norm()
    assert student.scheduler.config[RANGE] > 1.0


def test_the_fitted_range_is_the_narrowest_candidate_nearly_as_near_to_the_teacher_as_any():
    teacher = make_pipeline()
    student, wanted, distances = noisy(teacher), draw_images(find_target(teacher), range(8), HOW), {}
    fit_clipping(find_target(student), find_target(teacher), range(8), HOW)
    for value in WIDER:
        trial = noisy(teacher)
        trial.scheduler = DDIMScheduler(clip_sample_range=value)
        distances[value] = (draw_images(find_target(trial), range(8), HOW) - wanted).square().mean().item()
    chosen = student.scheduler.config[RANGE]
    assert all(distances[chosen] <= 1.2 * distance for distance in distances.values())
    assert all(distances[value] > 1.2 * min(distances.values()) for value in WIDER if value < chosen)


def test_a_perfect_student_keeps_the_scheduler_that_it_shares():
    teacher = make_pipeline()
    student = copy.copy(teacher)
    fit_clipping(find_target(student), find_target(teacher), range(8), HOW)
    assert student.scheduler is teacher.scheduler


def test_candidates_are_multiples_of_the_range_that_the_teacher_has():
    teacher = make_pipeline(clip_sample_range=0.5)
    student = noisy(teacher)
    fit_clipping(find_target(student), find_target(teacher), range(8), HOW)
    assert student.scheduler.config[RANGE] in [0.5 * factor for factor in WIDER]
    assert teacher.scheduler.config[RANGE] == 0.5


@pytest.mark.parametrize("settings", [{"clip_sample": False}, {"thresholding": True}])
def test_a_sampler_without_a_fixed_range_stays_as_it_is(settings):
    pipeline = make_pipeline(**settings)
    before = pipeline.scheduler
    fit_clipping(find_target(pipeline), find_target(make_pipeline(**settings)), range(4), HOW)
    assert pipeline.scheduler is before and not clips(before)


def test_a_student_that_cannot_be_sampled_from_keeps_its_scheduler_and_is_not_lost():
    teacher, student = make_pipeline(), make_pipeline(Diverging)
    before = student.scheduler
    fit_clipping(find_target(student), find_target(teacher), range(4), HOW)
    assert student.scheduler is before


def test_no_seeds_means_no_fit():
    teacher = make_pipeline()
    student = noisy(teacher)
    before = student.scheduler
    fit_clipping(find_target(student), find_target(teacher), (), HOW)
    assert student.scheduler is before


def test_two_models_may_be_drawn_by_one_sampler_each_in_its_own_range():
    fitted, own = DDIMScheduler(clip_sample_range=2.5), DDIMScheduler()
    assert clip_like(fitted, own).config[RANGE] == 1.0 and fitted.config[RANGE] == 2.5
    assert clip_like(fitted, EulerDiscreteScheduler()) is fitted
    assert clip_like(own, own) is own


def test_the_range_survives_saving_and_0_images_keep_the_float_models(pipeline, tmp_path):
    quantized = quantize(pipeline, weight_bits=2, act_bits=2, **QUICK)
    quantized.scheduler = DDIMScheduler.from_config(quantized.scheduler.config, clip_sample_range=2.5)
    loaded = serialization.load(serialization.save(quantized, tmp_path / "saved"))
    assert loaded.scheduler.config[RANGE] == 2.5
    kept = quantize(pipeline, weight_bits=2, act_bits=2, clip_images=0, **QUICK)
    assert kept.scheduler is pipeline.scheduler
