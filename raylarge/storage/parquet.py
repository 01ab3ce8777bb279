"""Parquet files: written whole and the same each time, read whole or by row groups.

Pages carry checksums, so a flipped bit is an error and no embedding. Readers raise a UserError
where nothing stands at the path, or it is damaged, or lacks a group or a column.
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
from raylarge.storage.files import read_bytes, write_bytes
from raylarge.storage.folders import absolute
from raylarge.storage.patience import Unmet, is_local, on_disk

FOOTER_BYTES = 64 << 10  # what is fetched at first; a footer that is larger costs one request more
COMPRESSED = "image"  # a column of files (PNG, JPEG) that no codec makes smaller
T = TypeVar("T")


def read_table(path: str, columns: Sequence[str] | None = None) -> pa.Table:
    """One parquet file."""
    content = pa.BufferReader(read_bytes(path))
    return _read(path, content, lambda file: _rows(path, file, None, columns))


def read_rows(path: str, groups: Sequence[int], columns: Sequence[str] | None = None) -> pa.Table:
    """Some row groups of a parquet file, in the order given; nothing else of it is fetched."""

    def read(source: Any) -> pa.Table:
        return _read(path, source, lambda file: _rows(path, file, groups, columns))

    try:
        if is_local(path):
            with on_disk(path), Path(absolute(path)).open("rb") as source:
                return read(source)
        for _ in range(objects.TRIES):
            with suppress(Unmet):
                return read(objects.Ranges(path))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; check the path.") from error
    raise objects.changing(path)


def read_metadata(path: str) -> dict[bytes, bytes]:
    """The metadata of a parquet file's schema; one or two requests fetch its footer alone."""
    try:
        footer = pa.BufferReader(_footer(path, FOOTER_BYTES))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; check the path.") from error
    return _read(path, footer, lambda file: dict(file.schema_arrow.metadata or {}))


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
    with pq.ParquetWriter(sink, table.schema, write_page_checksum=True, **_coding(table)) as writer:
        if row_groups is None:
            writer.write_table(table)
        start = 0
        for rows in row_groups or ():
            writer.write_table(table.slice(start, rows), rows)
            start += rows
    write_bytes(path, memoryview(sink.getvalue()))


def _coding(table: pa.Table) -> dict[str, Any]:
    """Per column: zstd but for COMPRESSED, dictionaries for words alone.

    Of other values few repeat, and a writer that looks for it takes three times as long.
    """
    sink = pa.BufferOutputStream()
    pq.write_table(table.schema.empty_table(), sink)  # only parquet knows its columns' paths
    found = pq.ParquetFile(pa.BufferReader(sink.getvalue())).schema
    columns = [found.column(number) for number in range(len(found))]
    return {
        "compression": {c.path: "none" if c.path == COMPRESSED else "zstd" for c in columns},
        "use_dictionary": [c.path for c in columns if c.logical_type.type == "STRING"],
    }


def _footer(path: str, size: int) -> bytes:
    """The end of a parquet file with its whole footer, if so many bytes or one more look do."""
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
    names = None if columns is None else list(columns)
    for name in names or ():
        if name not in file.schema_arrow.names:
            raise UserError(f"{path} has no column {name}; run what wrote it again.")
    groups = list(range(file.num_row_groups) if groups is None else groups)
    for group in groups:
        if not 0 <= group < file.num_row_groups:
            raise UserError(
                f"{path} has {file.num_row_groups} row groups and no number {group}; run what "
                f"wrote it again."
            )
    table = file.read_row_groups(groups, columns=names)
    return table if names is None else table.select(names)
