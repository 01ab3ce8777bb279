"""A user's table in groups of rows: a parquet's row groups, or a whole CSV."""

from __future__ import annotations

import csv
import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from raylarge import storage
from raylarge.data import text_table
from raylarge.errors import UserError

COLUMN_BYTES = 1 << 30
"""Of a column, held by each worker. What is read at a time must fit: a row group, or a CSV."""
PLACE = {
    "slide_id": pa.string(),
    "scale": pa.int64(),
    "row": pa.int64(),
    "column": pa.int64(),
}
"""What says where an example lies; its key is a hash of it."""


class RowGroups(ABC):
    """A table in groups of rows."""

    names: list[str]
    counts: list[int]
    """Rows of each group."""
    sizes: list[int]
    """Bytes (about) of the column in each group."""

    @abstractmethod
    def read(self, group: int, names: Sequence[str]) -> pa.Table:
        """Some columns of a group."""

    @abstractmethod
    def whole(self, group: int) -> bool:
        """Whether it is known without a look that no list of the column is empty."""


def open_table(path: str, column: str, vectors: bool) -> RowGroups:
    """A user's table.

    Raises:
        UserError: none there, or more to be read at a time than a worker holds.
    """
    if path.endswith(".parquet"):
        return _Parquet(path, column)
    if vectors:
        raise UserError(f"{path}: vectors come from a .parquet table.")
    return _Csv(path, column)


class _Parquet(RowGroups):
    """A parquet table, of which only the footer is read at once."""

    def __init__(self, path: str, column: str) -> None:
        self._path = path
        footer = _footer(path)
        self.names = footer.schema.to_arrow_schema().names
        groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
        self.counts = [group.num_rows for group in groups]
        leaves = [i for i, name in enumerate(_leaves(footer)) if name.split(".")[0] == column]
        self.sizes = [sum(g.column(i).total_uncompressed_size for i in leaves) for g in groups]
        statistics = [[g.column(i).statistics for i in leaves] for g in groups]
        # A list without numbers counts as one number that is null.
        self._whole = [
            all(one is not None and one.has_null_count and not one.null_count for one in group)
            for group in statistics
        ]
        if max(self.sizes, default=0) > COLUMN_BYTES:
            raise UserError(
                f"{path} has a row group with {max(self.sizes) / 1e9:.1f} GB of {column}; write it "
                "with smaller ones (row_group_size=4096), in the order of examples/*.parquet."
            )

    def read(self, group: int, names: Sequence[str]) -> pa.Table:
        return storage.read_rows(self._path, [group], names)

    def whole(self, group: int) -> bool:
        return self._whole[group]


def _footer(path: str) -> Any:
    def read(fs: Any, root: str) -> Any:
        with fs.open(root, "rb") as file:
            return pq.read_metadata(file)

    try:
        return storage.with_retries(path, read)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; check the path.") from error
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} is no parquet table: {error}.") from error


def _leaves(footer: Any) -> list[str]:
    return [footer.schema.column(i).path for i in range(footer.num_columns)]


def _arrow_buffer(content: bytes) -> pa.Buffer:
    """Bytes in Arrow's own memory.

    A thread of Arrow's reader may be the last to let go of its input. While the interpreter
    ends, letting go of a Python object would abort the process; this is none.
    """
    buffer = pa.allocate_buffer(len(content))
    np.frombuffer(buffer, np.uint8)[:] = np.frombuffer(content, np.uint8)
    return buffer


def _refuse_broken(path: str, content: bytes) -> None:
    """Refuse a quote that is never closed: Arrow takes all lines that follow for one cell.

    Raises:
        UserError: naming the line.
    """
    lines = io.TextIOWrapper(io.BytesIO(content), errors="replace", newline="")
    reader = csv.reader(lines, strict=True)
    try:
        for _ in reader:
            pass
    except csv.Error as error:
        raise text_table.broken(path, error, reader.line_num) from error


class _Csv(RowGroups):
    """A CSV table, read whole."""

    def __init__(self, path: str, column: str) -> None:
        size = storage.with_retries(path, lambda fs, root: int(fs.size(root)))
        if size > COLUMN_BYTES:
            raise UserError(f"{path} has {size / 1e9:.1f} GB; save it as .parquet.")
        # Without types the reader takes keys above 2**63 for floats, and loses their last digits.
        types = {"key": pa.uint64(), **PLACE, column: pa.string()}
        options = pyarrow.csv.ConvertOptions(column_types=types)
        parsing = pyarrow.csv.ParseOptions(newlines_in_values=True)
        whole = storage.read_bytes(path)
        _refuse_broken(path, whole)
        content = pa.BufferReader(_arrow_buffer(whole))
        try:
            self._table = pyarrow.csv.read_csv(
                content, parse_options=parsing, convert_options=options
            )
        except pa.ArrowInvalid as error:
            raise UserError(f"{path} is no CSV table that fits: {error}.") from error
        self.names = self._table.column_names
        self.counts, self.sizes = [self._table.num_rows], [size]

    def read(self, group: int, names: Sequence[str]) -> pa.Table:
        return self._table.select(list(names))

    def whole(self, group: int) -> bool:
        return False
