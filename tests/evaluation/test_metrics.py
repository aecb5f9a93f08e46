"""FID against the closed form for Gaussians, IS against known values, blur against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cogview_pl.evaluation.image_files import blur
from cogview_pl.evaluation.metrics import FID, inception_score


def samples(mean: Tensor, covariance: Tensor, count: int, seed: int) -> Tensor:
    """Float64 samples `(count, F)` with exactly the given mean and unbiased covariance, up to rounding."""
    random = torch.Generator().manual_seed(seed)
    raw = torch.randn(count, len(mean), generator=random, dtype=torch.float64)
    raw = raw - raw.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(raw.T.cov()), raw.T, upper=False).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def closed_form(mean_1: Tensor, covariance_1: Tensor, mean_2: Tensor, covariance_2: Tensor) -> float:
    """The Fréchet distance, computed with symmetric square roots."""
    root = symmetric_root(covariance_1)
    cross = symmetric_root(root @ covariance_2 @ root)
    return float((mean_1 - mean_2).square().sum() + (covariance_1 + covariance_2 - 2 * cross).trace())


def symmetric_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def random_covariance(size: int, seed: int) -> Tensor:
    factor = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return factor @ factor.T / size + 0.1 * torch.eye(size, dtype=torch.float64)


def distance(real: Tensor, generated: Tensor) -> float:
    fid = FID(real.shape[1])
    for part in real.split(70):
        fid.add_real(part)
    for part in generated.split(70):
        fid.add_generated(part)
    return fid.compute()


def test_fid_of_diagonal_gaussians() -> None:
    deviation_1, deviation_2 = torch.tensor([[1.0, 2.0, 3.0], [2.0, 2.0, 0.5]], dtype=torch.float64)
    zero = torch.zeros(3, dtype=torch.float64)
    real = samples(zero, deviation_1.square().diag(), 200, seed=0)
    generated = samples(zero + 2, deviation_2.square().diag(), 300, seed=1)
    # |m|² = 3 · 2², and Σ (σ₁ − σ₂)² = 1 + 0 + 6.25
    assert distance(real, generated) == pytest.approx(12 + 7.25, rel=1e-9)


@pytest.mark.parametrize("size", [2, 16, 64])
def test_fid_of_gaussians_that_do_not_commute(size: int) -> None:
    mean_1, mean_2 = torch.randn(2, size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    covariance_1, covariance_2 = random_covariance(size, 4), random_covariance(size, 5)
    real = samples(mean_1, covariance_1, 3 * size + 10, seed=6)
    generated = samples(mean_2, covariance_2, 5 * size + 10, seed=7)
    wanted = closed_form(mean_1, covariance_1, mean_2, covariance_2)
    assert distance(real, generated) == pytest.approx(wanted, rel=1e-9)


def test_fid_of_a_set_with_itself_is_zero() -> None:
    features = torch.rand(50, 12)
    assert distance(features, features) == pytest.approx(0, abs=1e-6)


def test_fid_loses_nothing_to_float32_features_far_from_zero() -> None:
    """In float32, sums of squares of features near 1000 would lose a variance of 0.01."""
    covariance_1, covariance_2 = (0.01 * random_covariance(8, seed) for seed in (8, 9))
    mean = torch.full((8,), 1000.0, dtype=torch.float64)
    real = samples(mean, covariance_1, 500, seed=10).float()
    generated = samples(mean + 0.1, covariance_2, 500, seed=11).float()
    moments = [(x.double().mean(0), x.double().T.cov()) for x in (real, generated)]
    assert distance(real, generated) == pytest.approx(closed_form(*moments[0], *moments[1]), rel=1e-5)


def test_fid_with_fewer_images_than_features() -> None:
    real, generated = torch.rand(2, 10, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = closed_form(real.mean(0), real.T.cov(), generated.mean(0), generated.T.cov())
    assert distance(real, generated) == pytest.approx(wanted, abs=1e-5)


def test_inception_score_of_sure_and_of_useless_classifiers() -> None:
    sure = 100 * torch.eye(5).repeat(20, 1)
    assert inception_score(sure, splits=1, seed=0) == pytest.approx(5)
    assert inception_score(torch.ones(100, 5), splits=10, seed=0) == pytest.approx(1)


def test_inception_score_between() -> None:
    """p(y|x) is (0.9, 0.1) or (0.1, 0.9), the marginal is even: exp(log 2 − entropy)."""
    probabilities = torch.tensor([[0.9, 0.1], [0.1, 0.9]], dtype=torch.float64)
    entropy = -(probabilities[0] * probabilities[0].log()).sum()
    wanted = float((torch.tensor(2.0, dtype=torch.float64).log() - entropy).exp())
    assert inception_score(probabilities.log().repeat(8, 1), splits=1, seed=0) == pytest.approx(wanted)


def test_inception_score_depends_on_the_seed_alone() -> None:
    logits = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    first = inception_score(logits, splits=4, seed=1)
    torch.rand(7)
    assert inception_score(logits, splits=4, seed=1) == first
    assert inception_score(logits, splits=4, seed=2) != first


@pytest.mark.parametrize("radius", [1.0, 2.0, 4.0])
def test_blur_has_the_radius_as_its_standard_deviation(radius: float) -> None:
    dot = torch.zeros(1, 3, 65, 65, dtype=torch.float64)
    dot[..., 32, 32] = 1
    blurred = blur(dot, radius)[0, 0]
    place = torch.arange(65, dtype=torch.float64) - 32
    for axis in (0, 1):
        profile = blurred.sum(axis)
        assert float(profile.sum()) == pytest.approx(1, abs=1e-3)
        assert float((profile * place.square()).sum().sqrt()) == pytest.approx(radius, rel=1e-2)


def test_blur_leaves_plain_images_and_radius_zero_alone() -> None:
    plain = torch.full((2, 3, 16, 20), 0.3)
    torch.testing.assert_close(blur(plain, 8.0), plain)
    image = torch.rand(1, 3, 16, 16)
    assert blur(image, 0) is image
