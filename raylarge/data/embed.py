"""embed: TILES in, EMBEDDINGS out: one raw vector per base tile that a kept example covers.

The encoder sees batches of one fixed size, cut inside a block of rows in row-major order, so
neither the number of workers nor a rerun changes a bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float16

from raylarge import schema, storage
from raylarge.config import plain
from raylarge.data import parts
from raylarge.data.grid import TileGrid
from raylarge.data.parts import Maker
from raylarge.data.pipeline import Facts, Unit
from raylarge.data.tile import Tile, blocks, slides_of
from raylarge.geometry import batches
from raylarge.models import ssl


@dataclass(frozen=True)
class Embed:
    """Which encoder looks at the base tiles."""

    encoder: str = "efficientnet_lite0"
    weights: str = ""  # a file or folder of weights that the user has, on every node
    batch: int = 32


def run(root: str, tile: Tile, config: Embed, workers: int | None) -> Facts:
    """Embed the tiles of all slides, and write `embed.json`.

    Raises:
        UserError: `tile` has not run, another config or other weights, or an unknown encoder.
    """
    tiles = parts.manifest(root, "tile", "embed")
    used = section(config)
    sections = {"tile": plain(tile), "embed": used}
    parts.refuse_mixing(root, sections)
    units = [
        {
            "part": f"embeddings/{slide['slide_id']}-{number:04d}.parquet",
            "stamp": parts.stamp(sections, slide["fingerprint"], rows),
            "slide_id": slide["slide_id"],
            "path": slide["path"],
            "rows": rows,
        }
        for slide in slides_of(root)
        for number, rows in enumerate(blocks(slide, tile))
    ]
    config = replace(config, weights=config.weights and storage.absolute(config.weights))
    facts = parts.build(root, units, partial(Embedding, root, tile, config), workers, "embed")
    encoder = {**ssl.card(config.encoder).as_json(), "weights": used.get("weights", "")}
    return parts.finish(root, "embed", facts, sections, input=tiles["digest"], encoder=encoder)


def section(config: Embed) -> dict[str, Any]:
    """What of the config the embeddings depend on: weights count by their content, not their path.

    Raises:
        UserError: an unknown encoder, or weights that are missing.
    """
    known = plain(config)
    digest = ssl.weights_digest(ssl.card(config.encoder), known.pop("weights"))
    return {**known, "weights": digest} if digest else known


class Embedding(Maker):
    """Makes the EMBEDDINGS of one block of a slide."""

    kind = schema.EMBEDDINGS

    def __init__(self, root: str, tile: Tile, config: Embed) -> None:
        """Load the encoder."""
        self._root = root
        self._batch = config.batch
        self._encoder = ssl.load(config.encoder, config.weights)
        self._grid = TileGrid(tile.patch_px, tile.mpp, tile.base_mpp)

    def make(self, unit: Unit) -> tuple[pa.Table, Facts]:
        """All covered tiles of the block, row by row."""
        top, bottom = unit["rows"]
        cells = np.argwhere(covered(self._root, unit["slide_id"], top, bottom))
        cells[:, 0] += top
        vectors = self._embed(unit["path"], cells)
        lengths = np.arange(len(cells) + 1, dtype=np.int32) * vectors.shape[1]
        columns = {
            "slide_id": pa.array([unit["slide_id"]] * len(cells), pa.string()),
            "row": pa.array(cells[:, 0], pa.int32()),
            "column": pa.array(cells[:, 1], pa.int32()),
            "embedding": pa.ListArray.from_arrays(lengths, pa.array(vectors.ravel())),
        }
        return pa.table(columns), {}

    def _embed(self, path: str, cells: np.ndarray) -> Float16[np.ndarray, "n width"]:
        vectors = np.empty((len(cells), self._encoder.card.width), np.float16)
        if not len(cells):
            return vectors
        self._grid.open(path)
        for batch in batches(len(cells), self._batch):
            tiles = np.stack([self._grid.tile(*cells[i].tolist()) for i in batch])
            vectors[list(batch)] = self._encoder(tiles)
        return vectors


def covered(root: str, slide_id: str, top: int, bottom: int) -> Bool[np.ndarray, "rows columns"]:
    """Which base tiles of the rows [top, bottom) some kept example of a slide covers."""
    table = kept(root, slide_id)
    scale, row, column = (table[name].to_numpy() for name in ("scale", "row", "column"))
    factor = 1 << scale.astype(np.int64)
    columns = int((column + factor).max(initial=0))
    cells = np.zeros((bottom - top, columns), bool)
    for r, c, f in zip(row, column, factor, strict=True):
        cells[max(0, r - top) : max(0, r + f - top), c : c + f] = True
    return cells


def kept(root: str, slide_id: str) -> pa.Table:
    """The kept examples of a slide among its TILES."""
    table = storage.read_table(storage.join(root, "tiles", f"{slide_id}.parquet"))
    return table.filter(table["kept"])
