"""From a table on disk or in S3 to batches: which sample is which row is a pure function.

    sample (global index) -> scale by weight -> row, uniform within the scale

drawn at the address (seed, sample). Step s holds the samples s*B .. s*B + B - 1, split into
equal slices by rank, so the world size only divides the work. The table's manifest says
which parts belong to it. Rows are held in memory, in an order that does not depend on how
the parts were cut.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import UInt8

from raylarge import images, tables
from raylarge.diffusion import noise
from raylarge.errors import UserError
from raylarge.train.task import Batch, Facts, Recipe

GRID_CELLS = 64  # an embedding grid is stored pooled to 8 x 8 where larger
LATENT_CHANNELS = 3
CACHE_BYTES = 1 << 30  # of decoded images


class Ingest:
    """The training rows of one table."""

    def __init__(self, root: str, name: str, recipe: Recipe, split: str = "train") -> None:
        """Read a table's rows of one split.

        Args:
            root: the data folder; a path or an `s3://` URL.
            name: of the table, `examples` or `latents-<digest>`.
            recipe: gives seed, batch and scale_weights.
            split: rows of other splits are left out.

        Raises:
            UserError: no table, one of another version, no row of the split, unfit weights.
        """
        made, table = tables.manifest(root, name), tables.rows(root, name, split)
        self.recipe, self.digest = recipe, str(made["digest"])
        self.scale = table["scale"].to_numpy().astype(np.int64)
        self.rows = table["grid_rows"].to_numpy().astype(np.int64)
        self.columns = table["grid_columns"].to_numpy().astype(np.int64)
        self.grid, self.grid_start = tables.lists(table["grid"])
        self.images: dict[int, UInt8[np.ndarray, "p p 3"]] = {}
        self.png = table["image"] if "image" in table.column_names else None
        self.latent = None if self.png is not None else _latents(table)
        self.facts = self._facts(made)
        self._begin, self._count, self._edges = self._scales()

    def index(self, sample: int) -> int:
        """The row that a global sample index stands for."""
        draw = noise.generator(self.recipe.seed, "ingest", sample >> 32, sample & 0xFFFFFFFF)
        which, within = draw.random(2)
        k = int(np.searchsorted(self._edges, which, side="right"))
        return int(self._begin[k] + int(within * self._count[k]))

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """One rank's slice of a step's global batch.

        Returns:
            sample, scale, grid_rows, grid_columns: int64 [b]; grid: float32 [b, 64, C], cells
            row by row, zeros after them; image: float32 [b, 3, P, P] in [-1, 1], or latent:
            float32 [b, c, h, w].
        """
        size = self.recipe.batch // world_size
        first = step * self.recipe.batch + rank * size
        samples = range(first, first + size)
        rows = np.array([self.index(sample) for sample in samples])
        batch = {
            "sample": torch.tensor(samples, dtype=torch.int64),
            "scale": torch.from_numpy(self.scale[rows]),
            "grid": self._grids(rows),
            "grid_rows": torch.from_numpy(self.rows[rows]),
            "grid_columns": torch.from_numpy(self.columns[rows]),
        }
        if self.latent is None:
            stack = np.stack([self._image(int(row)) for row in rows])
            return {**batch, "image": images.to_float(stack)}
        return {**batch, "latent": torch.from_numpy(self.latent[rows].astype(np.float32))}

    def sample(self, least: int) -> Batch:
        """The global batches of the first steps together: at least so many training samples."""
        batches = [self.batch(step) for step in range(-(-least // self.recipe.batch))]
        return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}

    def _grids(self, rows: np.ndarray) -> torch.Tensor:
        grids = np.zeros((len(rows), GRID_CELLS, self.facts.channels), np.float32)
        for i, row in enumerate(rows):
            cells = self.grid[self.grid_start[row] : self.grid_start[row + 1]]
            grids[i, : len(cells) // self.facts.channels] = cells.reshape(-1, self.facts.channels)
        return torch.from_numpy(grids)

    def _image(self, row: int) -> np.ndarray:
        image = self.images.get(row)
        if image is None:
            assert self.png is not None
            image = images.from_bytes(self.png[row].as_py())
            if len(self.images) * image.nbytes < CACHE_BYTES:
                self.images[row] = image
        return image

    def _facts(self, made: dict[str, Any]) -> Facts:
        cells = int(self.rows[0] * self.columns[0])
        values, counts = np.unique(self.scale, return_counts=True)
        side = int(made["patch_px"])
        return Facts(
            channels=int(self.grid_start[1] - self.grid_start[0]) // cells,
            counts={int(k): int(n) for k, n in zip(values, counts, strict=True)},
            image=(3, side, side),
            latent=None if self.latent is None else tuple(self.latent.shape[1:]),
            base_mpp=made.get("config", {}).get("tile", {}).get("base_mpp"),
            encoder=dict(made["encoder"]),
        )

    def _scales(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First row, number of rows and upper edge of the cumulative weight of each scale."""
        counts = np.array([self.facts.counts[k] for k in self.facts.scales])
        weights = np.array(self.recipe.scale_weights or [1.0] * len(counts))
        if len(weights) != len(counts) or (weights < 0).any() or weights.sum() <= 0:
            raise UserError(
                f"scale_weights={weights.tolist()} does not fit; give one weight, 0 or more, for "
                f"each of the scales {list(self.facts.scales)} that have training rows."
            )
        edges = np.cumsum(weights) / weights.sum()
        return np.cumsum(counts) - counts, counts, edges[:-1]


def check_batch(recipe: Recipe, world_size: int) -> None:
    """Refuse a global batch that does not divide among workers and micro-batches.

    Raises:
        UserError: with the nearest batch that does.
    """
    unit = world_size * recipe.accumulation
    if recipe.batch < 1 or recipe.batch % unit:
        raise UserError(
            f"batch={recipe.batch} does not divide by {world_size} worker(s) x "
            f"accumulation={recipe.accumulation}; batch={max(1, -(-recipe.batch // unit)) * unit} "
            f"does."
        )


def _latents(table: pa.Table) -> np.ndarray:
    """All latents as float16 [n, c, h, w]."""
    values, starts = tables.lists(table["latent"])
    length = int(starts[1] - starts[0])
    side = math.isqrt(length // LATENT_CHANNELS)
    if not (np.diff(starts) == length).all() or LATENT_CHANNELS * side * side != length:
        raise UserError(
            f"the latents are no squares of {LATENT_CHANNELS} channels ({length} values in the "
            f"first); encode the examples again with this autoencoder."
        )
    return values[starts[0] : starts[-1]].reshape(-1, LATENT_CHANNELS, side, side)
