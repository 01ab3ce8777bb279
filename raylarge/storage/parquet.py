"""Write parquet files with reproducible bytes; read them completely or by row groups.

Pages carry checksums, so that a flipped bit is an error, never an embedding. Readers raise
`UserError` if the file does not exist, is damaged, or lacks a row group or a column.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from raylarge.errors import UserError
from raylarge.storage import objects
from raylarge.storage.files import missing, read_bytes, write_bytes
from raylarge.storage.folders import absolute
from raylarge.storage.retry import PreconditionFailed, disk_errors, is_local

FOOTER_BYTES = 64 << 10
"""Fetched by the first request for a footer; a larger footer takes one request more."""
COMPRESSED = "image"
"""A column of PNG or JPEG files, which no codec makes smaller."""
T = TypeVar("T")


def read_table(path: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Return the table of a parquet file."""
    content = pa.BufferReader(read_bytes(path))
    return _read(path, content, lambda file: _rows(path, file, None, columns))


def read_rows(path: str, groups: Sequence[int], columns: Sequence[str] | None = None) -> pa.Table:
    """Return some row groups of a parquet file, in the order of `groups`; fetch nothing else."""

    def read(source: Any) -> pa.Table:
        return _read(path, source, lambda file: _rows(path, file, groups, columns))

    try:
        if is_local(path):
            with disk_errors(path), Path(absolute(path)).open("rb") as source:
                return read(source)
        for _ in range(objects.TRIES):
            with suppress(PreconditionFailed):
                return read(objects.Ranges(path))
    except FileNotFoundError as error:
        raise missing(path) from error
    raise objects.changing(path)


def read_metadata(path: str) -> dict[bytes, bytes]:
    """Return the metadata of a parquet file's schema; fetch its footer alone."""
    try:
        footer = pa.BufferReader(_footer(path, FOOTER_BYTES))
    except FileNotFoundError as error:
        raise missing(path) from error
    return _read(path, footer, lambda file: dict(file.schema_arrow.metadata or {}))


def write_table(path: str, table: pa.Table, row_groups: Sequence[int] | None = None) -> None:
    """Write one parquet file atomically; equal tables give equal bytes, however they are chunked.

    Args:
        path: a path or URL.
        table: the rows.
        row_groups: the number of rows of each row group, in order; None leaves it to pyarrow.

    Raises:
        ValueError: the row groups do not add up to the table.
    """
    table = table.combine_chunks()  # pages end where chunks end
    if row_groups is not None and (
        min(row_groups, default=1) < 1 or sum(row_groups) != table.num_rows
    ):
        raise ValueError(f"row groups {list(row_groups)} do not make up {table.num_rows} rows")
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema, write_page_checksum=True, **_coding(table)) as writer:
        if row_groups is None:
            writer.write_table(table)
        start = 0
        for rows in row_groups or ():
            writer.write_table(table.slice(start, rows), rows)
            start += rows
    write_bytes(path, memoryview(sink.getvalue()))


def _coding(table: pa.Table) -> dict[str, Any]:
    """Return each column's coding: zstd except for COMPRESSED, dictionaries for strings alone.

    Other values rarely repeat, and a writer that looks for repetitions takes three times as long.
    """
    sink = pa.BufferOutputStream()
    pq.write_table(table.schema.empty_table(), sink)  # only parquet knows its columns' paths
    schema = pq.ParquetFile(pa.BufferReader(sink.getvalue())).schema
    columns = [schema.column(number) for number in range(len(schema))]
    return {
        "compression": {c.path: "none" if c.path == COMPRESSED else "zstd" for c in columns},
        "use_dictionary": [c.path for c in columns if c.logical_type.type == "STRING"],
    }


def _footer(path: str, size: int) -> bytes:
    """Return the end of a parquet file with its complete footer, by one or two requests."""
    content = objects.tail(path, size)
    needed = int.from_bytes(content[-8:-4], "little") + 8
    if content[-4:] == b"PAR1" and needed > len(content) == size:
        return _footer(path, needed)
    return content


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
    path: str, file: pq.ParquetFile, groups: Sequence[int] | None, columns: Sequence[str] | None
) -> pa.Table:
    for name in columns or ():
        if name not in file.schema_arrow.names:
            raise UserError(f"{path} has no column {name}; run what wrote it again.")
    groups = range(file.num_row_groups) if groups is None else groups
    for group in groups:
        if not 0 <= group < file.num_row_groups:
            raise UserError(
                f"{path} has {file.num_row_groups} row groups and no number {group}; run what "
                f"wrote it again."
            )
    table = file.read_row_groups(list(groups), columns=None if columns is None else list(columns))
    return table if columns is None else table.select(list(columns))
