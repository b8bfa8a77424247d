import pytest
import torch

from dmquant.errors import InputError
from dmquant.evaluation.metrics.running_moments import RunningMoments, measure_moments


def test_moments_of_batches_equal_those_of_all_rows():
    rows = torch.randn(40, 5, dtype=torch.float64) + 100
    mu, sigma, count = measure_moments(rows.split(7))
    assert torch.allclose(mu, rows.mean(0)) and torch.allclose(sigma, rows.T.cov()) and count == 40


def test_one_row_has_no_covariance():
    sums = RunningMoments()
    sums.add(torch.ones(1, 3, dtype=torch.float64))
    with pytest.raises(InputError, match="at least 2 images, got 1"):
        sums.moments()
