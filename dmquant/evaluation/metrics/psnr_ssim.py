"""PSNR and SSIM between generated images and those of the float model for the same seeds."""

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from dmquant.errors import InputError
from dmquant.evaluation.metrics.base import Batch, Metric, require

PEAK = 255
WINDOW, SIGMA = 11, 1.5  # pixels
CAP = 100.0  # dB of identical images, so that reports have finite values


class Psnr(Metric):
    """Mean over image pairs of the peak signal-to-noise ratio in dB, peak 255, at most 100 dB per pair."""

    needs_float_images = True

    def __init__(self) -> None:
        self._sum = 0.0
        self._count = 0

    def update(self, batch: Batch) -> None:
        others = require(batch.float_images)
        self._sum += psnr(batch.images[: len(others)], others).sum().item()
        self._count += len(others)

    def compute(self) -> dict[str, float]:
        if not self._count:
            raise InputError("psnr has no pair of images; give the float pipeline to compare with")
        return {"psnr": self._sum / self._count}


class Ssim(Metric):
    """Mean over image pairs of the structural similarity. Wang et al., 2004: 11x11 Gaussian window, sigma 1.5, peak 255."""

    needs_float_images = True
    smallest = WINDOW

    def __init__(self) -> None:
        self._sum = 0.0
        self._count = 0

    def update(self, batch: Batch) -> None:
        others = require(batch.float_images)
        if len(others):
            self._sum += ssim(batch.images[: len(others)], others).sum().item()
            self._count += len(others)

    def compute(self) -> dict[str, float]:
        if not self._count:
            raise InputError("ssim has no pair of images; give the float pipeline to compare with")
        return {"ssim": self._sum / self._count}


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Returns the peak signal-to-noise ratio in dB, float64 (B,), of each pair of uint8 images (B, 3, H, W)."""
    error = (images.double() - others.to(images.device).double()).square().mean((1, 2, 3))
    return (10 * (255**2 / error).log10()).clamp(max=CAP)


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Returns the structural similarity, float64 (B,), of each pair of uint8 images (B, 3, H, W).

    It is the mean over colours and over positions whose window lies inside the image, as in the authors' code; torchmetrics pads
    the image by reflection.
    """
    if min(images.shape[-2:]) < WINDOW:
        raise InputError(f"ssim needs images of at least {WINDOW}x{WINDOW} pixels, got {images.shape[-1]}x{images.shape[-2]}")
    x, y = images.double(), others.to(images.device).double()
    mean_x, mean_y = blur(x), blur(y)
    variance = blur(x * x) - mean_x**2 + blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2) / ((mean_x**2 + mean_y**2 + c1) * (variance + c2))
    return similarity.mean((1, 2, 3))


def blur(x: Tensor) -> Tensor:
    """Returns the Gaussian-weighted means (B, C, H - 10, W - 10) of all windows inside x (B, C, H, W)."""
    line = torch.exp(-((torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2) ** 2) / (2 * SIGMA**2))
    line, channels = line / line.sum(), x.shape[1]
    for shape in ((1, 1, -1, 1), (1, 1, 1, -1)):
        x = conv2d(x, line.view(shape).expand(channels, -1, -1, -1), groups=channels)
    return x
