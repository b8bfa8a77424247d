"""The same seeds drawn by every model that is compared, one strip each, and where they differ from the float model's."""

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from dmquant.checkpoint import serialization
from dmquant.diffusion.conditioning import recall
from dmquant.diffusion.pipeline import choose_device
from dmquant.diffusion.sampling import set_sampler
from dmquant.errors import DmquantError
from dmquant.evaluation.image_cache import Gallery
from dmquant.evaluation.image_grid import make_grid
from dmquant.evaluation.reports.html_page import Strip
from dmquant.evaluation.reports.report import Report
from dmquant.progress import Track, plain

FULL = 64  # levels of difference, mean over the colours, that are shown in full brightness


def draw_strips(
    reports: Sequence[Report], count: int, *, device: str | None = None, cache: Path | None = None, track: Track = plain
) -> list[Strip]:
    """A strip of the first `count` seeds per report, float models first; one whose pipeline cannot be opened says why."""
    strips, base = [], None
    for report in track(sorted(reports, key=lambda report: not report.is_float), "sample sheet"):
        try:
            pipeline = serialization.open_any(report.model, device=device or choose_device())
            images = draw_first(pipeline, report, count, cache)
        except DmquantError as error:
            strips.append(Strip(report.model, note=str(error)))
            continue
        base = images if base is None and report.is_float else base
        is_alike = base is not None and not report.is_float and base.shape == images.shape
        heat = encode(colour(measure_difference(images, base))) if is_alike else None
        strips.append(Strip(report.model, encode(images), heat))
    return strips


def draw_first(pipeline: DiffusionPipeline, report: Report, count: int, cache: Path | None) -> Tensor:
    """Images of the first seeds of a report, uint8 (N, 3, H, W), as it was drawn; out of its batch where that was kept."""
    protocol = report.protocol
    if set_sampler(pipeline) != protocol.sampler:
        set_sampler(pipeline, protocol.sampler)
    asked = recall(pipeline, protocol.conditions_sha256, protocol.guidance_scale)
    gallery = Gallery(pipeline, steps=protocol.steps, conditioning=asked, folder=cache)
    batch = range(protocol.seed, protocol.seed + min(protocol.batch, protocol.num_images))
    return gallery.draw(batch if gallery.holds(batch) else batch[:count]).images[:count]


def measure_difference(images: Tensor, others: Tensor) -> Tensor:
    """Absolute difference, mean over the colours, in levels (N, H, W)."""
    return (images.float() - others.float()).abs().mean(1)


def colour(difference: Tensor) -> Tensor:
    """Black over red and yellow to white, uint8 (N, 3, H, W)."""
    level = (difference / FULL).clamp(0, 1) * 3
    return (torch.stack([level, level - 1, level - 2], 1).clamp(0, 1) * 255).round().to(torch.uint8)


def encode(images: Tensor) -> bytes:
    """One row of images as PNG."""
    content = io.BytesIO()
    make_grid(images, len(images)).save(content, "PNG")
    return content.getvalue()
