"""The Inception score of distributions with a known score."""

import math
import warnings

import pytest
import torch

from dmquant.evaluation.metrics import inception_score as module
from dmquant.evaluation.metrics.base import Batch
from dmquant.evaluation.metrics.inception_score import ClassifierScore


def measure(logits: torch.Tensor, *, name: str = "test", batch: int = 7) -> dict[str, float]:
    metric = ClassifierScore(name)
    for rows in logits.double().split(batch):
        metric.update(Batch(torch.empty(0), logits=rows))
    return metric.compute()


def score(logits: torch.Tensor) -> float:
    """Oracle: exp of the mean over images of sum p log(p / mean p)."""
    probabilities = logits.double().softmax(1).tolist()
    mean = [sum(column) / len(probabilities) for column in zip(*probabilities)]
    divergences = [sum(p * math.log(p / m) for p, m in zip(row, mean)) for row in probabilities]
    return math.exp(sum(divergences) / len(divergences))


def test_certain_and_uniform_classes_score_their_number():
    assert measure(1000 * torch.eye(8).repeat(5, 1))["cs-test"] == pytest.approx(8)


def test_a_constant_classifier_scores_one():
    assert measure(torch.randn(6).expand(20, -1))["cs-test"] == pytest.approx(1)
    assert measure(torch.zeros(20, 6))["cs-test"] == pytest.approx(1)


def test_it_equals_the_definition_for_any_batches():
    logits = 3 * torch.randn(50, 10, generator=torch.Generator().manual_seed(0))
    assert measure(logits)["cs-test"] == pytest.approx(score(logits), rel=1e-9)
    assert measure(logits, batch=50) == measure(logits)


def test_many_images_are_scored_in_splits_and_averaged(monkeypatch):
    monkeypatch.setattr(module, "SPLIT_SIZE", 4)
    # two splits of classes at random: each knows at most its own four images
    assert measure(100 * torch.eye(8))["cs-test"] == pytest.approx(4)


def test_it_is_named_is_with_inception_only_and_does_not_change_the_global_random_state():
    logits, state = torch.eye(5), torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(measure(logits, name="inception")) == {"is"}
    assert torch.equal(state, torch.get_rng_state())
