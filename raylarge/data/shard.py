"""shard: TILES and EMBEDDINGS in, EXAMPLES out: images with the grids that they cover.

The image of an example at scale k is A(base pixels of its region), with A the one downsampling
operator of `raylarge.resample`, taken in floating point and rounded once. Its grid is the
2^k x 2^k raw embeddings under it, averaged to 8 x 8 where larger (ZoomLDM, section 3.2).
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float16, UInt8
from torch import nn

from raylarge import images, schema, storage
from raylarge.config import plain
from raylarge.data import parts
from raylarge.data.embed import Embed, kept, section
from raylarge.data.grid import TileGrid
from raylarge.data.parts import Maker
from raylarge.data.pipeline import Facts, Unit
from raylarge.data.tile import Tile, blocks, slides_of
from raylarge.errors import UserError
from raylarge.resample import bicubic_matrix

GRID_SIDE = 8
_CACHED_PARTS = 64
Vectors = Float16[np.ndarray, "rows columns width"]


def run(root: str, tile: Tile, embed: Embed, workers: int | None) -> Facts:
    """Put the examples of all slides together, and write `shard.json`.

    Raises:
        UserError: `tile` or `embed` has not run (or is out of date), or another config.
    """
    tiles, embedded = (parts.manifest(root, verb, "shard") for verb in ("tile", "embed"))
    sections = {"tile": plain(tile), "embed": section(embed)}
    parts.refuse_mixing(root, sections)
    if embedded["input"] != tiles["digest"]:
        raise UserError(f"{root} was tiled anew since embed ran; run verbs=embed,shard.")
    units = [unit for slide in slides_of(root) for unit in _units(slide, tile, sections)]
    facts = parts.build(root, units, partial(Sharding, root, tile), workers, "shard")
    more = {"input": embedded["digest"], "encoder": embedded["encoder"], "patch_px": tile.patch_px}
    return parts.finish(root, "shard", facts, sections, **more)


def _units(slide: dict[str, Any], tile: Tile, sections: dict[str, Any]) -> list[Unit]:
    edges = blocks(slide, tile)
    return [
        {
            "part": f"examples/{slide['slide_id']}-{number:04d}.parquet",
            "stamp": parts.stamp(sections, slide["fingerprint"], rows),
            "slide_id": slide["slide_id"],
            "path": slide["path"],
            "rows": rows,
            "blocks": edges,
        }
        for number, rows in enumerate(edges)
    ]


class Sharding(Maker):
    """Makes the EXAMPLES whose upper edge lies in one block of a slide."""

    kind = schema.EXAMPLES

    def __init__(self, root: str, tile: Tile) -> None:
        """Hold where the data lies, and the tiles and embeddings read last."""
        self._root = root
        self._grid = TileGrid(tile.patch_px, tile.mpp, tile.base_mpp)
        self._embeddings = lru_cache(_CACHED_PARTS)(self._read_embeddings)

    def make(self, unit: Unit) -> tuple[pa.Table, Facts]:
        """All examples of the block by scale, row and column."""
        top, bottom = unit["rows"]
        table = kept(self._root, unit["slide_id"])
        row = table["row"].to_numpy()
        table = table.filter(pa.array((row >= top) & (row < bottom)))
        found = []
        if table.num_rows:
            self._grid.open(unit["path"])
            vectors = self._vectors(unit, table)
            found = [self._example(cell, top, vectors) for cell in table.to_pylist()]
        return pa.Table.from_pylist(found, schema=pa.schema(list(schema.EXAMPLES))), {}

    def _example(self, cell: dict[str, Any], top: int, vectors: Vectors) -> dict[str, Any]:
        factor = 1 << cell["scale"]
        row, column = cell["row"], cell["column"]
        raw = vectors[row - top : row - top + factor, column : column + factor]
        grid = pooled(raw)
        return {
            **{name: cell[name] for name in schema.EXAMPLES.names if name in cell},
            "image": images.png_bytes(example_image(self._grid, row, column, factor)),
            "grid": grid.ravel(),
            "grid_rows": grid.shape[0],
            "grid_columns": grid.shape[1],
        }

    def _vectors(self, unit: Unit, table: pa.Table) -> Vectors:
        """Raw embeddings from the block's first row down to the last row that is covered."""
        factor = 1 << table["scale"].to_numpy().astype(np.int64)
        top, bottom = unit["rows"][0], int((table["row"].to_numpy() + factor).max())
        columns = int((table["column"].to_numpy() + factor).max())
        vectors: np.ndarray | None = None
        for number, (start, stop) in enumerate(unit["blocks"]):
            if start >= bottom or stop <= top:
                continue
            name = f"{unit['slide_id']}-{number:04d}.parquet"
            cells, values = self._embeddings(name)
            if not len(cells):
                continue
            if vectors is None:
                vectors = np.zeros((bottom - top, columns, values.shape[1]), np.float16)
            inside = (cells[:, 0] < bottom) & (cells[:, 1] < columns)
            vectors[cells[inside, 0] - top, cells[inside, 1]] = values[inside]
        assert vectors is not None, "embed has covered every kept example"
        return vectors

    def _read_embeddings(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(row, column) [n, 2] and the vectors [n, width] of one part."""
        table = storage.read_table(storage.join(self._root, "embeddings", name))
        cells = np.stack([table["row"].to_numpy(), table["column"].to_numpy()], axis=1)
        values = table["embedding"].combine_chunks().values.to_numpy(zero_copy_only=False)
        return cells.astype(np.int64), values.reshape(len(cells), -1 if len(cells) else 0)


def example_image(grid: TileGrid, row: int, column: int, factor: int) -> UInt8[np.ndarray, "P P 3"]:
    """A(region) of factor x factor base tiles; only a strip of tiles is held as floats at a time.

    A is separable: columns are shrunk strip by strip, then rows all at once.
    """
    if factor == 1:
        return grid.tile(row, column)
    side = grid.tile(row, column).shape[0]
    matrix = torch.from_numpy(bicubic_matrix(side * factor, factor)).float()
    strips = (grid.strip(row + i, column, factor) for i in range(factor))
    narrow = [images.to_float(strip) @ matrix.T for strip in strips]
    return images.to_uint8(matrix @ torch.cat(narrow, dim=1))


def pooled(raw: Vectors) -> Float16[np.ndarray, "pooled_rows pooled_columns width"]:
    """A grid of embeddings, averaged to 8 x 8 where it is larger."""
    if raw.shape[0] <= GRID_SIDE:
        return raw
    x = torch.from_numpy(raw.astype(np.float32)).movedim(-1, 0)
    small = nn.functional.adaptive_avg_pool2d(x, GRID_SIDE).movedim(0, -1)
    out: np.ndarray = small.numpy().astype(np.float16)
    return out
