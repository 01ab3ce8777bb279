"""Slides that stand at a URL, fetched to the node's disk once per version.

What changes when an object is written again (size, ETag, date) is its version. A MIRAX slide
brings the folder beside it, a URL that is a folder its DICOM instances. Ranges of objects come
in several lanes, each with its own patience; web addresses, whose servers may know no ranges,
in one stream. Local paths are read where they are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from raylarge import storage
from raylarge.slides.protocol import UnreadableSlide
from raylarge.storage import cache, web
from raylarge.storage.cache import Lease
from raylarge.storage.retry import PreconditionFailed
from raylarge.storage.web import redacted

PIECE_BYTES = 16 << 20
LANES = 4
"""Pieces of one slide under way at a time: 64 MiB of memory."""
_TRIES = 3  # of a slide that others write meanwhile
_VERSION = (
    *("size", "ETag", "LastModified", "Last-Modified", "VersionId", "mtime"),
    *("generation", "updated", "etag", "last_modified", "created"),  # Google's, Azure's, others'
)
_INDEX_OF_FILES = (".vms", ".vmu")
_MIRAX = ".mrxs"
_WEB = ("http://", "https://")
_S3 = ("s3://", "s3a://")


class _Object(NamedTuple):
    """One of the files of a slide."""

    url: str
    size: int | None
    etag: str | None
    version: tuple[str, ...]


class _Piece(NamedTuple):
    """Bytes [start, stop) of an object, and the file in which they belong there."""

    source: _Object
    target: Path
    start: int
    stop: int


def fetched(path: str) -> Lease:
    """The local file (or folder) of a slide, held until it is closed.

    Raises:
        UnreadableSlide: nothing exists at the URL, it is only a part of a slide, or it keeps
            changing.
        MissingResource: the cache has no room for it.
        UserError: its store cannot be reached, or does not let us in.
    """
    if storage.is_local(path):
        return Lease(path.removeprefix("file://"))
    for _ in range(_TRIES):
        try:
            wanted, objects = storage.with_retries(path, lambda fs, root: _objects(path, fs, root))
            version = {name: one.version for name, one in objects.items()}
            size = sum(one.size or 0 for one in objects.values())
            return cache.acquire(
                f"{_lasting(path, objects)} {version}", size, partial(_fetch, path, objects), wanted
            )
        except FileNotFoundError as error:
            raise UnreadableSlide("the file does not exist; check the path.") from error
        except PreconditionFailed:
            continue
    raise UnreadableSlide("the file changes while it is fetched; run again when nobody writes it.")


def _lasting(path: str, objects: dict[str, _Object]) -> str:
    """A path as the cache knows it: without the query, where an ETag tells versions apart."""
    return redacted(path) if all(one.etag for one in objects.values()) else path


def companions(path: str) -> list[str]:
    """Sorted paths of the other files of a slide: a MIRAX slide's folder, a folder's instances.

    What lies beside one DICOM instance is not listed: only its content tells what belongs to it.
    Web addresses have none: their servers list nothing.
    """
    if path.startswith(_WEB):
        return []
    mirax = path.lower().endswith(_MIRAX)
    return sorted(_files(path.rpartition(".")[0] if mirax else path.rstrip("/")))


def _files(folder: str) -> Iterator[str]:
    for entry in storage.entries(folder):
        inside = storage.join(folder, entry.name)
        if entry.is_folder:
            yield from _files(inside)
        else:
            yield inside


def _objects(path: str, fs: Any, root: str) -> tuple[str, dict[str, _Object]]:
    """What of the fetched files is opened, and every file to fetch, by its name there."""
    info = web.info(fs, root)
    name = storage.name_of(root) or "slide"
    if info["type"] == "directory":
        found = fs.find(root, detail=True)
        instances = {one: facts for one, facts in found.items() if one.lower().endswith(".dcm")}
        if not instances:
            raise UnreadableSlide("the folder holds no DICOM instances (*.dcm); name a file in it.")
        return "", {one.rsplit("/", 1)[-1]: _object(fs, instances[one]) for one in instances}
    objects = {name: _object(fs, info)._replace(url=path)}
    if name.lower().endswith(_INDEX_OF_FILES):
        raise UnreadableSlide(
            "the file is an index of several files; copy all of them to a disk and name it there."
        )
    if name.lower().endswith(_MIRAX):
        folder = root.rpartition(".")[0]
        beside = fs.find(folder, detail=True)
        if not beside:
            raise UnreadableSlide(
                f"the file is a MIRAX index, and nothing is found in the folder {folder}/ that "
                "belongs to it (web addresses cannot list one); copy both to a store or a disk."
            )
        above = folder.rpartition("/")[0]
        objects |= {one.removeprefix(above).lstrip("/"): _object(fs, beside[one]) for one in beside}
    return name, objects


def _object(fs: Any, info: dict[str, Any]) -> _Object:
    version = tuple(str(info.get(key)) for key in _VERSION)
    return _Object(fs.unstrip_protocol(info["name"]), info.get("size"), info.get("ETag"), version)


def _fetch(path: str, objects: dict[str, _Object], folder: Path) -> None:
    """Fill a folder of the cache, which is put in place when all of it is there."""
    pieces = [piece for name, one in objects.items() for piece in _pieces(one, folder / name)]
    with ThreadPoolExecutor(LANES) as lanes:  # leaving it waits for pieces under way
        for _ in lanes.map(_move, pieces):
            pass
    if path.startswith(_WEB):
        for name in objects:
            _refuse_page(folder / name)
    if path.startswith((*_WEB, *_S3)):  # one stream, or ranges of one ETag: of one version
        return
    if storage.with_retries(path, lambda fs, root: _objects(path, fs, root))[1] != objects:
        raise PreconditionFailed(path)


def _refuse_page(file: Path) -> None:
    """Refuse a web page in the place of a slide."""
    with file.open("rb") as stream:
        head = stream.read(512).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith((b"<!doctype html", b"<html")):
        raise UnreadableSlide(
            "the file is a web page and no slide: the server may want a login, or the address is "
            "that of a page about the slide; give the address of the file itself."
        )


def _pieces(source: _Object, target: Path) -> list[_Piece]:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.touch()
    if source.url.startswith(_WEB) or source.size is None:
        return [_Piece(source, target, 0, -1)]
    starts = range(0, source.size, PIECE_BYTES)
    return [_Piece(source, target, at, min(at + PIECE_BYTES, source.size)) for at in starts]


def _move(piece: _Piece) -> None:
    source, target = piece.source, piece.target
    try:
        if piece.stop < 0:
            full = storage.with_retries(
                source.url, lambda fs, root: _stream(fs, root, source, target)
            )
            if full is not None:
                raise full
            return
        content = storage.read_range(source.url, piece.start, piece.stop, source.etag)
    except FileNotFoundError as error:  # it was there a moment ago
        raise PreconditionFailed(source.url) from error
    with target.open("r+b") as stream:
        stream.seek(piece.start)
        stream.write(content)


def _stream(fs: Any, root: str, source: _Object, target: Path) -> OSError | None:
    """Fetch one object; a full disk is returned, since trying again does not mend it."""
    try:
        fs.get_file(root, str(target))
    except OSError as error:
        if error.errno in cache.DISK_FULL:
            return error
        raise
    came = os.path.getsize(target)
    if source.size not in (None, came):
        raise ConnectionError(f"{came:,} of {source.size:,} bytes came")
    return None
