"""Read tables through the manifest of the verb that wrote them.

The manifest lists the parts of a table, so parts of an unfinished run or of a removed slide are
ignored. Rows have one canonical order, which does not depend on how the parts were cut.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raylarge import schema, storage
from raylarge.errors import UserError

VERBS = {
    "tiles": "tile",
    "embeddings": "embed",
    "examples": "shard",
    "latents": "encode",
    "captions": "caption",
    "vectors": "text_embed",
    "features": "features",
}
KEYS = ("scale", "slide_id", "row", "column", "flip")


def verb(name: str) -> str:
    """Return the verb that writes a table, with the table's suffix: encode-<digest>."""
    table, *rest = name.split("-", 1)
    return "-".join([VERBS[table], *rest])


def manifest(root: str, name: str) -> dict[str, Any]:
    """Return the manifest of a table: what its verb wrote when it had finished.

    Args:
        root: the data folder; a path or an `s3://` URL.
        name: tiles, embeddings, examples, latents-<digest> and so on (`VERBS`).

    Raises:
        UserError: the manifest is missing or damaged.
    """
    if not (document := read_manifest(root, verb(name), name)):
        more = " verbs=encode bundle=..." if name.startswith("latents") else ""
        raise UserError(
            f"{storage.join(root, verb(name))}.json is missing, so there are no {name} yet; run "
            f"python jobs/prepare.py out={root}{more} first."
        )
    return document


def read_manifest(root: str, verb: str, name: str = "") -> dict[str, Any]:
    """Return what a verb wrote when it had finished; nothing where it has not.

    Args:
        root: the data folder.
        verb: tile, embed, shard, encode-<digest> and so on.
        name: of the table, for messages.

    Raises:
        UserError: the file is no manifest.
    """
    path = storage.join(root, f"{verb}.json")
    if not storage.exists(path):
        return {}
    document: dict[str, Any] = storage.read_json(path)
    if not _is_manifest(document):
        raise UserError(
            f"{path} does not list the parts of {name or 'its table'}: it is damaged, or of "
            f"another program; run python jobs/prepare.py out={root} again."
        )
    return document


def _is_manifest(document: Any) -> bool:
    """Return whether a document is a manifest, as far as those of all tables are alike."""
    parts = document.get("parts") if isinstance(document, dict) else None
    if not isinstance(parts, list):
        return False
    return all(isinstance(one, dict) and isinstance(one.get("part"), str) for one in parts)


def rows(
    root: str, name: str, split: str | None = None, columns: Iterable[str] | None = None
) -> pa.Table:
    """Return the rows of a table (of one split, unless None) by scale, slide, row and column.

    Raises:
        UserError: no such table, none of its rows is of the split, or a part does not fit.
    """
    listing = manifest(root, name)
    parts = [
        part
        for part in listing["parts"]
        if split is None or any(by.get(split) for by in part["counts"].values())
    ]
    if not parts:
        raise UserError(
            f"none of the {listing['rows']} rows that {listing['verb']} made in {root} is of the "
            f"split '{split}'; prepare more slides, or hold out fewer."
        )
    kind = getattr(schema, name.split("-", 1)[0].upper())
    required = set(kind.names if columns is None else columns) | {"split", *KEYS}
    some = [column for column in kind.names if column in required]
    table = pa.concat_tables([_checked(root, part, kind, some) for part in parts])
    if split is not None:
        table = table.filter(pc.equal(table["split"], split))
    keys = [(key, "ascending") for key in KEYS if key in table.column_names]
    table = table.take(pc.sort_indices(table, sort_keys=keys))
    return (table if columns is None else table.select(list(columns))).combine_chunks()


def lists(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Return all values of a list column end to end, and the offset of each row."""
    array = column.combine_chunks()
    array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
    return array.values.to_numpy(zero_copy_only=False), array.offsets.to_numpy()


def dense(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Return rows of EMBEDDINGS as a grid: valid cells [r, c], and vectors [r, c, C]."""
    columns = table["columns"][0].as_py()
    valid = lists(table["valid"])[0].reshape(table.num_rows, columns)
    return valid, lists(table["embedding"])[0].reshape(table.num_rows, columns, -1)


def check_part(path: str, metadata: Mapping[bytes, bytes], part: Mapping[str, Any]) -> None:
    """Raise if a part is not the one that the manifest lists.

    Args:
        path: path of the part.
        metadata: the metadata of its schema.
        part: its entry in the manifest.

    Raises:
        UserError: it is of another version, or was replaced.
    """
    version = metadata.get(b"version", b"?").decode()
    if version != schema.VERSION:
        raise UserError(
            f"{path} is of version {version}, not {schema.VERSION}; prepare the data again."
        )
    if json.loads(metadata.get(b"facts", b"{}")).get("stamp") != part.get("stamp"):
        raise UserError(f"{path} was made anew since its table was whole; prepare it again.")


def _checked(root: str, part: dict[str, Any], kind: pa.Schema, columns: list[str]) -> pa.Table:
    """Return columns of a part; raise if it is not the one that the manifest lists."""
    path = storage.join(root, part["part"])
    table = storage.read_table(path, columns)
    check_part(path, table.schema.metadata or {}, part)
    return fitting(path, table, kind, columns)


def fitting(path: str, table: pa.Table, kind: pa.Schema, columns: Sequence[str]) -> pa.Table:
    """Return columns of a part, cast to the types of its schema.

    Raises:
        UserError: one is missing, or cannot be cast.
    """
    fields = pa.schema([kind.field(name) for name in columns], metadata=kind.metadata)
    try:
        return schema.check(table, fields)
    except (KeyError, pa.ArrowException) as error:
        raise UserError(f"{path} does not fit: {error}; prepare the data again.") from error
