"""Read and write files and objects as bytes and JSON; move folders to their final place.

A local file is written under a temporary name beside its target, synced and renamed.
`storage.objects` does the same for objects over HTTP.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from raylarge.errors import UserError
from raylarge.storage import objects
from raylarge.storage.folders import absolute, join, sizes
from raylarge.storage.retry import PreconditionFailed, disk_errors, is_local

CHUNK_BYTES = 4 << 20


def remove(path: str) -> None:
    """Remove a file if it exists."""
    remove_all([path])


def remove_all(paths: Iterable[str]) -> None:
    """Remove files if they exist; up to 1,000 objects of a bucket by one request."""
    by_bucket = defaultdict(list)
    for path in paths:
        if is_local(path):
            with disk_errors(path):
                Path(absolute(path)).unlink(missing_ok=True)
        else:
            by_bucket[path.split("/")[2]].append(path)
    for bucket in by_bucket.values():
        for start in range(0, len(bucket), objects.MOST_REMOVED):
            objects.remove(bucket[start : start + objects.MOST_REMOVED])


def missing(path: str) -> UserError:
    """Return the error for a path at which nothing exists."""
    return UserError(f"{path} does not exist; check the path.")


def read_bytes(path: str) -> bytes:
    """Return the content of a file, all of one version.

    Raises:
        UserError: nothing exists at the path.
    """
    try:
        if not is_local(path):
            return objects.get(path)
        with disk_errors(path):
            return Path(absolute(path)).read_bytes()
    except FileNotFoundError as error:
        raise missing(path) from error


def write_bytes(path: str, content: bytes | memoryview) -> None:
    """Write a file atomically: a reader sees the old content or the new, never a part."""
    if not is_local(path):
        objects.put(path, content)
        return
    target = Path(absolute(path))
    temporary = _temporary_name(target)
    with disk_errors(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


def _temporary_name(target: Path) -> Path:
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")


def read_json(path: str) -> Any:
    """Return a JSON document; NaN and infinity, which old files may hold, become None.

    Raises:
        UserError: nothing exists at the path, or it is not JSON.
    """
    try:
        return json.loads(read_bytes(path), parse_constant=lambda _: None)
    except ValueError as error:  # also bytes that are not text
        raise UserError(
            f"{path} is not readable as JSON ({error}): it is damaged or cut short; copy it again, "
            f"or remove it and run what wrote it."
        ) from error


def write_json(path: str, document: Any) -> None:
    """Write a JSON document atomically, indented and with sorted keys (see `as_json`)."""
    write_bytes(path, (as_json(document, indent=1) + "\n").encode())


def as_json(document: Any, indent: int | None = None) -> str:
    """Return a document as strict JSON with sorted keys; numbers that are not finite become null.

    Python would write `NaN` and `Infinity`, which other readers of JSON refuse.
    """
    try:
        return json.dumps(document, indent=indent, sort_keys=True, allow_nan=False)
    except ValueError:
        finite = _without_nonfinite(document)
        return json.dumps(finite, indent=indent, sort_keys=True, allow_nan=False)


def _without_nonfinite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nonfinite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def put_file(source: Path, target: str) -> None:
    """Move a finished local file to a path or URL atomically, never reading all of it into memory.

    A local target must be on the same disk; a large file is sent to an object store in parts.
    """
    if not is_local(target):
        objects.put(target, source)
        return
    with disk_errors(target):
        Path(absolute(target)).parent.mkdir(parents=True, exist_ok=True)
        with source.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(source, absolute(target))


def put_folder(source: Path, target: str) -> None:
    """Move a finished local folder of plain files to a path or URL, replacing another folder.

    On a disk (the same one) readers never see a part of it. In an object store, files that the
    new folder lacks are removed and the others are written one by one: its readers need an index
    that does not list the folder meanwhile.
    """
    if is_local(target):
        _replace_folder(source, Path(absolute(target)))
        return
    paths = sorted(source.iterdir())
    remove_all(join(target, name) for name in sizes(target).keys() - {path.name for path in paths})
    for path in paths:
        objects.put(join(target, path.name), path)


def _replace_folder(source: Path, target: Path) -> None:
    """Replace a folder by another; remove temporary folders of killed calls, too."""
    with disk_errors(str(target)):
        target.parent.mkdir(parents=True, exist_ok=True)
        for path in target.parent.iterdir():
            if re.fullmatch(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}", path.name):
                shutil.rmtree(path, ignore_errors=True)
        old = _temporary_name(target)
        if target.exists():
            os.replace(target, old)
        os.replace(source, target)
    shutil.rmtree(old, ignore_errors=True)


def digest(*contents: bytes) -> str:
    """Return a short name for bytes: the first 16 hexadecimal digits of their SHA-256."""
    return digest_chunks(contents)


def digest_chunks(chunks: Iterable[bytes]) -> str:
    """Return the `digest` of bytes that come in chunks."""
    sha = hashlib.sha256()
    for chunk in chunks:
        sha.update(chunk)
    return sha.hexdigest()[:16]


def digest_file(path: str | Path) -> str:
    """Return the `digest` of a large file."""
    return digest_chunks(chunks(str(path)))


def chunks(path: str) -> Iterator[bytes]:
    """Yield the content of a large file in chunks of 4 MiB, all of one version.

    Raises:
        FileNotFoundError: nothing exists at the path.
        UserError: the object was replaced meanwhile.
    """
    if is_local(path):
        with disk_errors(path), Path(absolute(path)).open("rb") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                yield chunk
        return
    source = objects.Ranges(path)
    try:
        while part := source.read(objects.PART_BYTES):
            yield from (part[at : at + CHUNK_BYTES] for at in range(0, len(part), CHUNK_BYTES))
    except PreconditionFailed as error:
        raise objects.changing(path) from error
