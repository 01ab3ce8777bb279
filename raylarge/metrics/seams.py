"""Seam ratio: the gradient across window borders divided by the gradient inside windows.

Each pair of neighbouring rows or columns is one line, whose gradient is the mean absolute
difference along it. Lines count equally, whatever their length.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def seam_ratio(image: Float[Tensor, "3 H W"], side: int) -> float:
    """Return the `SeamRatio` of an image in memory; same errors."""
    ratio = SeamRatio(side)
    ratio.add(image)
    return ratio.value


class SeamRatio:
    """Mean gradient across the borders of windows of `side` px over that inside windows.

    1 is seamless. Differences that cross a border count as border, those that do not touch one
    as inside. The image arrives in bands from top to bottom. Memory: one row, a sum per column,
    and differences of at most `side` rows.
    """

    def __init__(self, side: int) -> None:
        """Initialize for an image of windows of `side` px."""
        self._side = side
        self._above: Tensor | None = None
        self._across_rows: list[float] = []
        self._across_columns = torch.zeros(0, dtype=torch.float64)
        self._rows = 0

    def add(self, rows: Float[Tensor, "3 rows W"]) -> None:
        """Add the next rows, any number of them.

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
        """Ratio over the rows added so far.

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
