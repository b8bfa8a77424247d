import warnings

import numpy as np
import pytest
import scipy.linalg
import torch

from dmquant.errors import DmquantError, InputError
from dmquant.evaluation.metrics.base import Batch
from dmquant.evaluation.metrics.fid import Frechet, SpatialFrechet, distance_name
from dmquant.evaluation.metrics.reference_stats import Reference
from dmquant.evaluation.metrics.running_moments import Moments, measure_moments


def frechet_by_eigh(mu1, sigma1, mu2, sigma2):
    """Oracle: the symmetric form, tr sqrt(S1^1/2 S2 S1^1/2) by two eigh calls in float64."""
    values, vectors = torch.linalg.eigh(sigma1)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ sigma2 @ root).clamp(min=0).sqrt().sum()
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross).item()


def frechet_by_sqrtm(mu1, sigma1, mu2, sigma2):
    """Oracle: the form of the original code, with a general matrix square root."""
    root = scipy.linalg.sqrtm((sigma1 @ sigma2).numpy())
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace()).item() - 2 * np.trace(root).real


def draw(count: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) @ mixing + torch.arange(width) * 0.1 * seed


def reference_of(features: torch.Tensor) -> Reference:
    mu, sigma, count = measure_moments([features])
    return Reference("test", mu, sigma, count, "0" * 64)


def measure(features: torch.Tensor, reference: Reference, *, name: str = "test", batch: int = 64) -> dict[str, float]:
    metric = Frechet(name, reference)
    for rows in features.split(batch):
        metric.update(Batch(images=torch.empty(0), features=rows))
    return metric.compute()


@pytest.mark.parametrize("count", [400, 20])
def test_it_equals_the_symmetric_form_in_float64_also_when_the_covariance_is_rank_deficient(count):
    real, fake = draw(500, 32, seed=1), draw(count, 32, seed=2)
    moments = (*measure_moments([real])[:2], *measure_moments([fake])[:2])
    measured = measure(fake, reference_of(real))["fd-test"]
    assert measured == pytest.approx(frechet_by_eigh(*moments), rel=1e-6)
    assert measured == pytest.approx(frechet_by_sqrtm(*moments), rel=1e-5)


def test_the_spatial_distance_is_the_same_in_spatial_features():
    real, fake = draw(200, 12, seed=1), draw(150, 12, seed=2)
    reference = Reference("test", torch.zeros(3), torch.eye(3), 200, "", spatial=Moments(*measure_moments([real])[:2]))
    metric = SpatialFrechet("test", reference)
    for rows in fake.split(64):
        metric.update(Batch(images=torch.empty(0), features=torch.zeros(len(rows), 3), spatial=rows))
    assert metric.compute() == {"sfd-test": pytest.approx(measure(fake, reference_of(real))["fd-test"], rel=1e-9)}
    assert SpatialFrechet.name("inception") == "sfid"


def test_gaussians_with_known_moments_have_the_closed_form_distance():
    # diagonal covariances commute: |mu1 - mu2|^2 + sum (s1 - s2)^2
    signs = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    root = (3 / 4) ** 0.5  # makes the unbiased variance of the four corners 1
    fake, real = signs * root * torch.tensor([2.0, 3.0]) + 5, signs * root
    assert measure(fake, reference_of(real))["fd-test"] == pytest.approx(50 + 1 + 4)


def test_the_batches_do_not_change_the_distance():
    real, fake = draw(300, 16, seed=1), draw(100, 16, seed=2)
    values = [measure(fake, reference_of(real), batch=batch)["fd-test"] for batch in (1, 7, 100)]
    assert values == pytest.approx([values[0]] * 3, rel=1e-9)


def test_the_distance_of_a_set_from_itself_is_zero():
    features = draw(300, 16, seed=1)
    assert measure(features, reference_of(features))["fd-test"] == pytest.approx(0, abs=1e-6)


def test_a_reference_without_a_count_has_the_same_distance():
    real, fake = reference_of(draw(300, 16, seed=1)), draw(100, 16, seed=2)
    unknown = Reference(real.name, real.mu, real.sigma, None, real.sha256)
    assert measure(fake, unknown)["fd-test"] == pytest.approx(measure(fake, real)["fd-test"], rel=1e-9)


def test_it_is_named_fid_with_inception_features_only():
    assert distance_name("inception") == "fid"
    assert distance_name("resnet-cifar10") == "fd-resnet-cifar10"


def test_a_single_image_has_no_covariance_and_is_refused():
    with pytest.raises(InputError, match="at least 2 images, got 1"):
        measure(draw(1, 8, seed=2), reference_of(draw(50, 8, seed=1)))


def test_fid_over_fewer_than_2048_images_warns_of_its_bias():
    reference = reference_of(draw(50, 8, seed=1))
    with pytest.warns(UserWarning, match="FID over 2047 images is biased"):
        measure(draw(2047, 8, seed=2), reference, name="inception")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measure(draw(2048, 8, seed=2), reference, name="inception")
        measure(draw(100, 8, seed=2), reference, name="test")


def test_features_that_are_not_finite_are_an_error():
    features = draw(40, 8, seed=2)
    features[3, 1] = torch.nan
    with pytest.raises(DmquantError, match="40 images"):
        measure(features, reference_of(draw(50, 8, seed=1)))
