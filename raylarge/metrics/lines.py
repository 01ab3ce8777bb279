"""Window lines: does an image show a grid with the period of its windows?

The seam ratio hardly reacts to a line of another mean brightness, so this metric computes
profiles along each axis:

    mean of each channel, mean gradient across, steps of local colour, steps of local contrast

A grid of period P puts power at the frequencies k / P of some profile. The power there is divided
by that of the frequencies around it; the median over the harmonics k is compared with the same
figure at frequencies between them. The phase of the grid does not matter, and the 8 px blocks of
JPEG, which hit only every P/8-th harmonic, do not count.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

MIN_WINDOWS = 4
"""Least number of windows along an axis for which a period differs from chance."""
HARMONICS = (4, 16)
"""Numbers of first harmonics to test, besides all: soft seams have only low ones."""
MIN_AMPLITUDE = 0.1 / 127.5
"""Amplitude, in units of [-1, 1], below which lines do not count: a tenth of a grey level."""


def window_lines(image: Float[Tensor, "3 H W"], side: int) -> float:
    """Return the value of `WindowLines` of an image in memory; same errors."""
    lines = WindowLines(side)
    lines.add(image)
    return lines.value


class WindowLines:
    """Strength of a grid of windows in an image in [-1, 1] that arrives in bands of rows.

    About 1 without lines (0.8 to 2.5 by chance); above 3 there is a grid. Rows and columns beyond
    the last complete window are ignored. Memory: a quarter of a window's rows, and figures per
    row and column. Windows of 8 or 16 px cannot be distinguished from the blocks of a JPEG.
    """

    def __init__(self, side: int) -> None:
        """Initialize for an image of windows of `side` px."""
        self._side, self._cell = side, side // 4 if side % 4 == 0 else side
        self._reach = max(1, min(4, side // 8))  # px on either side of a step
        self._pending: Tensor | None = None
        self._above: Tensor | None = None
        self._rows: list[Tensor] = []  # [4, rows]: channels' means, gradient from the row above
        self._local: Tensor | None = None  # the last rows' cells [4, 2 reach - 1, cells]
        self._row_steps: list[Tensor] = []  # [2, rows]: of colour, of contrast
        self._columns = self._column_steps = torch.zeros(4, 0)
        self._blocks = 0

    def add(self, rows: Float[Tensor, "3 rows W"]) -> None:
        """Add the next rows, any number of them.

        Raises:
            ValueError: rows of another width.
        """
        if self._pending is None:
            self._pending = rows[:, :0].cpu().float()
            self._columns = torch.zeros(4, rows.shape[-1], dtype=torch.float64)
            self._column_steps = torch.zeros(2, rows.shape[-1], dtype=torch.float64)
        if rows.shape[-1] != self._pending.shape[-1]:
            raise ValueError(
                f"rows of {rows.shape[-1]} px after rows of {self._pending.shape[-1]} px"
            )
        joined = torch.cat([self._pending, rows.cpu().float()], dim=1)
        whole = joined.shape[1] // self._cell * self._cell
        for block in joined[:, :whole].split(self._cell, dim=1) if whole else ():
            self._add_cells(block)
        self._pending = joined[:, whole:].clone()

    def _add_cells(self, block: Float[Tensor, "3 cell W"]) -> None:
        """Add the pixel rows of one row of cells."""
        above = block[:, :1] if self._above is None else self._above
        down = torch.cat([above, block], dim=1).diff(dim=1).abs().mean(dim=0)
        across = torch.nn.functional.pad(block.diff(dim=2).abs().mean(dim=0), (1, 0))
        self._above = block[:, -1:].clone()
        self._rows.append(torch.cat([block.mean(dim=2), down.mean(dim=1)[None]]).double())
        sums = torch.cat([block.sum(dim=1), across.sum(dim=0)[None]])
        self._columns += sums.double()
        self._column_steps += self._steps(torch.cat([block.mean(dim=1), down.mean(dim=0)[None]]))
        width = block.shape[2] // self._cell * self._cell
        values = torch.cat([block, across[None]])[..., :width]
        local = values.unflatten(2, (-1, self._cell)).mean(dim=3)
        joined = local if self._local is None else torch.cat([self._local, local], dim=1)
        self._row_steps.append(self._steps(joined.movedim(1, -1), pad=False))
        self._local = joined[:, -(2 * self._reach - 1) :].clone()
        self._blocks += 1

    def _steps(self, values: Tensor, pad: bool = True) -> Float[Tensor, "2 n"]:
        """Return steps of colour and of contrast [4, cells, n] along the last axis, over cells."""
        means = values.double().unfold(-1, self._reach, 1).mean(dim=-1)
        steps = (means[..., self._reach :] - means[..., : -self._reach]).abs()
        steps = steps.flatten(1, -2).mean(dim=1) if steps.ndim > 2 else steps
        profiles = torch.stack([steps[:3].mean(dim=0), steps[3]])
        return _padded(profiles, values.shape[-1], self._reach) if pad else profiles

    @property
    def value(self) -> float:
        """Strength of the grid over the rows added so far: the larger one of both axes.

        Raises:
            ValueError: fewer than `MIN_WINDOWS` windows along both axes.
        """
        height = self._blocks * self._cell
        strengths = []
        if height >= MIN_WINDOWS * self._side:
            steps = torch.cat(self._row_steps, dim=1)
            profiles = [torch.cat(self._rows, dim=1), _padded(steps, height, self._reach)]
            strengths.append(_strength(torch.cat(profiles).numpy(), self._side))
        if self._columns.shape[1] >= MIN_WINDOWS * self._side and height:
            profiles = [self._columns / height, self._column_steps / self._blocks]
            strengths.append(_strength(torch.cat(profiles).numpy(), self._side))
        if not strengths:
            size = (height, self._columns.shape[-1])
            raise ValueError(
                f"an image of {size} px has fewer than {MIN_WINDOWS} windows of {self._side} px"
            )
        return max(strengths)


def _padded(profiles: Float[Tensor, "p n"], length: int, first: int) -> Float[Tensor, "p length"]:
    """Return profiles that begin at `first`, padded with their means to a length."""
    padded = profiles.mean(dim=1, keepdim=True).repeat(1, length)
    padded[:, first : first + profiles.shape[1]] = profiles
    return padded


def _strength(profiles: Float[np.ndarray, "p length"], side: int) -> float:
    """Return how far the harmonics of 1 / side rise above the frequencies between them."""
    count = profiles.shape[1] // side
    ratios = np.stack([_ratios(p[: count * side], count) for p in profiles])  # [p, k, count]
    sets = [*(n for n in HARMONICS if n < ratios.shape[1]), ratios.shape[1]]
    medians = np.stack([np.median(ratios[:, :n], axis=1) for n in sets])
    strongest = medians.max(axis=(0, 1))  # at the harmonics, and shifted by 1, 2, … bins
    return float(strongest[0] / strongest[1:].mean())


def _ratios(profile: Float[np.ndarray, " n"], count: int) -> Float[np.ndarray, "k count"]:
    """Return the power relative to its surroundings, by harmonic and bins above it.

    The surroundings of a bin are the bins within two harmonics that are no harmonic, without the
    bin itself.
    """
    steps = np.diff(profile, prepend=profile[:1])
    power = np.abs(np.fft.rfft(steps)) ** 2
    between = (np.arange(len(power)) % count != 0).astype(float)
    kernel = np.ones(4 * count + 1)
    kernel[2 * count] = 0
    around = np.convolve(power * between, kernel, "same") / np.convolve(between, kernel, "same")
    ratios = (power + (count * MIN_AMPLITUDE) ** 2) / (around + (count * MIN_AMPLITUDE) ** 2)
    harmonics = len(power) // count - 1
    return ratios[count : count * (harmonics + 1)].reshape(harmonics, count)
