import json
import math

import pytest
import torch

from dmquant.errors import InputError
from dmquant.metrics.base import Batch
from dmquant.metrics.similarity import CAP, Psnr, psnr


def images(seed: int, count: int = 6) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


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


def test_images_beyond_the_pairs_do_not_count():
    ours, others = images(0), images(1)
    parts = [Batch(ours, float_images=others[:2]), Batch(images(3), float_images=others[:0])]
    assert measure(*parts) == pytest.approx(measure(Batch(ours[:2], float_images=others[:2])))


def test_identical_images_are_capped_so_that_the_report_stays_strict_json():
    value = measure(Batch(images(0), float_images=images(0)))
    assert value == CAP and json.dumps(value, allow_nan=False)


def test_without_any_pair_it_is_refused():
    with pytest.raises(InputError, match="no pair"):
        Psnr().compute()
