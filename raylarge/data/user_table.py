"""Read a user's own table of texts or vectors, and match its rows with EXAMPLES.

    key, text | vector        or        slide_id, scale, row, column, text | vector

CSV or parquet. `key` is that of EXAMPLES; without it, it is computed from the example's position.
An empty cell, or one such as `NA`, is a missing value. The index of keys and the row groups read
last stay in memory, so a parquet table may be larger than the memory if its rows have about the
order of EXAMPLES, part by part, in row groups of some thousand rows.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float32, Int64, UInt64

from raylarge import storage
from raylarge.data import user_table_rows
from raylarge.data.shard import key
from raylarge.data.text_table import MISSING, missing_line, refuse_doubled
from raylarge.data.user_table_rows import PLACE
from raylarge.errors import UserError

_READ_TWICE = 50
"""How many times a table larger than the memory may be read before its order is refused."""
Rows = Int64[np.ndarray, " n"]


class UserTable:
    """Texts or vectors of examples from a user's table."""

    def __init__(self, path: str, column: str, vectors: bool) -> None:
        """Index the examples that a table has values for.

        Args:
            path: path or URL of a .csv or .parquet file.
            column: the column with the values.
            vectors: whether that column holds vectors (lists of numbers) or texts.

        Raises:
            UserError: no such table or column, keys that do not fit, an example twice, or a row
                group larger than a worker's memory allows.
        """
        self.path, self.what = path, "vector" if vectors else "text"
        self._column, self._vectors = column, vectors
        self._row_groups = user_table_rows.open_table(path, column, vectors)
        self._missing: Counter[str] = Counter()
        self._place = _place(path, column, self._row_groups.names)
        self._starts: Rows = np.cumsum([0, *self._row_groups.counts]).astype(np.int64)
        self._cache: OrderedDict[int, pa.ChunkedArray] = OrderedDict()
        keys, rows = self._index()
        order = np.argsort(keys, kind="stable")
        self._keys, self._rows = keys[order], rows[order]
        twice = np.flatnonzero(self._keys[1:] == self._keys[:-1])
        if len(twice):
            raise UserError(
                f"{path} has {len(twice) + 1} rows or more for the example of key "
                f"{self._keys[twice[0]]}; keep one."
            )

    def missing_words(self) -> list[str]:
        """Return a line that counts the words read as missing texts; no line if there are none."""
        if not self._missing:
            return []
        count = sum(self._row_groups.counts)
        return [missing_line(self.path, self._column, self._missing, count)]

    def find(self, keys: pa.ChunkedArray) -> Rows:
        """Return the row of each example's key, or -1."""
        searched = keys.to_numpy()
        if not len(self._keys):
            return np.full(len(searched), -1)
        at = np.searchsorted(self._keys, searched).clip(max=len(self._keys) - 1)
        rows: Rows = np.where(self._keys[at] == searched, self._rows[at], -1)
        return rows

    def texts(self, rows: Rows) -> list[str]:
        """Return the texts of rows."""
        texts: list[str] = self._cells_of(rows).to_pylist() if len(rows) else []
        return texts

    def vectors(self, rows: Rows) -> Float32[np.ndarray, "n width"]:
        """Return the vectors of rows.

        Raises:
            UserError: no lists of numbers, several lengths, or numbers that are not finite.
        """
        if not len(rows):
            return np.zeros((0, self._width), np.float32)
        return _matrix(self.path, self._column, self._cells_of(rows), self._width)

    def bytes_of(self, rows: Rows) -> int:
        """Return the bytes to read for rows if none of them is cached."""
        return sum(
            self._row_groups.sizes[group] for group in np.unique(self._groups(rows)).tolist()
        )

    def refuse_order(self, bytes_read: int) -> None:
        """Refuse a table that exceeds the memory and would be read too many times.

        Args:
            bytes_read: total over the parts of EXAMPLES, each read separately.

        Raises:
            UserError: the rows are in another order than the examples.
        """
        size = sum(self._row_groups.sizes)
        if size > user_table_rows.COLUMN_BYTES and bytes_read > _READ_TWICE * size:
            raise UserError(
                f"{self.path} would be read {bytes_read // size} times, for its rows lie in another"
                " order than the examples; write them part by part as examples/*.parquet has them,"
                " with row_group_size=4096."
            )

    @cached_property
    def _width(self) -> int:
        """Return the length of the first vector, which all others must have."""
        if not len(self._rows):
            return 0
        first = self._cells_of(self._rows[:1])
        return _matrix(self.path, self._column, first, None).shape[1]

    def _index(self) -> tuple[UInt64[np.ndarray, " n"], Rows]:
        """Return the keys of rows with a value, and those rows' numbers."""
        keys, rows = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
        for group, start in enumerate(self._starts[:-1].tolist()):
            whole = self._vectors and self._row_groups.whole(group)
            names = self._place if whole else [*self._place, self._column]
            table = self._row_groups.read(group, names)
            at = np.arange(table.num_rows)
            if not whole:
                cells = self._typed(table[self._column])
                present = pc.invert(_is_missing(cells))
                self._count_missing(cells.filter(pc.invert(present)))
                table, at = table.filter(present), at[present.to_numpy()]
            keys.append(_keys(self.path, table.select(self._place)))
            rows.append(start + at)
        return np.concatenate(keys), np.concatenate(rows)

    def _typed(self, cells: pa.ChunkedArray) -> pa.ChunkedArray:
        return cells if self._vectors else _as_strings(self.path, self._column, cells)

    def _count_missing(self, cells: pa.ChunkedArray) -> None:
        """Count the words that mean a missing text."""
        if not self._vectors:
            words = pc.utf8_trim_whitespace(cells.drop_null()).to_pylist()
            self._missing.update(word for word in words if word)

    def _groups(self, rows: Rows) -> Rows:
        return np.asarray(np.searchsorted(self._starts, rows, side="right") - 1)

    def _cells_of(self, rows: Rows) -> pa.Array:
        """Return the cells of rows; each row group is read once."""
        groups, pieces, came = self._groups(rows), [], []
        for group in np.unique(groups).tolist():
            at = np.flatnonzero(groups == group)
            cells = self._values(group).take(pa.array(rows[at] - self._starts[group]))
            pieces += cells.chunks
            came.append(at)
        back = np.argsort(np.concatenate(came))
        return pa.concat_arrays(pieces).take(pa.array(back))

    def _values(self, group: int) -> pa.ChunkedArray:
        """Return the column's cells of a row group, through a cache of the latest ones."""
        if group not in self._cache:
            cells = self._row_groups.read(group, [self._column])[self._column]
            self._cache[group] = self._typed(cells)
        self._cache.move_to_end(group)
        while (
            len(self._cache) > 1
            and sum(o.nbytes for o in self._cache.values()) > user_table_rows.COLUMN_BYTES
        ):
            self._cache.popitem(last=False)
        return self._cache[group]


def _as_strings(path: str, column: str, cells: pa.ChunkedArray) -> pa.ChunkedArray:
    try:
        return cells.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"{path}: column '{column}' holds no texts: {error}.") from error


def split_column(words: str) -> tuple[str, str]:
    """Return a table's path and its column from `path.parquet:column`.

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
    """Return a digest of a table's content.

    Raises:
        UserError: the file does not exist.
    """
    try:
        return storage.digest_file(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; check the path.") from error


def _place(path: str, column: str, names: Sequence[str]) -> list[str]:
    """Return the columns that identify the example of a row."""
    there = ", ".join(names)
    refuse_doubled(path, names)
    if column not in names:
        raise UserError(f"{path} has no column '{column}', but {there}.")
    place = ["key"] if "key" in names else list(PLACE)
    if not set(place) <= set(names):
        raise UserError(
            f"{path} does not say which example a row is about: give it a column key, or columns "
            f"{', '.join(PLACE)}; it has {there}."
        )
    return place


def _keys(path: str, table: pa.Table) -> UInt64[np.ndarray, " n"]:
    """Return the keys of the rows' examples."""
    place = table.column_names
    types: dict[str, pa.DataType] = {"key": pa.uint64(), **PLACE}
    try:
        cells = [table[name].cast(types[name]) for name in place]
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"{path}: {', '.join(place)} do not fit: {error}.") from error
    if any(cell.null_count for cell in cells):
        raise UserError(f"{path} has empty cells among {', '.join(place)}; fill them.")
    if place == ["key"]:
        keys: UInt64[np.ndarray, " n"] = cells[0].to_numpy()
        return keys
    rows = zip(*(cell.to_pylist() for cell in cells), strict=True)
    return np.array([key(*row) for row in rows], np.uint64)


def _is_missing(column: pa.ChunkedArray) -> Any:
    """Return a mask of missing cells: null, a word in `MISSING`, or an empty list."""
    if pa.types.is_string(column.type):
        text = pc.utf8_lower(pc.utf8_trim_whitespace(column))
        return pc.or_kleene(pc.is_null(column), pc.is_in(text, pa.array(sorted(MISSING))))
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        length = pc.list_value_length(column)
    else:
        return pc.is_null(column)
    return pc.fill_null(pc.equal(length, 0), True)


def _matrix(
    path: str, column: str, values: pa.Array, width: int | None
) -> Float32[np.ndarray, "n width"]:
    """Return lists of numbers as one array; all have one length: `width`, if it is passed."""
    whose = f"{path}: column '{column}'"
    if not hasattr(values.type, "value_type"):
        raise UserError(f"{whose} holds {values.type}, no vectors; give lists of numbers.")
    lengths = {*pc.unique(pc.list_value_length(values)).to_pylist()}
    lengths |= set() if width is None else {width}
    if len(lengths) > 1:
        raise UserError(f"{whose} holds vectors of lengths {sorted(lengths)[:5]}; give one length.")
    try:
        flat = pc.list_flatten(values).cast(pa.float32(), safe=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"{whose} holds no numbers: {error}.") from error
    matrix = flat.to_numpy(zero_copy_only=False).reshape(len(values), *lengths)
    broken = int((~np.isfinite(matrix)).any(axis=1).sum())
    if broken:
        raise UserError(f"{whose}: {broken} vectors have values that are not finite; mend them.")
    return matrix
