"""The Arrow schema, with a version, of every table that one verb writes and the next reads.

    slide -tile-> TILES -embed-> EMBEDDINGS -shard-> EXAMPLES -encode-> LATENTS

`row` and `column` are always cells of the base-tile grid (`x_tok` of ARCHITECTURE.md): an
example at scale k covers the 2**k x 2**k base tiles from (row, column). Embeddings are raw,
as the encoder gave them, in row-major order; normalising belongs to the model that reads them.
"""

from __future__ import annotations

import pyarrow as pa

VERSION = "1"


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
    ("column", pa.int32()),
    ("embedding", pa.list_(pa.float16())),
)
"""One raw vector per base tile that any kept example covers."""

EXAMPLES = _schema(
    "examples",
    *_WHERE,
    ("tissue", pa.float32()),
    ("image", pa.binary()),
    ("grid", pa.list_(pa.float16())),
    ("grid_rows", pa.int32()),
    ("grid_columns", pa.int32()),
)
"""One P x P image (PNG bytes) with its grid of raw embeddings, pooled to 8 x 8 where larger."""

LATENTS = _schema(
    "latents",
    *_WHERE,
    ("latent", pa.list_(pa.float16())),
    ("grid", pa.list_(pa.float16())),
    ("grid_rows", pa.int32()),
    ("grid_columns", pa.int32()),
)
"""An example's latent (channels, rows, columns; flattened) under one autoencoder digest."""


def check(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Cast a table to a schema, metadata included.

    Raises:
        pyarrow.ArrowInvalid, KeyError: a column is missing or does not fit.
    """
    return table.select(schema.names).cast(schema).replace_schema_metadata(schema.metadata)
