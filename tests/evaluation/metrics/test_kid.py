"""KID equals its definition, computed with loops."""

import warnings

import pytest
import torch

from dmquant.evaluation.metrics import kid as module
from dmquant.evaluation.metrics.base import Batch
from dmquant.evaluation.metrics.kid import Kid
from dmquant.evaluation.metrics.reference_stats import Reference


def draw(count: int, width: int = 6, *, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + shift  # float32, as networks compute them


def reference_of(features: torch.Tensor) -> Reference:
    nothing = torch.zeros(0)
    return Reference("test", nothing, nothing, len(features), "0" * 64, features=features)


def measure(real: torch.Tensor, fake: torch.Tensor, *, name: str = "test", batch: int = 16) -> dict[str, float]:
    metric = Kid(name, reference_of(real))
    for rows in fake.double().split(batch):
        metric.update(Batch(torch.empty(0), features=rows))
    return metric.compute()


def discrepancy(real: torch.Tensor, fake: torch.Tensor) -> float:
    """Oracle: the unbiased estimate of the squared MMD, Gretton et al. (2012), eq. 3, computed pair by pair."""

    def kernel(x, y):
        return (sum(a * b for a, b in zip(x, y)) / len(x) + 1) ** 3

    def within(rows):
        pairs = [(i, j) for i in range(len(rows)) for j in range(len(rows)) if i != j]
        return sum(kernel(rows[i], rows[j]) for i, j in pairs) / len(pairs)

    real, fake = real.double().tolist(), fake.double().tolist()
    return within(real) + within(fake) - 2 * sum(kernel(x, y) for x in real for y in fake) / (len(real) * len(fake))


def test_it_is_the_unbiased_discrepancy_if_all_images_fit_one_subset():
    real, fake = draw(20, seed=1), draw(20, seed=2, shift=0.5)
    assert measure(real, fake)["kd-test"] == pytest.approx(discrepancy(real, fake), rel=1e-9)


def test_the_mean_over_subsets_is_near_that_of_all_images(monkeypatch):
    monkeypatch.setattr(module, "SUBSET_SIZE", 40)
    real, fake = draw(60, seed=1), draw(80, seed=2, shift=0.5)
    assert measure(real, fake)["kd-test"] == pytest.approx(discrepancy(real, fake), rel=0.05)


def test_it_is_around_zero_for_sets_of_one_distribution_and_grows_with_the_shift():
    near, middle, far = (measure(draw(200, seed=1), draw(200, seed=2, shift=shift))["kd-test"] for shift in (0, 0.3, 0.6))
    assert abs(near) < 0.05 < middle < far


def test_it_is_reproducible_and_does_not_change_the_global_random_state(monkeypatch):
    monkeypatch.setattr(module, "SUBSET_SIZE", 10)
    state = torch.get_rng_state()
    assert measure(draw(30, seed=1), draw(30, seed=2)) == measure(draw(30, seed=1), draw(30, seed=2), batch=7)
    assert torch.equal(state, torch.get_rng_state())


def test_it_is_named_kid_with_inception_features_only_and_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(measure(draw(8), draw(8), name="inception")) == {"kid"}
