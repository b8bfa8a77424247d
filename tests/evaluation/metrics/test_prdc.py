"""Precision, recall, density and coverage equal their definitions, computed with loops."""

import pytest
import torch

from dmquant.errors import InputError
from dmquant.evaluation.metrics import prdc as module
from dmquant.evaluation.metrics.base import Batch
from dmquant.evaluation.metrics.prdc import Prdc, measure_prdc
from dmquant.evaluation.metrics.reference_stats import Reference


def draw(count: int, width: int = 4, *, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def naive(real: torch.Tensor, fake: torch.Tensor, k: int) -> dict[str, float]:
    """Oracle: Kynkaanniemi et al. (2019), eq. 1-2, and Naeem et al. (2020), eq. 4 and 6, with loops."""

    def distance(x, y):
        return (x - y).square().sum().sqrt().item()

    def reach(rows):
        return [sorted(distance(x, y) for j, y in enumerate(rows) if j != i)[k - 1] for i, x in enumerate(rows)]

    real_reach, fake_reach = reach(real), reach(fake)
    inside = [[distance(x, y) <= r for x, r in zip(real, real_reach)] for y in fake]  # fake in real
    recalled = [any(distance(x, y) <= r for y, r in zip(fake, fake_reach)) for x in real]
    return {
        "precision": sum(map(any, inside)) / len(fake),
        "recall": sum(recalled) / len(real),
        "density": sum(map(sum, inside)) / (k * len(fake)),
        "coverage": sum(any(column) for column in zip(*inside)) / len(real),
    }


@pytest.mark.parametrize("shift, k", [(0.0, 3), (0.5, 3), (1.5, 5)])
def test_it_equals_the_definitions_for_any_block_size(monkeypatch, shift, k):
    real, fake = draw(40, seed=1), draw(30, seed=2, shift=shift)
    expected = naive(real, fake, k)
    assert measure_prdc(real, fake, neighbours=k) == pytest.approx(expected)
    monkeypatch.setattr(module, "ROWS", 7)
    assert measure_prdc(real, fake, neighbours=k) == pytest.approx(expected)


def test_a_set_has_precision_and_recall_one_with_itself_and_zero_with_a_distant_set():
    features = draw(50)
    assert all(value == pytest.approx(1, abs=0.4) for value in measure_prdc(features, features).values())
    assert set(measure_prdc(features, features + 100).values()) == {0.0}


def test_a_model_that_covers_a_part_has_high_precision_and_low_recall():
    real = draw(200, seed=1)
    measured = measure_prdc(real, real[:20] * 0.1)
    assert measured["precision"] == 1.0 and measured["recall"] < 0.1 and measured["coverage"] < 0.5


def test_batches_are_accumulated_and_names_have_the_extractor_unless_it_is_inception():
    real, fake = draw(20, seed=1).half(), draw(20, seed=2).float().double()
    values = []
    for name in ("inception", "test"):
        metric = Prdc(name, Reference("test", torch.zeros(0), torch.zeros(0), 20, "", features=real))
        for rows in fake.split(6):
            metric.update(Batch(torch.empty(0), features=rows))
        values.append(metric.compute())
    assert values[0] == pytest.approx(measure_prdc(real.double(), fake))
    assert [f"{name}-test" for name in values[0]] == list(values[1]) and list(values[0].values()) == list(values[1].values())


def test_fewer_images_than_neighbours_are_refused():
    metric = Prdc("test", Reference("test", torch.zeros(0), torch.zeros(0), 20, "", features=draw(20)))
    metric.update(Batch(torch.empty(0), features=draw(3)))
    with pytest.raises(InputError, match="at least 4 images of the model, got 3"):
        metric.compute()
