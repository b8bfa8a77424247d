"""The sampler's clipping, fitted to a quantized denoiser.

Samplers of pixels clip their guess of the clean image to [-1, 1] in every step. The guess is (x - sigma * answer) / alpha:
at the first steps rounding noise in the answer stands in it a hundredfold, and clipping such a guess draws it to the middle.
The mean colour of an image is settled in just these steps, so images of a quantized model come out pale. In a wider range the
noise passes, and the steps that follow average it away. What is fitted is `clip_sample_range` of the scheduler's own config:
the file stays a plain diffusers pipeline.
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
    """Whether the sampler clips to a fixed range."""
    config = scheduler.config
    return bool(config.get("clip_sample")) and RANGE in config and not config.get("thresholding")


def fit_clipping(
    student: Target, teacher: Target, seeds: Sequence[int], plan: SamplingPlan, *, track: Track = plain
) -> None:
    """Gives the student's pipeline the range in which its images come nearest to the teacher's, in mean squared distance.

    Ranges are tried from the teacher's upwards until the distance grows; of those nearly as good as the best the narrowest is
    taken, since clipping also holds back errors that a squared distance forgives. A sampler that does not clip stays as it is,
    and so does that of a model which cannot be sampled from.
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
        pass  # what was trained for hours is not thrown away for this: whoever draws from it is told
    limit = NEARLY * min(distances.values(), default=0.0)
    pipeline.scheduler = with_range(own, next((v for v, distance in distances.items() if distance <= limit), own.config[RANGE]))


def clip_like(scheduler: SchedulerMixin, other: SchedulerMixin) -> SchedulerMixin:
    """The scheduler, but with the range of the other one, where both clip."""
    return with_range(scheduler, other.config[RANGE]) if clips(scheduler) and clips(other) else scheduler


def with_range(scheduler: SchedulerMixin, value: float) -> SchedulerMixin:
    """The scheduler itself where it has this range already."""
    if scheduler.config[RANGE] == value:
        return scheduler
    return type(scheduler).from_config(scheduler.config, **{RANGE: value})


def draw_images(target: Target, seeds: Sequence[int], plan: SamplingPlan) -> Tensor:
    """Returns the images of the seeds, sampled in evaluation mode: float32 (N, 3, H, W), 0 to 255."""
    with evaluating(target.denoiser):
        return torch.cat(list(generate(target.pipeline, seeds, plan))).float()
