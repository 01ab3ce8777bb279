"""A user's own table of texts or vectors, matched with EXAMPLES.

    key, text | vector        or        slide_id, scale, row, column, text | vector

CSV or parquet. `key` is that of EXAMPLES; without it, it is computed of where an example lies.
A cell that is empty says nothing of its example.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from jaxtyping import Float32, Int

from raylarge import storage
from raylarge.data.shard import key
from raylarge.errors import UserError

_PLACE = {
    "slide_id": pa.string(),
    "scale": pa.int64(),
    "row": pa.int64(),
    "column": pa.int64(),
}


class Given:
    """What a user's table says of examples."""

    def __init__(self, path: str, column: str, vectors: bool) -> None:
        """Read a table.

        Args:
            path: of a .csv or .parquet; a path or a URL.
            column: which column says it.
            vectors: whether that column holds vectors (lists of numbers) or texts.

        Raises:
            UserError: no such table or column, values that do not fit, or an example twice.
        """
        self.path, self.what = path, "vector" if vectors else "text"
        keys, values = _columns(path, column, vectors)
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]
        twice = np.flatnonzero(self._keys[1:] == self._keys[:-1])
        if len(twice):
            raise UserError(
                f"{path} has {len(twice) + 1} rows or more for the example of key "
                f"{self._keys[twice[0]]}; keep one."
            )
        self.values = values
        self.vectors = _matrix(path, column, values) if vectors else np.zeros((0, 0), np.float32)

    def find(self, keys: pa.ChunkedArray) -> Int[np.ndarray, "n"]:
        """For each example's key its row here, or -1."""
        wanted = keys.to_numpy()
        if not len(self._keys):
            return np.full(len(wanted), -1)
        at = np.searchsorted(self._keys, wanted).clip(max=len(self._keys) - 1)
        found: np.ndarray = np.where(self._keys[at] == wanted, self._order[at], -1)
        return found


def split_column(words: str) -> tuple[str, str]:
    """A table's path and its column out of `path.parquet:column`.

    Raises:
        UserError: no column is named.
    """
    path, _, column = words.rpartition(":")
    if not path or not column or "/" in column:
        raise UserError(
            f"text_embed.vectors={words} names no column; give vectors=table.parquet:column."
        )
    return path, column


def source_of(path: str) -> str:
    """A short name for a table's content.

    Raises:
        UserError: nothing stands at the path.
    """
    try:
        return storage.digest_file(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; check the path.") from error


def _columns(path: str, column: str, vectors: bool) -> tuple[np.ndarray, pa.Array]:
    """Keys and values of the rows that say something."""
    table = _read(path, column, vectors)
    if column not in table.column_names:
        raise UserError(f"{path} has no column '{column}', but {_names(table)}.")
    place = ["key"] if "key" in table.column_names else list(_PLACE)
    if not set(place) <= set(table.column_names):
        raise UserError(
            f"{path} does not say which example a row is about: give it a column key, or columns "
            f"{', '.join(_PLACE)}; it has {_names(table)}."
        )
    table = table.select([*place, column])
    table = table.filter(pc.invert(_says_nothing(table[column])))
    types: dict[str, pa.DataType] = {"key": pa.uint64(), **_PLACE}
    try:
        cells = [table[name].cast(types[name]) for name in place]
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"{path}: {', '.join(place)} do not fit: {error}.") from error
    if any(cell.null_count for cell in cells):
        raise UserError(f"{path} has empty cells among {', '.join(place)}; fill them.")
    values = table[column].combine_chunks()
    values = pa.concat_arrays(values.chunks) if isinstance(values, pa.ChunkedArray) else values
    if place == ["key"]:
        return cells[0].to_numpy(), values
    rows = zip(*(cell.to_pylist() for cell in cells), strict=True)
    return np.array([key(*row) for row in rows], np.uint64), values


def _read(path: str, column: str, vectors: bool) -> pa.Table:
    if path.endswith(".parquet"):
        table = storage.read_table(path)
    elif vectors:
        raise UserError(f"{path}: vectors come from a .parquet table.")
    else:
        # Without types the reader takes keys above 2**63 for floats, and loses their last digits.
        types = {"key": pa.uint64(), **_PLACE, column: pa.string()}
        options = pyarrow.csv.ConvertOptions(column_types=types)
        parsing = pyarrow.csv.ParseOptions(newlines_in_values=True)
        try:
            table = pyarrow.csv.read_csv(
                pa.BufferReader(storage.read_bytes(path)),
                parse_options=parsing,
                convert_options=options,
            )
        except pa.ArrowInvalid as error:
            raise UserError(f"{path} is no CSV table that fits: {error}.") from error
    if vectors or column not in table.column_names:
        return table
    try:
        words = table[column].cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"{path}: column '{column}' holds no texts: {error}.") from error
    return table.set_column(table.column_names.index(column), column, words)


def _says_nothing(column: pa.ChunkedArray) -> Any:
    """Where a cell is empty: null, a text of spaces, or a list without numbers."""
    if pa.types.is_string(column.type):
        length = pc.utf8_length(pc.utf8_trim_whitespace(column))
    elif pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        length = pc.list_value_length(column)
    else:
        return pc.is_null(column)
    return pc.fill_null(pc.equal(length, 0), True)


def _matrix(path: str, column: str, values: pa.Array) -> Float32[np.ndarray, "n width"]:
    """Lists of numbers of one length as one array.

    Raises:
        UserError: no lists of numbers, several lengths, or numbers that are not finite.
    """
    whose = f"{path}: column '{column}'"
    if not hasattr(values.type, "value_type"):
        raise UserError(f"{whose} holds {values.type}, no vectors; give lists of numbers.")
    lengths = pc.unique(pc.list_value_length(values)).to_pylist()
    if len(lengths) > 1:
        raise UserError(f"{whose} holds vectors of lengths {sorted(lengths)[:5]}; give one length.")
    try:
        flat = pc.list_flatten(values).cast(pa.float32(), safe=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"{whose} holds no numbers: {error}.") from error
    found = flat.to_numpy(zero_copy_only=False).reshape(len(values), lengths[0] if lengths else 0)
    broken = int((~np.isfinite(found)).any(axis=1).sum())
    if broken:
        raise UserError(f"{whose}: {broken} vectors have values that are not finite; mend them.")
    return found


def _names(table: pa.Table) -> str:
    return ", ".join(table.column_names)
