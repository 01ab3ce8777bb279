"""Scales, windows and bands: integer arithmetic that opens no file.

Rows come before columns everywhere. `Scale(0)` is the base (20x, nominally 0.5 um/px;
1 m/px for aerial images) and each further scale halves the resolution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, order=True)
class Scale:
    """An octave: base resolution divided by 2**k."""

    k: int

    def __post_init__(self) -> None:
        if self.k < 0:
            raise ValueError(f"a scale is 0 (the base) or coarser, not {self.k}")

    @property
    def factor(self) -> int:
        """Base pixels per pixel of this scale, and base tiles per patch, along one side."""
        return 1 << self.k

    def mpp(self, base_mpp: float) -> float:
        """Return micrometres per pixel at this scale, given those at the base."""
        return base_mpp * self.factor


def guide_scale(size_px: tuple[int, int], patch_px: int) -> Scale:
    """Return the scale at which one square patch covers a canvas: ceil(log2(longest side / P))."""
    return Scale(max(0, math.ceil(math.log2(max(size_px) / patch_px))))


def origins(length: int, side: int, stride: int) -> list[int]:
    """Return starts of windows along one axis; the last one ends flush with the axis.

    Raises:
        ValueError: the axis is shorter than a window, or the stride leaves gaps.
    """
    if length < side:
        raise ValueError(f"an axis of {length} cannot hold a window of {side}")
    if not 0 < stride <= side:
        raise ValueError(f"stride {stride} must lie in 1..{side}, or the windows leave gaps")
    starts = list(range(0, length - side + 1, stride))
    return starts if starts[-1] + side == length else [*starts, length - side]


def windows(size: tuple[int, int], side: int, stride: int) -> list[tuple[int, int]]:
    """(row, column) origins of all windows over a canvas, row by row."""
    rows, columns = (origins(length, side, stride) for length in size)
    return [(row, column) for row in rows for column in columns]


def batches(count: int, size: int) -> list[tuple[int, ...]]:
    """Return indices 0..count-1 in batches of one fixed size; the last repeats its last index.

    A batch's shape never changes, so neither do the bits that it computes.
    """
    padded = list(range(count)) + [count - 1] * (-count % size)
    return [tuple(padded[start : start + size]) for start in range(0, len(padded), size)]


def spans(length: int, step: int) -> list[tuple[int, int]]:
    """Return half-open pieces [start, stop) of at most `step` that cover 0..length."""
    edges = [*range(0, length, step), length]
    return list(pairwise(edges))


@dataclass(frozen=True)
class Patch:
    """The patch of a bundle's networks; windows, strides and bands are fractions of its sizes.

    Attributes:
        side_px: patch side P (256 in the papers, 64 in `tiny`).
        factor: pixels per latent cell along one side.
        channels: latent channels.
        scales: how many scales the model knows; scale ids are 0 .. scales - 1.
    """

    side_px: int
    factor: int
    channels: int
    scales: int

    @property
    def side_lat(self) -> int:
        """Patch side in latent cells."""
        return self.side_px // self.factor

    @property
    def latent(self) -> tuple[int, int, int]:
        """Shape of one patch's latent: (channels, rows, columns)."""
        return (self.channels, self.side_lat, self.side_lat)
