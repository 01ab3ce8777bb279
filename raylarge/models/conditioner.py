"""The input of conditioners: grids of raw embeddings as at most 64 cells.

    grid [B, C, h, w] -pool, if over 64 cells-> h w cells, row by row, then zeros up to 64

Grids of different shapes share a batch as cells [B, 64, C] with their sizes [B, 2].
Source: ZoomLDM, section 3.1 (pooling); its `preprocess_features` (normalising each token).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from raylarge.errors import UserError

SLOTS = 64
SIDE = 8


class Cells(NamedTuple):
    """A batch of grids.

    Attributes:
        values: raw embeddings, row-major, zeros after the real ones.
        size: rows and columns of each grid, at most 64 cells: one row of 64 is possible.
    """

    values: Float[Tensor, "B 64 C"]
    size: Int[Tensor, "B 2"]


@runtime_checkable
class Conditioner(Protocol):
    """Turns embeddings and a scale into context tokens of the U-Net."""

    def __call__(
        self, grid: Float[Tensor, "..."], scale: Int[Tensor, " B"], size: Int[Tensor, "B 2"] | None
    ) -> Float[Tensor, "B n D"]:
        """Return context tokens of grids [B, C, h, w], or of cells [B, 64, C] with their sizes."""
        ...

    def null(self, count: int) -> Float[Tensor, "B n D"]:
        """Return the tokens of the null condition, `count` times."""
        ...


def pool_grid(grid: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h2 w2"]:
    """Pool a grid of more than 64 cells to at most 8 per axis; return others unchanged.

    9 x 8 becomes 8 x 8, 1 x 100 becomes 1 x 8.
    """
    rows, columns = grid.shape[-2:]
    if rows * columns <= SLOTS:
        return grid
    return nn.functional.adaptive_avg_pool2d(grid, (min(rows, SIDE), min(columns, SIDE)))


def to_cells(grid: Float[Tensor, "B C h w"]) -> Cells:
    """Convert a batch of equal raw grids to padded cells."""
    pooled = pool_grid(grid)
    values = pooled.flatten(2).mT
    size = torch.tensor(pooled.shape[-2:], device=grid.device).expand(len(grid), 2)
    return Cells(nn.functional.pad(values, (0, 0, 0, SLOTS - values.shape[1])), size)


def read_cells(grid: Tensor, size: Tensor | None, channels: int) -> Cells:
    """Return the cells of either input form of a conditioner.

    Raises:
        UserError: embeddings of another width, an empty grid, or cells without their sizes.
    """
    width = grid.shape[1] if grid.ndim == 4 else grid.shape[-1]
    if width != channels:
        raise UserError(
            f"the embeddings have {width} channels, the bundle's Summarizer takes {channels}; "
            f"embed with the encoder that the bundle was trained with."
        )
    if grid.ndim == 4:
        if 0 in grid.shape[-2:]:
            raise UserError(f"a grid of {tuple(grid.shape[-2:])} embeddings is empty.")
        return to_cells(grid)
    if size is None or grid.shape[1] != SLOTS:
        raise UserError(f"give grids [B, C, h, w], or cells [B, {SLOTS}, C] with their sizes.")
    return Cells(grid, size)


def normalise(cells: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
    """Normalise each embedding to mean 0 and (unbiased) deviation 1 over its own channels."""
    mean, std = cells.mean(dim=-1, keepdim=True), cells.std(dim=-1, keepdim=True)
    return (cells - mean) / (std + 1e-8)
