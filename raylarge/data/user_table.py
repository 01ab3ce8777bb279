"""A user's own table of texts or vectors, matched with EXAMPLES.

    key, text | vector        or        slide_id, scale, row, column, text | vector

CSV or parquet. `key` is that of EXAMPLES; without it, it is computed of where an example lies.
A cell that is empty, or says `NA` or the like, says nothing of its example. An index of the keys
is held, and the row groups that were asked for last: a parquet table may be larger than the memory
if its rows lie about as those of EXAMPLES do, part by part, in row groups of some thousand rows.
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
"""How often a table that does not fit may be read, before its order counts as wrong."""
Rows = Int64[np.ndarray, "n"]


class UserTable:
    """What a user's table says of examples."""

    def __init__(self, path: str, column: str, vectors: bool) -> None:
        """Read which examples a table is about.

        Args:
            path: of a .csv or .parquet; a path or a URL.
            column: which column says it.
            vectors: whether that column holds vectors (lists of numbers) or texts.

        Raises:
            UserError: no such table or column, keys that do not fit, an example twice, or more to
                be read at a time than a worker holds.
        """
        self.path, self.what = path, "vector" if vectors else "text"
        self._column, self._vectors = column, vectors
        self._source = user_table_rows.open_table(path, column, vectors)
        self._missing: Counter[str] = Counter()
        self._place = _place(path, column, self._source.names)
        self._starts: Rows = np.cumsum([0, *self._source.counts]).astype(np.int64)
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
        """A line that says which words stood for no text, and how often; none where none did."""
        if not self._missing:
            return []
        count = sum(self._source.counts)
        return [missing_line(self.path, self._column, self._missing, count)]

    def find(self, keys: pa.ChunkedArray) -> Rows:
        """For each example's key its row here, or -1."""
        wanted = keys.to_numpy()
        if not len(self._keys):
            return np.full(len(wanted), -1)
        at = np.searchsorted(self._keys, wanted).clip(max=len(self._keys) - 1)
        found: Rows = np.where(self._keys[at] == wanted, self._rows[at], -1)
        return found

    def texts(self, rows: Rows) -> list[str]:
        """What rows say."""
        found: list[str] = self._taken(rows).to_pylist() if len(rows) else []
        return found

    def vectors(self, rows: Rows) -> Float32[np.ndarray, "n width"]:
        """What rows say.

        Raises:
            UserError: no lists of numbers, several lengths, or numbers that are not finite.
        """
        if not len(rows):
            return np.zeros((0, self._width), np.float32)
        return _matrix(self.path, self._column, self._taken(rows), self._width)

    def bytes_of(self, rows: Rows) -> int:
        """What is to be read for rows, none of which is at hand."""
        return sum(self._source.sizes[group] for group in np.unique(self._groups(rows)).tolist())

    def refuse_order(self, bytes_read: int) -> None:
        """Refuse a table that does not fit and is read again and again.

        Args:
            bytes_read: for all parts of EXAMPLES, each for itself.

        Raises:
            UserError: with the cure.
        """
        size = sum(self._source.sizes)
        if size > user_table_rows.HELD_BYTES and bytes_read > _READ_TWICE * size:
            raise UserError(
                f"{self.path} would be read {bytes_read // size} times, for its rows lie in another"
                " order than the examples; write them part by part as examples/*.parquet has them,"
                " with row_group_size=4096."
            )

    @cached_property
    def _width(self) -> int:
        """Of all vectors: that of one of them, the same one for every worker."""
        one = self._rows[:1]
        return _matrix(self.path, self._column, self._taken(one), None).shape[1] if len(one) else 0

    def _index(self) -> tuple[UInt64[np.ndarray, " n"], Rows]:
        """Keys of the rows that say something, and where those rows are."""
        keys, rows = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
        for group, start in enumerate(self._starts[:-1].tolist()):
            whole = self._vectors and self._source.whole(group)
            names = self._place if whole else [*self._place, self._column]
            table = self._source.read(group, names)
            at = np.arange(table.num_rows)
            if not whole:
                cells = self._as_wanted(table[self._column])
                says = pc.invert(_says_nothing(cells))
                self._count_missing(cells.filter(pc.invert(says)))
                table, at = table.filter(says), at[says.to_numpy()]
            keys.append(_keys(self.path, table.select(self._place)))
            rows.append(start + at)
        return np.concatenate(keys), np.concatenate(rows)

    def _count_missing(self, cells: pa.ChunkedArray) -> None:
        """Count the words among texts that say nothing."""
        if not self._vectors:
            words = pc.utf8_trim_whitespace(cells.drop_null()).to_pylist()
            self._missing.update(word for word in words if word)

    def _groups(self, rows: Rows) -> Rows:
        found: Rows = np.searchsorted(self._starts, rows, side="right") - 1
        return found

    def _taken(self, rows: Rows) -> pa.Array:
        """The cells of rows, each row group read once."""
        groups, pieces, came = self._groups(rows), [], []
        for group in np.unique(groups).tolist():
            at = np.flatnonzero(groups == group)
            taken = self._values(group).take(pa.array(rows[at] - self._starts[group]))
            pieces += taken.chunks
            came.append(at)
        back = np.argsort(np.concatenate(came))
        return pa.concat_arrays(pieces).take(pa.array(back))

    def _values(self, group: int) -> pa.ChunkedArray:
        """The column's cells of a row group; those that were asked for last stay at hand."""
        if group not in self._cache:
            cells = self._source.read(group, [self._column])[self._column]
            self._cache[group] = self._as_wanted(cells)
        self._cache.move_to_end(group)
        while (
            len(self._cache) > 1
            and sum(o.nbytes for o in self._cache.values()) > user_table_rows.HELD_BYTES
        ):
            self._cache.popitem(last=False)
        return self._cache[group]

    def _as_wanted(self, cells: pa.ChunkedArray) -> pa.ChunkedArray:
        if self._vectors:
            return cells
        try:
            return cells.cast(pa.string())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            whose = f"{self.path}: column '{self._column}'"
            raise UserError(f"{whose} holds no texts: {error}.") from error


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


def _place(path: str, column: str, names: Sequence[str]) -> list[str]:
    """The columns that say which example a row is about."""
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
    """The keys of the examples that rows are about."""
    place = table.column_names
    types: dict[str, pa.DataType] = {"key": pa.uint64(), **PLACE}
    try:
        cells = [table[name].cast(types[name]) for name in place]
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"{path}: {', '.join(place)} do not fit: {error}.") from error
    if any(cell.null_count for cell in cells):
        raise UserError(f"{path} has empty cells among {', '.join(place)}; fill them.")
    if place == ["key"]:
        found: UInt64[np.ndarray, " n"] = cells[0].to_numpy()
        return found
    rows = zip(*(cell.to_pylist() for cell in cells), strict=True)
    return np.array([key(*row) for row in rows], np.uint64)


def _says_nothing(column: pa.ChunkedArray) -> Any:
    """Where a cell is empty: null, a word for no value (`MISSING`), or a list without numbers."""
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
    """Lists of numbers as one array; of one length, the given one if any."""
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
    found = flat.to_numpy(zero_copy_only=False).reshape(len(values), *lengths)
    broken = int((~np.isfinite(found)).any(axis=1).sum())
    if broken:
        raise UserError(f"{whose}: {broken} vectors have values that are not finite; mend them.")
    return found
