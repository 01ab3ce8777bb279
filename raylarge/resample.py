"""The one downsampling operator A and its upsampling partner U, for data and for sampling.

Bicubic (Keys, a = -0.5), antialiased, mirrored at the borders, separable:
A(x) = D x D^T and U(e) = (s D^T) e (s D^T)^T per factor s. It equals the resizer that the
papers' code uses (parity figures `resizer`); U = s^2 A^T exactly.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def _cubic(x: np.ndarray) -> np.ndarray:
    """Return Keys' cubic kernel with a = -0.5."""
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


@lru_cache(maxsize=64)
def bicubic_matrix(side: int, factor: int, rows: tuple[int, int] | None = None) -> np.ndarray:
    """Return D, [side / factor, side] float64: one axis of the downsampling operator A.

    Args:
        side: of what is downsampled, in pixels.
        factor: divides it.
        rows: which rows of D to return, as [start, stop); None: all.

    Raises:
        ValueError: the factor does not divide the side.
    """
    if side % factor:
        raise ValueError(f"a side of {side} px cannot be divided by {factor}")
    outputs = np.arange(*(rows or (0, side // factor)))
    centres = (outputs + 0.5) * factor - 0.5
    reach = 2 * factor
    matrix = np.zeros((len(outputs), side))
    for row, centre in enumerate(centres):
        taps = np.arange(int(np.floor(centre - reach)), int(np.ceil(centre + reach)) + 1)
        weights = _cubic((taps - centre) / factor)
        mirrored = np.mod(taps, 2 * side)
        mirrored = np.where(mirrored >= side, 2 * side - 1 - mirrored, mirrored)
        np.add.at(matrix[row], mirrored, weights / weights.sum())
    return matrix


def downsample(
    x: Float[Tensor, "*batch rows columns"], factor: int
) -> Float[Tensor, "*batch rows//{factor} columns//{factor}"]:
    """Apply A: antialiased bicubic downsampling of the last two axes."""
    if factor == 1:
        return x
    rows, columns = (_tensor(side, factor, x) for side in x.shape[-2:])
    return rows @ x @ columns.mT


def upsample(
    x: Float[Tensor, "*batch rows columns"], factor: int
) -> Float[Tensor, "*batch rows*{factor} columns*{factor}"]:
    """Apply U: bicubic upsampling of the last two axes (s^2 times the transpose of A)."""
    if factor == 1:
        return x
    rows, columns = (factor * _tensor(side * factor, factor, x) for side in x.shape[-2:])
    return rows.mT @ x @ columns


def _tensor(side: int, factor: int, like: Tensor) -> Tensor:
    return torch.as_tensor(bicubic_matrix(side, factor), dtype=like.dtype, device=like.device)
