"""The Arrow schema, with a version, of every table that one verb writes and the next reads.

    slide -tile-> TILES -embed-> EMBEDDINGS -shard-> EXAMPLES -encode-> LATENTS -features-> FEATURES
                                                     EXAMPLES -caption-> CAPTIONS
                                            EXAMPLES, CAPTIONS -text_embed-> VECTORS

`row` and `column` are always cells of the base-tile grid (`x_tok` of ARCHITECTURE.md): an
example at scale k covers the 2**k x 2**k base tiles from (row, column). Embeddings are raw,
as the encoder gave them, in row-major order; normalising belongs to the model that reads them.
"""

from __future__ import annotations

import pyarrow as pa

VERSION = "2"


def _schema(name: str, *fields: tuple[str, pa.DataType]) -> pa.Schema:
    return pa.schema(list(fields), metadata={"raylarge": name, "version": VERSION})


_WHERE = (
    ("slide_id", pa.string()),
    ("patient_id", pa.string()),
    ("split", pa.string()),
    ("scale", pa.int8()),
    ("row", pa.int32()),
    ("column", pa.int32()),
)
_KEY = ("key", pa.uint64())
"""Names a row of EXAMPLES and what is derived from it: `raylarge.data.shard.key`."""
_LABELS = ("labels", pa.map_(pa.string(), pa.string()))
_GRID = (("grid", pa.list_(pa.float16())), ("grid_rows", pa.int32()), ("grid_columns", pa.int32()))

TILES = _schema(
    "tiles",
    *_WHERE,
    ("tissue", pa.float32()),
    ("kept", pa.bool_()),
    ("reason", pa.string()),
)
"""Every candidate example; a rejected one says why in `reason` (empty where kept)."""

EMBEDDINGS = _schema(
    "embeddings",
    ("slide_id", pa.string()),
    ("row", pa.int32()),
    ("columns", pa.int32()),
    ("valid", pa.list_(pa.bool_())),
    ("embedding", pa.list_(pa.float16())),
)
"""One row of the base grid: a raw vector per column, zeros where no kept example covers it
(`valid` is false there)."""

EXAMPLES = _schema(
    "examples",
    _KEY,
    *_WHERE,
    ("tissue", pa.float32()),
    _LABELS,
    ("image", pa.binary()),
    *_GRID,
)
"""One P x P image (PNG or JPEG bytes) with its grid of raw embeddings, pooled to 8 x 8 where
larger, and what the user's table says of its slide."""

LATENTS = _schema(
    "latents",
    _KEY,
    *_WHERE,
    _LABELS,
    ("flip", pa.int8()),
    ("latent", pa.list_(pa.float16())),
    *_GRID,
)
"""An example's latent (channels, rows, columns; flattened) under one autoencoder digest.

`flip`: 0 as it is, 1 columns reversed, 2 rows reversed, 3 both; the image's flip, with the grid
of embeddings turned alike.
"""

CAPTIONS = _schema("captions", _KEY, *_WHERE, ("text", pa.string()))
"""A sentence about an example's image."""

VECTORS = _schema("vectors", _KEY, *_WHERE, ("vector", pa.list_(pa.float32())))
"""A vector that describes an example: of its text, of its image, or the user's own."""

FEATURES = _schema("features", _KEY, *_WHERE, ("feature", pa.list_(pa.float16())))
"""Spatial means of a U-Net block's output for an example's latent at one timestep."""

FAILED = _schema(
    "failed",
    ("slide_id", pa.string()),
    ("verb", pa.string()),
    ("part", pa.string()),
    ("reason", pa.string()),
)
"""What could not be made, and why; names of files do not stand in it."""


def check(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Cast a table to a schema, metadata included.

    Raises:
        pyarrow.ArrowInvalid, KeyError: a column is missing or does not fit.
    """
    return table.select(schema.names).cast(schema).replace_schema_metadata(schema.metadata)
