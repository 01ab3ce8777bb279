"""Seam ratio: how much sharper an image changes across window borders than elsewhere.

Every pair of neighbouring rows and of neighbouring columns is one line, whose gradient is the
mean absolute difference along it; lines are averaged, whatever their length.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def seam_ratio(image: Float[Tensor, "3 H W"], side: int) -> float:
    """Mean gradient across the borders of windows of `side` px over that inside windows.

    1 is seamless. Only differences that cross a border count as border, and only those well
    inside a window (not next to a border) as inside.

    Raises:
        ValueError: the image is one window and has no borders.
    """
    ratio = SeamRatio(side)
    ratio.add(image)
    return ratio.value


class SeamRatio:
    """`seam_ratio` of an image that comes in bands, from top to bottom.

    Kept in memory: one row, a sum per column, and differences of at most `side` rows at a time.
    """

    def __init__(self, side: int) -> None:
        """Start above the first row of an image made of windows of `side` px."""
        self._side = side
        self._above: Tensor | None = None
        self._across_rows: list[float] = []
        self._across_columns = torch.zeros(0, dtype=torch.float64)
        self._rows = 0

    def add(self, rows: Float[Tensor, "3 rows W"]) -> None:
        """Take the next rows, any number of them.

        Raises:
            ValueError: rows of another width.
        """
        if self._above is None:
            self._across_columns = torch.zeros(rows.shape[-1] - 1, dtype=torch.float64)
            self._above = rows[:, :0]
        if rows.shape[-1] != len(self._across_columns) + 1:
            raise ValueError(
                f"rows of {rows.shape[-1]} px after rows of {len(self._across_columns) + 1} px"
            )
        for part in rows.split(self._side, dim=1):
            joined = torch.cat([self._above, part], dim=1)
            lines = joined.diff(dim=1).abs().mean(dim=(0, 2), dtype=torch.float64)
            self._across_rows += lines.tolist()
            steps = part.diff(dim=2).abs().mean(dim=0, dtype=torch.float64)
            self._across_columns += steps.sum(dim=0).cpu()
            self._above = joined[:, -1:].clone()
            self._rows += part.shape[1]

    @property
    def value(self) -> float:
        """The ratio over the rows that have come; 1 is seamless.

        Raises:
            ValueError: they are one window and have no borders.
        """
        size = (self._rows, len(self._across_columns) + 1)
        if max(size) <= self._side:
            raise ValueError(f"an image of {size} px has no borders of {self._side} px")
        across_rows = torch.tensor(self._across_rows, dtype=torch.float64)
        border, inside = [], []
        for lines in (across_rows, self._across_columns / self._rows):
            place = torch.arange(1, len(lines) + 1) % self._side
            border.append(lines[place == 0])
            inside.append(lines[(place >= 2) & (place <= self._side - 2)])
        return float(torch.cat(border).mean() / torch.cat(inside).mean())
