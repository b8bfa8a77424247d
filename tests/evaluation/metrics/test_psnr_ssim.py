import json
import math

import pytest
import torch

from dmquant.errors import InputError
from dmquant.evaluation.metrics.base import Batch
from dmquant.evaluation.metrics.psnr_ssim import CAP, Psnr, Ssim, psnr, ssim


def images(seed: int, count: int = 6, size: int = 8) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def measure(*batches: Batch) -> float:
    metric = Psnr()
    for batch in batches:
        metric.update(batch)
    return metric.compute()["psnr"]


def test_it_is_the_mean_over_pairs_of_the_definition():
    ours, others = images(0), images(1)
    errors = [(a.double() - b.double()).pow(2).mean().item() for a, b in zip(ours, others)]
    expected = sum(20 * math.log10(255) - 10 * math.log10(error) for error in errors) / len(errors)
    assert measure(Batch(ours, float_images=others)) == pytest.approx(expected)


def test_black_against_white_is_zero_decibels():
    black = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    assert psnr(black, black + 255).item() == 0


def test_the_batches_do_not_change_the_mean():
    ours, others = images(0), images(1)
    parts = [Batch(a, float_images=b) for a, b in zip(ours.split(4), others.split(4))]
    assert measure(*parts) == pytest.approx(measure(Batch(ours, float_images=others)))


def test_images_without_a_pair_do_not_count():
    ours, others = images(0), images(1)
    parts = [Batch(ours, float_images=others[:2]), Batch(images(3), float_images=others[:0])]
    assert measure(*parts) == pytest.approx(measure(Batch(ours[:2], float_images=others[:2])))


def test_identical_images_have_a_finite_psnr_for_strict_json():
    value = measure(Batch(images(0), float_images=images(0)))
    assert value == CAP and json.dumps(value, allow_nan=False)


def test_without_any_pair_it_is_refused():
    with pytest.raises(InputError, match="no pair"):
        Psnr().compute()


def ssim_by_definition(image: torch.Tensor, other: torch.Tensor) -> float:
    """Oracle: Wang et al. (2004), eq. 12-16, window by window, on one pair (3, H, W)."""
    line = [math.exp(-((i - 5) ** 2) / (2 * 1.5**2)) for i in range(11)]
    window = torch.tensor([[a * b for a in line] for b in line], dtype=torch.float64) / sum(line) ** 2
    c1, c2, values = (0.01 * 255) ** 2, (0.03 * 255) ** 2, []
    for x, y in zip(image.double(), other.double()):
        for row in range(x.shape[0] - 10):
            for column in range(x.shape[1] - 10):
                a, b = (part[row : row + 11, column : column + 11] for part in (x, y))
                mean_a, mean_b = (window * a).sum(), (window * b).sum()
                covariance = (window * (a - mean_a) * (b - mean_b)).sum()
                spread = (window * (a - mean_a) ** 2).sum() + (window * (b - mean_b) ** 2).sum()
                value = (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a**2 + mean_b**2 + c1) * (spread + c2))
                values.append(value.item())
    return sum(values) / len(values)


def test_structural_similarity_equals_its_definition_pair_by_pair():
    ours = images(0, count=3, size=14)
    others = (ours.double() * 0.7 + images(1, count=3, size=14).double() * 0.3).to(torch.uint8)
    expected = [ssim_by_definition(a, b) for a, b in zip(ours, others)]
    assert ssim(ours, others).tolist() == pytest.approx(expected, rel=1e-9)


def test_structural_similarity_is_accumulated_over_batches():
    ours, others = images(0, size=12), images(1, size=12)
    metric = Ssim()
    for a, b in zip(ours.split(4), others[:5].split(4)):
        metric.update(Batch(a, float_images=b))
    metric.update(Batch(ours, float_images=others[:0]))
    assert metric.compute()["ssim"] == pytest.approx(ssim(ours[:5], others[:5]).mean().item())
    assert ssim(ours, ours).tolist() == pytest.approx([1] * 6)


def test_structural_similarity_needs_a_whole_window_and_a_pair():
    with pytest.raises(InputError, match="at least 11x11 pixels, got 8x8"):
        ssim(images(0), images(1))
    with pytest.raises(InputError, match="no pair"):
        Ssim().compute()
