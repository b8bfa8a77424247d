"""Fits the sampler's clip range to a quantized denoiser.

Samplers of pixels clip their estimate of the clean image, (x - sigma * output) / alpha, to [-1, 1] in every step. At the first
steps this estimate contains the rounding noise of the output about a hundredfold, and clipping pulls it towards zero. These
steps determine the mean colour of an image, so images of a quantized model become pale. A wider range passes the noise, and
later steps average it out. The fitted value is `clip_sample_range` in the scheduler's own config, so that the folder stays a
plain diffusers pipeline.
"""

from collections.abc import Sequence

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from dmquant.diffusion.pipeline import Target, evaluating
from dmquant.diffusion.sampling import SamplingPlan, generate
from dmquant.errors import DmquantError
from dmquant.progress import Track, plain

RANGE = "clip_sample_range"
WIDER = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0)  # candidates, as multiples of the pipeline's own range
NEARLY = 1.2  # 0.8 dB


def clips(scheduler: SchedulerMixin) -> bool:
    """Returns whether the sampler clips to a fixed range."""
    config = scheduler.config
    return bool(config.get("clip_sample")) and RANGE in config and not config.get("thresholding")


def fit_clipping(student: Target, teacher: Target, seeds: Sequence[int], plan: SamplingPlan, *, track: Track = plain) -> None:
    """Sets the clip range of the student's scheduler that minimizes the mean squared error of its images to the teacher's.

    Tries ranges from the teacher's upwards until the error grows, and takes the narrowest range within 20 % of the smallest
    error, because clipping also limits outliers. Samplers that do not clip, and those of models that cannot be sampled, do not
    change.
    """
    pipeline = student.pipeline
    if not seeds or not clips(pipeline.scheduler):
        return
    own, distances = pipeline.scheduler, {}
    try:
        wanted = draw_images(teacher, seeds, plan)
        for value in track([factor * own.config[RANGE] for factor in WIDER], "fit clipping"):
            pipeline.scheduler = with_range(own, value)
            distances[value] = (draw_images(student, seeds, plan) - wanted).square().mean().item()
            if distances[value] > min(distances.values()):
                break
    except DmquantError:
        pass  # a model that diverges is still saved; sampling from it raises this error again
    limit = NEARLY * min(distances.values(), default=0.0)
    pipeline.scheduler = with_range(own, next((v for v, distance in distances.items() if distance <= limit), own.config[RANGE]))


def clip_like(scheduler: SchedulerMixin, other: SchedulerMixin) -> SchedulerMixin:
    """Returns the scheduler with the clip range of the other one, if both clip."""
    return with_range(scheduler, other.config[RANGE]) if clips(scheduler) and clips(other) else scheduler


def with_range(scheduler: SchedulerMixin, value: float) -> SchedulerMixin:
    """Returns the scheduler with this clip range; the scheduler itself if it has it already."""
    if scheduler.config[RANGE] == value:
        return scheduler
    return type(scheduler).from_config(scheduler.config, **{RANGE: value})


def draw_images(target: Target, seeds: Sequence[int], plan: SamplingPlan) -> Tensor:
    """Returns the images of the seeds, sampled in evaluation mode: float32 (N, 3, H, W), 0 to 255."""
    with evaluating(target.denoiser):
        return torch.cat(list(generate(target.pipeline, seeds, plan))).float()
