"""Frechet distance of two Gaussians by their means and covariances: what FID takes of features.

    d^2 = |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2))

Source: Dowson & Landau 1982; Heusel et al. 2017 (FID), Eq. 6. The trace of the root is that of
the symmetric (S C_2 S)^(1/2) with S = C_1^(1/2), so a covariance of less than full rank, as of
few samples, needs no jitter.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numpy import ndarray


def frechet(
    mean_1: Float[ndarray, "d"],
    covariance_1: Float[ndarray, "d d"],
    mean_2: Float[ndarray, "d"],
    covariance_2: Float[ndarray, "d d"],
) -> float:
    """The squared distance d^2, in float64; 0 for equal Gaussians.

    Args:
        mean_1: of the first.
        covariance_1: of the first, symmetric, of any rank.
        mean_2: of the second.
        covariance_2: of the second.
    """
    first, second = (np.asarray(c, np.float64) for c in (covariance_1, covariance_2))
    apart = np.asarray(mean_1, np.float64) - np.asarray(mean_2, np.float64)
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    between = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(min=0)).sum()
    return max(0.0, float(apart @ apart + np.trace(first) + np.trace(second) - 2 * between))


def moments(features: Float[ndarray, "n d"]) -> tuple[Float[ndarray, "d"], Float[ndarray, "d d"]]:
    """Mean and covariance (by n - 1) of samples, in float64.

    Raises:
        ValueError: fewer than two samples.
    """
    if len(features) < 2:
        raise ValueError(f"{len(features)} sample(s); a covariance takes two")
    values = np.asarray(features, np.float64)
    return values.mean(axis=0), np.atleast_2d(np.cov(values, rowvar=False))
