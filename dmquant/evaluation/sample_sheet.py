"""Samples of each compared model for equal seeds, and their differences from the float model's samples."""

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from dmquant.checkpoint import serialization
from dmquant.diffusion.conditioning import reconstruct
from dmquant.diffusion.pipeline import choose_device
from dmquant.diffusion.sampling import set_sampler
from dmquant.errors import DmquantError
from dmquant.evaluation.image_cache import ImageCache
from dmquant.evaluation.reports.html_page import Strip
from dmquant.evaluation.reports.report import Report
from dmquant.progress import Track, plain

FULL = 64  # difference in levels (of 255) that is drawn white


def draw_strips(
    reports: Sequence[Report], count: int, *, device: str | None = None, cache: Path | None = None, track: Track = plain
) -> list[Strip]:
    """Returns the images of the first `count` seeds of each report, float models first.

    The strip of a pipeline that cannot be opened has a note with the reason and no images.
    """
    strips: list[Strip] = []
    base: Tensor | None = None
    for report in track(sorted(reports, key=lambda report: not report.is_float), "sample sheet"):
        try:
            pipeline = serialization.open_any(report.model, device=device or choose_device())
            images = load_first_images(pipeline, report, count, cache)
        except DmquantError as error:
            strips.append(Strip(report.model, note=str(error)))
            continue
        base = images if base is None and report.is_float else base
        differences: tuple[bytes, ...] = ()
        if base is not None and not report.is_float and base.shape == images.shape:
            differences = encode(colour(measure_difference(images, base)))
        height, width = images.shape[2:]
        strips.append(Strip(report.model, encode(images), differences, (width, height), report.protocol.seed))
    return strips


def load_first_images(pipeline: DiffusionPipeline, report: Report, count: int, cache: Path | None) -> Tensor:
    """Returns the images uint8 (N, 3, H, W) of a report's first seeds, from the image cache if it has the first batch."""
    protocol = report.protocol
    if set_sampler(pipeline) != protocol.sampler:
        set_sampler(pipeline, protocol.sampler)
    conditioning = reconstruct(pipeline, protocol.conditions_sha256, protocol.guidance_scale)
    images = ImageCache(pipeline, steps=protocol.steps, conditioning=conditioning, folder=cache)
    batch = range(protocol.seed, protocol.seed + min(protocol.batch, protocol.num_images))
    return images.load_or_generate(batch if images.contains(batch) else batch[:count]).images[:count]


def measure_difference(images: Tensor, others: Tensor) -> Tensor:
    """Returns the absolute difference in levels, averaged over the three colours: float (N, H, W)."""
    return (images.float() - others.float()).abs().mean(1)


def colour(difference: Tensor) -> Tensor:
    """Returns colours from black (0) over red and yellow to white (FULL levels or more), uint8 (N, 3, H, W)."""
    level = (difference / FULL).clamp(0, 1) * 3
    return (torch.stack([level, level - 1, level - 2], 1).clamp(0, 1) * 255).round().to(torch.uint8)


def encode(images: Tensor) -> tuple[bytes, ...]:
    """Returns each image of uint8 (N, 3, H, W) as PNG."""
    return tuple(_encode_one(image) for image in images)


def _encode_one(image: Tensor) -> bytes:
    content = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy()).save(content, "PNG")
    return content.getvalue()
