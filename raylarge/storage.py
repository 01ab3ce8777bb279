"""Files on a disk and objects in S3 behind one small set of verbs.

Every write is whole or absent: local files are written beside, synced and renamed; object
stores take one PUT per object. A path is a local path or a URL such as `s3://bucket/key`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from raylarge.errors import UserError


def is_local(path: str) -> bool:
    """Whether a path names the local disk."""
    return "://" not in path or path.startswith("file://")


def join(folder: str, *names: str) -> str:
    """A path below a folder."""
    return "/".join([folder.rstrip("/"), *names])


def absolute(path: str) -> str:
    """A path that means the same in every process: local ones from the root of the disk."""
    return os.path.abspath(path.removeprefix("file://")) if is_local(path) else path


def exists(path: str) -> bool:
    """Whether a file, an object or a folder stands at a path (never from a stale listing)."""
    fs, root = fsspec.core.url_to_fs(path)
    fs.invalidate_cache()
    return bool(fs.exists(root))


def listing(pattern: str) -> list[str]:
    """Sorted paths that match a pattern such as `s3://bucket/*.svs`."""
    fs, root = fsspec.core.url_to_fs(pattern)
    fs.invalidate_cache()
    found = sorted(fs.glob(root))
    return [name if is_local(pattern) else fs.unstrip_protocol(name) for name in found]


def sizes(folder: str) -> dict[str, int]:
    """Names of the files in a folder, and how many bytes each holds; none if there is none."""
    fs, root = fsspec.core.url_to_fs(folder)
    fs.invalidate_cache()
    if not fs.exists(root):
        return {}
    found = [one for one in fs.ls(root, detail=True) if one["type"] != "directory"]  # or a link
    return {name: one["size"] for one in found if (name := one["name"].rsplit("/", 1)[-1])}


def remove(path: str) -> None:
    """Remove a file, if it is there."""
    fs, root = fsspec.core.url_to_fs(path)
    if fs.exists(root):
        fs.rm_file(root)


def read_bytes(path: str) -> bytes:
    """The whole content of a file.

    Raises:
        UserError: nothing stands at the path.
    """
    fs, root = fsspec.core.url_to_fs(path)
    try:
        return bytes(fs.cat_file(root))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; check the path.") from error


def write_bytes(path: str, content: bytes) -> None:
    """Write a file atomically: a reader sees the old content or the new, never a part."""
    if not is_local(path):
        fs, root = fsspec.core.url_to_fs(path)
        fs.pipe_file(root, content)
        return
    target = Path(path.removeprefix("file://"))
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        with beside.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def read_json(path: str) -> Any:
    """A JSON document.

    Raises:
        UserError: nothing stands at the path, or no JSON.
    """
    try:
        return json.loads(read_bytes(path))
    except ValueError as error:  # also bytes that are no text
        raise UserError(
            f"{path} is not readable as JSON ({error}): it is damaged or cut short; copy it again, "
            f"or remove it and run what wrote it."
        ) from error


def write_json(path: str, document: Any) -> None:
    """Write a JSON document atomically, in a form people can read and diff."""
    write_bytes(path, (json.dumps(document, indent=1, sort_keys=True) + "\n").encode())


def read_table(path: str, columns: Iterable[str] | None = None) -> pa.Table:
    """One parquet file."""
    return pq.read_table(
        pa.BufferReader(read_bytes(path)), columns=None if columns is None else list(columns)
    )


def write_table(path: str, table: pa.Table) -> None:
    """Write one parquet file atomically."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_bytes(path, sink.getvalue().to_pybytes())


def replace_folder(made: Path, target: Path) -> None:
    """Put a finished local folder in the place of another; readers never see half of one.

    What a killed call left beside it (`.NAME.` and eight digits) goes too.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.iterdir():
        if re.fullmatch(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}", left.name):
            shutil.rmtree(left, ignore_errors=True)
    old = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    if target.exists():
        os.replace(target, old)
    os.replace(made, target)
    shutil.rmtree(old, ignore_errors=True)


def put_folder(made: Path, target: str) -> None:
    """Move a finished local folder of plain files to a path or URL, in the place of another.

    On a disk (the same one) readers never see half of it. An object store loses the files that
    the new folder does not have and gets the others one by one: its reader needs an index,
    which does not list the folder meanwhile, to tell.
    """
    if is_local(target):
        replace_folder(made, Path(absolute(target)))
        return
    fs, root = fsspec.core.url_to_fs(target)
    paths = sorted(made.iterdir())
    for name in sizes(target).keys() - {path.name for path in paths}:
        fs.rm_file(f"{root}/{name}")
    for path in paths:
        fs.put_file(str(path), f"{root}/{path.name}")


def digest(*contents: bytes) -> str:
    """A short name for bytes: the first 16 hexadecimal digits of their SHA-256."""
    return digest_pieces(contents)


def digest_pieces(pieces: Iterable[bytes]) -> str:
    """The same short name for bytes that come piece by piece."""
    total = hashlib.sha256()
    for piece in pieces:
        total.update(piece)
    return total.hexdigest()[:16]


def digest_file(path: str | Path) -> str:
    """The same short name for the content of a large file."""
    return digest_pieces(pieces(str(path)))


def pieces(path: str) -> Iterator[bytes]:
    """The content of a large file, 4 MiB at a time."""
    fs, root = fsspec.core.url_to_fs(path)
    with fs.open(root, "rb") as stream:
        while piece := stream.read(1 << 22):
            yield piece
