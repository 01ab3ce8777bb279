"""Kernel distance between two sets of features (KID): polynomial MMD, unbiased.

    k(x, y) = (x . y / d + 1)^3       MMD^2 = mean k(x, x') + mean k(y, y') - 2 mean k(x, y)

averaged over pairs of different samples. Source: Binkowski et al. 2018, Eq. 4 and section 4.
(torchmetrics accepts images only, computes in float32 and draws subsets without a seed.)
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def kernel_distance(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> float:
    """Return MMD^2 of two sets of features; for equal distributions it scatters about 0.

    Raises:
        ValueError: fewer than two samples in a set.
    """
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise ValueError(f"{n} and {m} samples; a kernel distance needs two of each")
    x, y = x.double(), y.double()
    xx, yy, xy = (_kernel(a, b) for a, b in ((x, x), (y, y), (x, y)))
    within = (xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1))
    return float(within - 2 * xy.mean())


def kernel_distances(
    x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], subsets: int = 100, size: int = 100
) -> tuple[float, float]:
    """Return mean and standard deviation over random subsets, without replacement, seed 0."""
    generator = torch.Generator().manual_seed(0)

    def subset(features: Tensor) -> Tensor:
        rows = torch.randperm(len(features), generator=generator)[:size]
        return features[rows.to(features.device)]

    distances = torch.tensor([kernel_distance(subset(x), subset(y)) for _ in range(subsets)])
    return float(distances.mean()), float(distances.std())


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.mT / x.shape[1] + 1) ** 3
