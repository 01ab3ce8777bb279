"""embed: TILES in, EMBEDDINGS out: one raw vector per base tile that a kept example covers.

The encoder sees batches of one fixed size, cut inside a block of rows in row-major order, so
neither the number of workers nor a rerun changes a bit. Tiles of one colour (glass that the
scanner left out, padding) are embedded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float16

from raylarge import schema, storage
from raylarge.data import parts, tile_table
from raylarge.data.embed_config import DTYPES, EmbedConfig, section
from raylarge.data.grid import TileGrid, about
from raylarge.data.parts import Stage
from raylarge.data.pipeline import ExecutorConfig, Facts
from raylarge.data.tile_candidates import TileConfig, blocks, covered
from raylarge.data.tile_table import kept, scale_and_cells, slides_of
from raylarge.data.units import BlockUnit
from raylarge.errors import UserError
from raylarge.geometry import batches
from raylarge.models import ssl

Vector = Float16[np.ndarray, "width"]
Vectors = Float16[np.ndarray, "n width"]


def run(root: str, tile: TileConfig, config: EmbedConfig, executor: ExecutorConfig) -> Facts:
    """Embed the tiles of all slides, and write `embed.json`.

    Raises:
        UserError: `tile` has not run, another config or other weights, or an unknown encoder.
    """
    tiles = parts.manifest(root, "tile", "embed")
    used = section(config)
    sections = {"tile": tile_table.section(tile), "embed": used}
    parts.refuse_mixing(root, sections)
    units = units_of(root, tile, sections)
    config = replace(config, weights=config.weights and storage.absolute(config.weights))
    make_stage = partial(EmbedStage, root, tile, config)
    built = parts.build(root, units, make_stage, config.of(executor), "embed")
    encoder = {**ssl.card(config.encoder).as_json(), "weights": used.get("weights", "")}
    totals = {key: sum(one[key] for one in built.facts) for key in ("embedded", "blank")}
    more = {"input": tiles["digest"], "encoder": encoder, **totals}
    return {**parts.finish(root, "embed", built, sections, **more), **totals}


def units_of(root: str, tile: TileConfig, sections: dict[str, Any]) -> list[BlockUnit]:
    """The blocks of all slides."""
    return [
        BlockUnit(
            part=f"embeddings/{slide.slide_id}-{number:04d}.parquet",
            stamp=parts.stamp(sections, slide.tiling_digest, slide.coverage_digest, rows),
            slide_id=slide.slide_id,
            path=slide.path,
            mpp_override=slide.mpp_override,
            view=slide.view,
            tiles=sum(slide.covered[rows[0] : rows[1]]),
            columns=slide.grid[1],
            rows=rows,
        )
        for slide in slides_of(root)
        for number, rows in enumerate(blocks(slide.grid, tile))
    ]


class EmbedStage(Stage):
    """Makes the EMBEDDINGS of one block of a slide."""

    kind = schema.EMBEDDINGS

    def __init__(self, root: str, tile: TileConfig, config: EmbedConfig) -> None:
        """Load the encoder."""
        self._root = root
        self._batch = config.batch
        dtype = DTYPES[config.dtype]
        self._encoder = ssl.load(config.encoder, config.weights, config.device, dtype)
        self._grid = TileGrid(tile)
        self._blank: dict[bytes, Vector] = {}

    def make(self, unit: BlockUnit) -> tuple[pa.Table, Facts]:
        """The block's rows of the base grid, dense; tiles that nothing covers are not valid."""
        top, bottom = unit.rows
        table = kept(self._root, unit.slide_id)
        valid = covered(*scale_and_cells(table), (top, bottom), unit.columns)
        vectors = np.zeros((*valid.shape, self._encoder.card.width), np.float16)
        cells = [(top + int(r), int(c)) for r, c in np.argwhere(valid)]
        facts = {"embedded": 0, "blank": 0}
        if cells:
            with about(unit):
                self._grid.open(unit)
                vectors[valid] = self._embed(cells, facts)
        count, columns, width = vectors.shape
        offsets = np.arange(count + 1, dtype=np.int32) * columns
        fields = {
            "slide_id": pa.array([unit.slide_id] * count, pa.string()),
            "row": pa.array(range(top, bottom), pa.int32()),
            "columns": pa.array([columns] * count, pa.int32()),
            "valid": pa.ListArray.from_arrays(offsets, pa.array(valid.ravel())),
            "embedding": pa.ListArray.from_arrays(offsets * width, pa.array(vectors.ravel())),
        }
        return pa.table(fields), facts

    def _embed(self, cells: Sequence[tuple[int, int]], facts: Facts) -> Vectors:
        """A vector per cell: tiles of one colour share one, the others go in full batches."""
        vectors = np.empty((len(cells), self._encoder.card.width), np.float16)
        waiting: list[tuple[int, np.ndarray]] = []
        for index, pixels in enumerate(self._grid.ahead(cells)):
            if (colour := blank(pixels)) is None:
                waiting.append((index, pixels))
            else:
                vectors[index] = self._of_colour(colour, pixels)
                facts["blank"] += 1
            if len(waiting) == self._batch:
                self._batch_into(vectors, waiting)
        facts["embedded"] = len(cells) - facts["blank"]
        if waiting:
            self._batch_into(vectors, waiting)
        return vectors

    def _batch_into(self, vectors: Vectors, waiting: list[tuple[int, np.ndarray]]) -> None:
        """Embed what waits, as one batch of the full size: its last tile is repeated."""
        order = batches(len(waiting), self._batch)[0]
        encoded = self._encoded(np.stack([waiting[i][1] for i in order]))
        vectors[[index for index, _ in waiting]] = encoded[: len(waiting)]
        waiting.clear()

    def _of_colour(self, colour: bytes, pixels: np.ndarray) -> Vector:
        if colour not in self._blank:
            self._blank[colour] = self._encoded(np.stack([pixels] * self._batch))[0]
        return self._blank[colour]

    def _encoded(self, tiles: np.ndarray) -> Vectors:
        vectors = self._encoder(tiles)
        if not np.isfinite(vectors).all():
            raise UserError(
                f"embed.encoder={self._encoder.card.name} gives values beyond float16; take "
                "another embed.dtype=, or another encoder."
            )
        return vectors


def blank(pixels: np.ndarray) -> bytes | None:
    """The colour of a tile that has one alone."""
    first = pixels[0, 0]
    return first.tobytes() if (pixels[0] == first).all() and (pixels == first).all() else None
