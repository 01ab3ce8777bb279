"""Files and objects as bytes and JSON, read and written whole; folders put in place.

A local file is written beside its place, synced and renamed. `storage.objects` does the same
for objects over HTTP.
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
from raylarge.storage.patience import Unmet, is_local, on_disk

PIECE_BYTES = 4 << 20


def remove(path: str) -> None:
    """Remove a file, if it is there."""
    remove_all([path])


def remove_all(paths: Iterable[str]) -> None:
    """Remove files, as far as they are there; of a bucket, 1,000 by one request."""
    of_bucket = defaultdict(list)
    for path in paths:
        if is_local(path):
            with on_disk(path):
                Path(absolute(path)).unlink(missing_ok=True)
        else:
            of_bucket[path.split("/")[2]].append(path)
    for found in of_bucket.values():
        for start in range(0, len(found), objects.MOST_REMOVED):
            objects.remove(found[start : start + objects.MOST_REMOVED])


def read_bytes(path: str) -> bytes:
    """The whole content of a file, all of one version.

    Raises:
        UserError: nothing stands at the path.
    """
    try:
        if not is_local(path):
            return objects.get(path)
        with on_disk(path):
            return Path(absolute(path)).read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; check the path.") from error


def write_bytes(path: str, content: bytes | memoryview) -> None:
    """Write a file atomically: a reader sees the old content or the new, never a part."""
    if not is_local(path):
        objects.put(path, content)
        return
    target = Path(absolute(path))
    beside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    with on_disk(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with beside.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(beside, target)
        finally:
            beside.unlink(missing_ok=True)


def read_json(path: str) -> Any:
    """A JSON document; NaN and infinity, which are no JSON but were written once, are None.

    Raises:
        UserError: nothing stands at the path, or no JSON.
    """
    try:
        return json.loads(read_bytes(path), parse_constant=lambda _: None)
    except ValueError as error:  # also bytes that are no text
        raise UserError(
            f"{path} is not readable as JSON ({error}): it is damaged or cut short; copy it again, "
            f"or remove it and run what wrote it."
        ) from error


def write_json(path: str, document: Any) -> None:
    """Write a JSON document atomically, in a form people can read and diff (see `as_json`)."""
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
        return {key: _without_nonfinite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nonfinite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def put_file(made: Path, target: str) -> None:
    """Move a finished local file to a path or URL: whole or absent, never read into memory.

    On a disk it must be the same one; to an object store a large file goes in parts.
    """
    if not is_local(target):
        objects.put(target, made)
        return
    with on_disk(target):
        Path(absolute(target)).parent.mkdir(parents=True, exist_ok=True)
        with made.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(made, absolute(target))


def put_folder(made: Path, target: str) -> None:
    """Move a finished local folder of plain files to a path or URL, in the place of another.

    On a disk (the same one) readers never see half of it. An object store loses the files that
    the new folder does not have and gets the others one by one: its reader needs an index,
    which does not list the folder meanwhile, to tell.
    """
    if is_local(target):
        _replace(made, Path(absolute(target)))
        return
    paths = sorted(made.iterdir())
    remove_all(join(target, name) for name in sizes(target).keys() - {one.name for one in paths})
    for path in paths:
        objects.put(join(target, path.name), path)


def _replace(made: Path, target: Path) -> None:
    """Put a folder in the place of another; what a killed call left goes too."""
    with on_disk(str(target)):
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.iterdir():
            if re.fullmatch(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}", left.name):
                shutil.rmtree(left, ignore_errors=True)
        old = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        if target.exists():
            os.replace(target, old)
        os.replace(made, target)
    shutil.rmtree(old, ignore_errors=True)


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
    """The content of a large file, 4 MiB at a time, all of one version.

    Raises:
        FileNotFoundError: nothing stands at the path.
        UserError: an object was written anew meanwhile.
    """
    if is_local(path):
        with on_disk(path), Path(absolute(path)).open("rb") as stream:
            while piece := stream.read(PIECE_BYTES):
                yield piece
        return
    source = objects.Ranges(path)
    try:
        while part := source.read(objects.PART_BYTES):
            yield from (part[at : at + PIECE_BYTES] for at in range(0, len(part), PIECE_BYTES))
    except Unmet as error:
        raise objects.changing(path) from error
