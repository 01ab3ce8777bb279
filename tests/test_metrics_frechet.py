"""The Frechet distance in closed form, and where it must be zero."""

import numpy as np
import pytest
import scipy.linalg

from raylarge.metrics.frechet import frechet, moments


def spread(seed, rank=6, d=6):
    a = np.random.default_rng(seed).normal(size=(d, rank))
    return a @ a.T


def test_diagonal_gaussians_have_a_closed_form():
    rng = np.random.default_rng(0)
    means, sigmas = rng.normal(size=(2, 5)), rng.uniform(0.1, 3, size=(2, 5))
    wanted = ((means[0] - means[1]) ** 2).sum() + ((sigmas[0] - sigmas[1]) ** 2).sum()
    found = frechet(means[0], np.diag(sigmas[0] ** 2), means[1], np.diag(sigmas[1] ** 2))
    assert found == pytest.approx(wanted)


def test_it_is_the_trace_of_the_root_of_the_product():
    zero, one, other = np.zeros(6), spread(1), spread(2)
    root = scipy.linalg.sqrtm(one @ other).real
    assert frechet(zero, one, zero, other) == pytest.approx(np.trace(one + other - 2 * root))
    assert frechet(zero, one, zero, other) == pytest.approx(frechet(zero, other, zero, one))


def test_rotations_change_nothing():
    rotation, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(6, 6)))
    mean, one, other = np.arange(6.0), spread(4), spread(5)
    turned = [rotation @ c @ rotation.T for c in (one, other)]
    assert frechet(rotation @ mean, turned[0], np.zeros(6), turned[1]) == pytest.approx(
        frechet(mean, one, np.zeros(6), other)
    )


@pytest.mark.parametrize("rank", [0, 2, 6])
def test_equal_gaussians_are_at_no_distance_even_flat_ones(rank):
    flat = spread(6, rank)
    assert 0 <= frechet(np.ones(6), flat, np.ones(6), flat) < 1e-5
    assert frechet(np.ones(6), flat, np.zeros(6), flat) == pytest.approx(6, abs=1e-5)


def test_float32_samples_are_taken_in_float64():
    """Means far from zero must not cost the digits of the covariance."""
    samples = np.random.default_rng(7).normal(size=(500, 3)).astype(np.float32) + np.float32(1000)
    mean, covariance = moments(samples)
    assert mean.dtype == covariance.dtype == np.float64
    np.testing.assert_allclose(mean, samples.astype(np.float64).mean(axis=0))
    np.testing.assert_allclose(covariance, np.cov(samples.T.astype(np.float64)))
    assert np.diag(covariance) == pytest.approx(np.ones(3), rel=0.2)


def test_one_sample_has_no_covariance():
    with pytest.raises(ValueError, match="needs two"):
        moments(np.zeros((1, 3)))
