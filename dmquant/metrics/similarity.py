"""How near the images stay to those that the float model draws from the same seeds."""

from torch import Tensor

from dmquant.errors import InputError
from dmquant.metrics.base import Batch, Metric

CAP = 100.0  # dB given to images without any difference, so that a report stays finite


class Psnr(Metric):
    """Mean over image pairs of the peak signal-to-noise ratio in dB, peak 255, at most 100 dB a pair."""

    needs_float_images = True

    def __init__(self) -> None:
        self._sum = 0.0
        self._count = 0

    def update(self, batch: Batch) -> None:
        pairs = len(batch.float_images)
        self._sum += psnr(batch.images[:pairs], batch.float_images).sum().item()
        self._count += pairs

    def compute(self) -> dict[str, float]:
        if not self._count:
            raise InputError("psnr saw no pair of images; give the float pipeline to compare with")
        return {"psnr": self._sum / self._count}


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair in dB, float64 (B,), of uint8 images (B, 3, H, W)."""
    error = (images.double() - others.to(images.device).double()).square().mean((1, 2, 3))
    return (10 * (255**2 / error).log10()).clamp(max=CAP)
