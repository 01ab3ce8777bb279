"""KID against its definition, and where it must be zero or not."""

import pytest
import torch

from raylarge.metrics.kernel import kernel_distance, kernel_distances


def drawn(count, shift=0.0, seed=0):
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)) + shift


def test_it_is_the_mean_over_pairs_of_different_samples():
    x, y = drawn(4).double(), drawn(5, 0.5, 1).double()

    def k(a, b):
        return float((a @ b / 6 + 1) ** 3)

    def mean(values):
        return sum(values) / len(values)

    within = [mean([k(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j])
              for s in (x, y)]  # fmt: skip
    across = mean([k(a, b) for a in x for b in y])
    assert kernel_distance(x, y) == pytest.approx(sum(within) - 2 * across)


def test_it_tells_sets_apart_and_is_unbiased():
    """Of one distribution it scatters about zero; of others it grows with their distance."""
    alike = [kernel_distance(drawn(30, 0, 2 * s), drawn(30, 0, 2 * s + 1)) for s in range(60)]
    assert abs(sum(alike)) / 60 < 0.1
    assert min(alike) < 0
    near, far = (kernel_distance(drawn(200), drawn(200, shift, 1)) for shift in (0.3, 1.0))
    assert 0 < near < far


def test_subsets_give_its_scatter():
    mean, spread = kernel_distances(drawn(150), drawn(120, 1.0, 1), subsets=20, size=50)
    assert mean == pytest.approx(kernel_distance(drawn(150), drawn(120, 1.0, 1)), rel=0.2)
    assert 0 < spread < mean


def test_one_sample_has_no_distance():
    with pytest.raises(ValueError, match="needs two"):
        kernel_distance(drawn(1), drawn(3))
