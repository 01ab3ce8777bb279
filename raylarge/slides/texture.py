"""Seeded fields and scattered points that are pure functions of (key, coordinates).

A value depends only on its place, so that regions of a procedural slide fit together.
Coordinates are micrometres, rows before columns.
Value noise after Perlin ("An image synthesizer", SIGGRAPH 1985); splitmix64 (Steele et al. 2014).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def _mix(state: np.ndarray) -> np.ndarray:
    """Return splitmix64's output function."""
    state = (state ^ (state >> np.uint64(30))) * _MIX_1
    state = (state ^ (state >> np.uint64(27))) * _MIX_2
    return state ^ (state >> np.uint64(31))


def uniform(key: int, *parts: np.ndarray | int) -> np.ndarray:
    """Return uniform numbers in [0, 1), one per element of the broadcast integer parts."""
    state = np.array([key], dtype=np.uint64)
    with np.errstate(over="ignore"):
        for part in parts:
            number = np.asarray(part, dtype=np.int64).astype(np.uint64)
            state = _mix((state ^ number) * _GOLDEN + _GOLDEN)
    return (state >> np.uint64(11)).astype(np.float64) / float(1 << 53)


def noise(y: np.ndarray, x: np.ndarray, cell: tuple[float, float], key: int) -> np.ndarray:
    """Return smooth value noise in [0, 1) at broadcast points, of grain `cell` along y and x."""
    rows, fy = _split(y / cell[0])
    columns, fx = _split(x / cell[1])
    if not rows.size:
        return np.zeros(np.broadcast_shapes(rows.shape, columns.shape), np.float32)
    first = int(rows.min()), int(columns.min())
    lattice = uniform(
        key,
        np.arange(first[0], int(rows.max()) + 2)[:, None],
        np.arange(first[1], int(columns.max()) + 2)[None],
    ).astype(np.float32)
    rows, columns = rows - first[0], columns - first[1]
    near = lattice[rows, columns] * (1 - fx) + lattice[rows, columns + 1] * fx
    far = lattice[rows + 1, columns] * (1 - fx) + lattice[rows + 1, columns + 1] * fx
    out: np.ndarray = near * (1 - fy) + far * fy
    return out


def fractal(y: np.ndarray, x: np.ndarray, cell_um: float, key: int, octaves: int = 3) -> np.ndarray:
    """Return noise of halving grain and weight, in [0, 1)."""
    total: np.ndarray = np.zeros(1, np.float32)
    for octave in range(octaves):
        size = cell_um / 2**octave
        total = total + noise(y, x, (size, size), key + octave) * np.float32(0.5**octave)
    return total / np.float32(2 - 0.5 ** (octaves - 1))


def _split(value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the integer part and the smoothed fraction 3t^2 - 2t^3."""
    whole = np.floor(value)
    t = (value - whole).astype(np.float32)
    return whole.astype(np.int64), t * t * (3 - 2 * t)


def ramp(value: np.ndarray, low: float | np.ndarray, high: float | np.ndarray) -> np.ndarray:
    """Return 0 below `low`, 1 above `high` (or the other way round), eased between."""
    t = np.clip((value - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


@dataclass(frozen=True)
class Points:
    """Scattered points: places in micrometres and the lattice cell that names each."""

    y: np.ndarray
    x: np.ndarray
    row: np.ndarray
    column: np.ndarray
    key: int

    def draw(self, what: int, low: float = 0.0, high: float = 1.0) -> np.ndarray:
        """Return one uniform number per point for the purpose `what`."""
        return low + (high - low) * uniform(self.key, self.row, self.column, what)

    def where(self, chosen: np.ndarray) -> Points:
        """Return the chosen points."""
        return Points(
            self.y[chosen], self.x[chosen], self.row[chosen], self.column[chosen], self.key
        )


def scatter(
    y_um: tuple[float, float], x_um: tuple[float, float], pitch_um: float, jitter: float, key: int
) -> Points:
    """Return one point per lattice cell of side `pitch_um`, moved by up to `jitter` cells, that may
    lie in the ranges given; cells in row-major order.
    """
    rows, columns = (
        np.arange(int(np.floor(low / pitch_um)) - 1, int(np.ceil(high / pitch_um)) + 1)
        for low, high in (y_um, x_um)
    )
    row, column = (axis.ravel() for axis in np.meshgrid(rows, columns, indexing="ij"))
    y = (row + 0.5 + jitter * (2 * uniform(key, row, column, -1) - 1)) * pitch_um
    x = (column + 0.5 + jitter * (2 * uniform(key, row, column, -2) - 1)) * pitch_um
    inside = (y >= y_um[0]) & (y < y_um[1]) & (x >= x_um[0]) & (x < x_um[1])
    return Points(y, x, row, column, key).where(inside)
