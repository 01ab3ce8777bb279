"""shard: TILES and EMBEDDINGS in, EXAMPLES out: images with the grids that they cover.

The image of an example at scale k is A(base pixels of its region), with A the one downsampling
operator of `raylarge.resample`, taken in floating point and rounded once. Its grid is the
2^k x 2^k raw embeddings under it, averaged to 8 x 8 where larger (ZoomLDM, section 3.2).

Blocks of slides are made first; `bucket.py` then mixes them for shuffled reading.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float16, UInt8
from torch import nn

from raylarge import images, schema, storage, tables
from raylarge.config import plain
from raylarge.data import bucket, parts, tile_table
from raylarge.data.embed_config import EmbedConfig, section_in
from raylarge.data.grid import TileGrid, about
from raylarge.data.parts import Stage
from raylarge.data.pipeline import ExecutorConfig, Facts
from raylarge.data.tile_candidates import TileConfig, blocks
from raylarge.data.tile_table import kept, scale_and_cells, slides_of
from raylarge.data.units import BlockUnit, SlideFacts
from raylarge.errors import UserError
from raylarge.resample import bicubic_matrix

GRID_SIDE = 8
_OF_SLIDE = ("slide_id", "path", "mpp_override", "view", "labels")
_CACHED_PARTS = 64
_BUCKET_BYTES, _FEWEST_BUCKETS = 256 << 20, 16
_OUTPUTS = 32  # rows of A taken together: its band is narrow, so most of it is zero
Vectors = Float16[np.ndarray, "rows columns width"]


@dataclass(frozen=True)
class ShardConfig:
    """How examples are stored."""

    quality: int = 0
    """0 keeps every pixel (PNG); 1 to 100 is the quality of a JPEG, some six times smaller."""
    buckets: int = 0
    """Files of EXAMPLES, of which a worker holds one in memory three times over; 0: about 256 MB
    each. A folder keeps the number that it began with."""
    group_rows: int = 64
    """Rows that are read together."""

    def check(self) -> None:
        """Refuse values that make no sense.

        Raises:
            UserError: naming the key, its value and what it may be.
        """
        for key, fine, wish in (
            ("quality", 0 <= self.quality <= 100, "0 (lossless) to 100"),
            ("buckets", self.buckets >= 0, "1 or more, or 0"),
            ("group_rows", self.group_rows >= 1, "1 or more"),
        ):
            if not fine:
                raise UserError(f"shard.{key}={getattr(self, key)}: it must be {wish}.")


def run(
    root: str, tile: TileConfig, embed: EmbedConfig, config: ShardConfig, executor: ExecutorConfig
) -> Facts:
    """Put the examples of all slides together, and write `shard.json`.

    Slides of which `embed` could not read all are left out.

    Raises:
        UserError: `tile` or `embed` has not run (or is out of date), or another config.
    """
    config.check()
    tiles, embedded = (parts.manifest(root, verb, "shard") for verb in ("tile", "embed"))
    number = config.buckets or _buckets(root, tiles, config)
    stored = {**plain(config), "buckets": number}
    mine = {"embed": section_in(root, embed), "shard": stored}
    sections = {"tile": tile_table.section(tile), **mine}
    parts.refuse_mixing(root, sections)
    if embedded["input"] != tiles["digest"]:
        raise UserError(f"{root} was tiled anew since embed ran; run verbs=embed,shard.")
    slides = [one for one in slides_of(root) if one.slide_id not in embedded["lost"]]
    stamps = {one["part"]: one["stamp"] for one in embedded["parts"]}
    units = [unit for slide in slides for unit in _units(slide, tile, [sections, stamps])]
    plan = bucket.BucketPlan(root, units, number)
    blocks_made = parts.build(
        root, plan.missing_blocks(), partial(ShardStage, root, tile, config), executor, "blocks"
    )
    plan = plan.without(blocks_made.lost)
    built = plan.build(config.group_rows, executor)
    more = {"input": embedded["digest"], "encoder": embedded["encoder"], "patch_px": tile.patch_px}
    if not any(one["rows"] for one in built.facts):
        raise UserError(f"{root} has no example: no slide is whole; see {root}/failed.parquet.")
    together = parts.BuildResult(built.facts, blocks_made.failed)
    done = parts.finish(root, "shard", together, sections, **more)
    plan.sweep()
    return {**done, "blocks_made": sum(one["made"] for one in blocks_made.facts)}


def _buckets(root: str, tiles: Facts, config: ShardConfig) -> int:
    """How many buckets a folder has, or else as many as its examples will fill."""
    if manifest := tables.read_manifest(root, "shard"):
        return int(manifest["config"]["shard"]["buckets"])
    rows = sum(count for by in tiles["counts"].values() for count in by.values())
    each = tiles["patch_px"] ** 2 * (0.5 if config.quality else 2.0)  # bytes of a full image
    return max(_FEWEST_BUCKETS, math.ceil(rows * each / _BUCKET_BYTES))


def _units(slide: SlideFacts, tile: TileConfig, inputs: list[dict[str, Any]]) -> list[BlockUnit]:
    """The blocks of a slide; each depends on all its vectors, which may be another's."""
    edges = blocks(slide.grid, tile)
    sections, stamps = inputs
    names = [f"embeddings/{slide.slide_id}-{number:04d}.parquet" for number in range(len(edges))]
    slide_stamp = parts.stamp(sections, slide.stamp, [stamps[name] for name in names])
    slide_fields = {name: getattr(slide, name) for name in _OF_SLIDE}
    return [
        BlockUnit(
            part=f"blocks/{slide.slide_id}-{number:04d}.parquet",
            stamp=parts.stamp(slide_stamp, rows),
            tiles=sum(slide.covered[rows[0] : rows[1]]),
            rows=rows,
            blocks=edges,
            **slide_fields,
        )
        for number, rows in enumerate(edges)
    ]


class ShardStage(Stage):
    """Makes the EXAMPLES whose upper edge lies in one block of a slide."""

    kind = schema.EXAMPLES

    def __init__(self, root: str, tile: TileConfig, config: ShardConfig) -> None:
        """Hold where the data lies, and the tiles and embeddings read last."""
        self._root = root
        self._quality = config.quality
        self._grid = TileGrid(tile)
        self._embeddings = lru_cache(_CACHED_PARTS)(self._read_embeddings)

    def make(self, unit: BlockUnit) -> tuple[pa.Table, Facts]:
        """All examples of the block by scale, row and column."""
        top, bottom = unit.rows
        table = kept(self._root, unit.slide_id)
        row = table["row"].to_numpy()
        table = table.filter(pa.array((row >= top) & (row < bottom)))
        examples = []
        if table.num_rows:
            vectors = self._vectors(unit, table)
            with about(unit):
                self._grid.open(unit)
                self._load(table)
                examples = [self._example(cell, unit, vectors) for cell in table.to_pylist()]
        return pa.Table.from_pylist(examples, schema=pa.schema(list(schema.EXAMPLES))), {}

    def _load(self, table: pa.Table) -> None:
        """Read the base examples' tiles in strips; coarser ones read their own."""
        scale, cells = scale_and_cells(table)
        base = cells[scale == 0]
        for row in np.unique(base[:, 0]):
            self._grid.load(int(row), [int(c) for c in np.sort(base[base[:, 0] == row, 1])])

    def _example(self, cell: dict[str, Any], unit: BlockUnit, vectors: Vectors) -> dict[str, Any]:
        factor, top = 1 << cell["scale"], unit.rows[0]
        row, column = cell["row"], cell["column"]
        raw = vectors[row - top : row - top + factor, column : column + factor]
        if not np.isfinite(raw).all():
            raise RuntimeError(f"embed left out tiles under {cell}")
        grid = pooled(raw)
        image = example_image(self._grid, row, column, factor)
        return {
            **{name: cell[name] for name in schema.EXAMPLES.names if name in cell},
            "key": key(cell["slide_id"], cell["scale"], row, column),
            "labels": sorted(unit.labels.items()),
            "image": images.encoded(image, self._quality),
            "grid": grid.ravel(),
            "grid_rows": grid.shape[0],
            "grid_columns": grid.shape[1],
        }

    def _vectors(self, unit: BlockUnit, table: pa.Table) -> Vectors:
        """Raw embeddings from the block's first row down to the last row that is covered."""
        scale, cells = scale_and_cells(table)
        top, bottom = unit.rows[0], int((cells[:, 0] + (1 << scale.astype(np.int64))).max())
        pieces = []
        for number, (start, stop) in enumerate(unit.blocks):
            if start < bottom and stop > top:
                name = f"{unit.slide_id}-{number:04d}.parquet"
                first, values = self._embeddings(name)
                pieces.append(values[max(0, top - first) : bottom - first])
        return np.concatenate(pieces)

    def _read_embeddings(self, name: str) -> tuple[int, Vectors]:
        """The first row of one part, and its vectors; NaN where there are none."""
        path = storage.join(self._root, "embeddings", name)
        table = storage.read_table(path)
        valid, values = tables.dense(table)
        return table["row"][0].as_py(), np.where(valid[..., None], values, np.float16(np.nan))


def key(slide_id: str, scale: int, row: int, column: int) -> int:
    """The name of an example: 64 bits of a hash of where it lies."""
    place = f"{slide_id} {scale} {row} {column}".encode()
    return int.from_bytes(hashlib.blake2b(place, digest_size=8).digest(), "big")


def example_image(grid: TileGrid, row: int, column: int, factor: int) -> UInt8[np.ndarray, "P P 3"]:
    """A(region) of factor x factor base tiles; only a strip of tiles is held as floats at a time.

    A is separable: columns are shrunk strip by strip, then rows all at once.
    """
    if factor == 1:
        return grid.tile(row, column)
    bands = _bands(grid.patch_px, factor)
    strips = (grid.strip(row + i, column, factor) for i in range(factor))
    narrow = [_shrunk(images.to_float(strip), bands) for strip in strips]
    return images.to_uint8(_shrunk(torch.cat(narrow, dim=1).mT, bands).mT)


@lru_cache(16)
def _bands(side: int, factor: int) -> list[tuple[int, int, torch.Tensor]]:
    """D in pieces of a few outputs: the first and last input that they weigh, and the weights."""
    matrix = torch.from_numpy(bicubic_matrix(side * factor, factor)).float()
    bands = []
    for rows in matrix.split(_OUTPUTS):
        seen = rows.abs().amax(dim=0).nonzero()
        low, high = int(seen[0]), int(seen[-1]) + 1
        bands.append((low, high, rows[:, low:high].T.contiguous()))
    return bands


def _shrunk(x: torch.Tensor, bands: list[tuple[int, int, torch.Tensor]]) -> torch.Tensor:
    """The product x Dᵀ with a banded D."""
    return torch.cat([x[..., low:high] @ weights for low, high, weights in bands], dim=-1)


def pooled(raw: Vectors) -> Float16[np.ndarray, "pooled_rows pooled_columns width"]:
    """A grid of embeddings, averaged to 8 x 8 where it is larger."""
    if raw.shape[0] <= GRID_SIDE:
        return raw
    x = torch.from_numpy(raw.astype(np.float32)).movedim(-1, 0)
    small = nn.functional.adaptive_avg_pool2d(x, GRID_SIDE).movedim(0, -1)
    out: np.ndarray = small.numpy().astype(np.float16)
    return out
