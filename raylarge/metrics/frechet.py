"""Frechet distance of two Gaussians by mean and covariance, as FID applies it to features.

    d^2 = |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2))

Source: Dowson & Landau 1982; Heusel et al. 2017 (FID), Eq. 6. The trace of the root is computed
as that of the symmetric (S C_2 S)^(1/2) with S = C_1^(1/2), so a covariance of less than full
rank, as of few samples, needs no jitter. (torchmetrics, whose class accepts images only, takes
eigenvalues of C_1 C_2 and loses five digits on such covariances.)
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numpy import ndarray


def frechet(
    mean_1: Float[ndarray, " d"],
    covariance_1: Float[ndarray, "d d"],
    mean_2: Float[ndarray, " d"],
    covariance_2: Float[ndarray, "d d"],
) -> float:
    """Return the squared distance d^2 in float64; 0 for equal Gaussians.

    Covariances are symmetric, of any rank.
    """
    first, second = (np.asarray(c, np.float64) for c in (covariance_1, covariance_2))
    difference = np.asarray(mean_1, np.float64) - np.asarray(mean_2, np.float64)
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    root_trace = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(min=0)).sum()
    traces = np.trace(first) + np.trace(second) - 2 * root_trace
    return max(0.0, float(difference @ difference + traces))


def moments(features: Float[ndarray, "n d"]) -> tuple[Float[ndarray, " d"], Float[ndarray, "d d"]]:
    """Return mean and covariance (divided by n - 1) of samples, in float64.

    Raises:
        ValueError: fewer than two samples.
    """
    if len(features) < 2:
        raise ValueError(f"{len(features)} sample(s); a covariance needs two")
    values = np.asarray(features, np.float64)
    return values.mean(axis=0), np.atleast_2d(np.cov(values, rowvar=False))
