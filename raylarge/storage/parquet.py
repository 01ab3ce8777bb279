"""Parquet files: written whole and the same each time, read whole or by row groups.

Pages carry checksums, so a flipped bit is an error and no embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from raylarge.errors import UserError
from raylarge.storage import objects
from raylarge.storage.files import read_bytes, write_bytes
from raylarge.storage.patience import Unmet, is_local, on_disk

T = TypeVar("T")


def read_table(path: str, columns: Iterable[str] | None = None) -> pa.Table:
    """One parquet file.

    Raises:
        UserError: nothing stands at the path, it is damaged, or it lacks a column.
    """
    content = pa.BufferReader(read_bytes(path))
    return _read(path, content, lambda file: _rows(path, file, None, columns))


def read_rows(path: str, groups: Sequence[int], columns: Iterable[str] | None = None) -> pa.Table:
    """Some row groups of a parquet file, in the order given; nothing else of it is fetched.

    Raises:
        UserError: nothing stands at the path, it is damaged, or it lacks a group or a column.
    """
    wanted = None if columns is None else list(columns)
    return _open(path, lambda file: _rows(path, file, list(groups), wanted))


def read_metadata(path: str) -> dict[bytes, bytes]:
    """The metadata of a parquet file's schema; only its footer is fetched.

    Raises:
        UserError: nothing stands at the path, or it is damaged.
    """
    return _open(path, lambda file: dict(file.schema_arrow.metadata or {}))


def write_table(path: str, table: pa.Table, row_groups: Sequence[int] | None = None) -> None:
    """Write one parquet file atomically; the same table makes the same bytes.

    Args:
        path: where.
        table: however it is chunked.
        row_groups: how many rows each row group holds, one after the other; None leaves it to
            pyarrow (a million).

    Raises:
        ValueError: the row groups do not make up the table.
    """
    table = table.combine_chunks()  # pages end where chunks end
    if row_groups is not None and (
        min(row_groups, default=1) < 1 or sum(row_groups) != table.num_rows
    ):
        raise ValueError(f"row groups {list(row_groups)} do not make up {table.num_rows} rows")
    sink = pa.BufferOutputStream()
    options: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}
    with pq.ParquetWriter(sink, table.schema, **options) as writer:
        if row_groups is None:
            writer.write_table(table)
        start = 0
        for rows in row_groups or ():
            writer.write_table(table.slice(start, rows), rows)
            start += rows
    write_bytes(path, sink.getvalue().to_pybytes())


def _open(path: str, action: Callable[[pq.ParquetFile], T]) -> T:
    """What an action finds in a file that is read in ranges, all of one version."""
    try:
        if is_local(path):
            with on_disk(path), Path(path.removeprefix("file://")).open("rb") as source:
                return _read(path, source, action)
        for _ in range(objects.TRIES):
            with suppress(Unmet):
                return _read(path, objects.Ranges(path), action)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; check the path.") from error
    raise objects.changing(path)


def _read(path: str, source: Any, action: Callable[[pq.ParquetFile], T]) -> T:
    try:
        with pq.ParquetFile(source, pre_buffer=True, page_checksum_verification=True) as file:
            return action(file)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of the file
            raise
        raise UserError(
            f"{path} is no parquet file that can be read ({str(error).splitlines()[0]}): it is "
            f"damaged or cut short; copy it again, or remove it and run what wrote it."
        ) from error


def _rows(
    path: str, file: pq.ParquetFile, groups: list[int] | None, columns: Iterable[str] | None
) -> pa.Table:
    names = None if columns is None else list(columns)
    for name in names or ():
        if name not in file.schema_arrow.names:
            raise UserError(f"{path} has no column {name}; run what wrote it again.")
    for group in groups or ():
        if not 0 <= group < file.num_row_groups:
            raise UserError(
                f"{path} has {file.num_row_groups} row groups and no number {group}; run what "
                f"wrote it again."
            )
    if groups is None:
        table = file.read(columns=names)
    else:
        table = file.read_row_groups(groups, columns=names)
    return table if names is None else table.select(names)
