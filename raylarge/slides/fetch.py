"""Fetch remote slides into the node's cache, once per version.

Size, ETag and dates of an object form its version. A MIRAX slide is fetched with the folder beside
it, and a folder with its DICOM instances. Objects are fetched in ranges by several threads, each
range with its own retries; files of web servers, which may not know ranges, in one stream. Local
slides are not copied.
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

RANGE_BYTES = 16 << 20
LANES = 4
"""Concurrent requests for one slide: 64 MiB of memory."""
_TRIES = 3  # if others replace the slide meanwhile
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


class _Range(NamedTuple):
    """Bytes [start, stop) of an object, and the file in which they belong there."""

    source: _Object
    target: Path
    start: int
    stop: int


def fetch_slide(path: str) -> Lease:
    """Return a lease on the local file or folder of a slide; fetch a remote slide first.

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
            name, objects = storage.with_retries(path, lambda fs, root: _objects(path, fs, root))
            versions = {key: part.version for key, part in objects.items()}
            size = sum(part.size or 0 for part in objects.values())
            return cache.acquire(
                f"{_cache_path(path, objects)} {versions}",
                size,
                partial(_fetch, path, objects),
                name,
            )
        except FileNotFoundError as error:
            raise UnreadableSlide("the file does not exist; check the path.") from error
        except PreconditionFailed:
            continue
    raise UnreadableSlide("the file changes while it is fetched; run again when nobody writes it.")


def _cache_path(path: str, objects: dict[str, _Object]) -> str:
    """Return the path in the cache's key: without its query if ETags identify the versions."""
    return redacted(path) if all(part.etag for part in objects.values()) else path


def companions(path: str) -> list[str]:
    """Return sorted paths of a slide's other files: of a MIRAX slide's or a DICOM folder.

    The files beside a single DICOM instance are not listed, since only their content tells which
    belong to the slide. Web servers list nothing, so web addresses have none.
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
    """Return the name of the file to open, and every file to fetch by its local name."""
    info = web.info(fs, root)
    name = storage.name_of(root) or "slide"
    if info["type"] == "directory":
        files = fs.find(root, detail=True)
        instances = {one: facts for one, facts in files.items() if one.lower().endswith(".dcm")}
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
    """Fetch all files of a slide into an empty folder of the cache."""
    ranges = [part for name, one in objects.items() for part in _ranges(one, folder / name)]
    with ThreadPoolExecutor(LANES) as lanes:  # leaving it waits for running requests
        for _ in lanes.map(_fetch_range, ranges):
            pass
    if path.startswith(_WEB):
        for name in objects:
            _refuse_page(folder / name)
    if path.startswith((*_WEB, *_S3)):  # one stream, or ranges of one ETag: of one version
        return
    if storage.with_retries(path, lambda fs, root: _objects(path, fs, root))[1] != objects:
        raise PreconditionFailed(path)


def _refuse_page(file: Path) -> None:
    """Raise `UnreadableSlide` for a web page."""
    with file.open("rb") as stream:
        head = stream.read(512).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith((b"<!doctype html", b"<html")):
        raise UnreadableSlide(
            "the file is a web page and no slide: the server may want a login, or the address is "
            "that of a page about the slide; give the address of the file itself."
        )


def _ranges(source: _Object, target: Path) -> list[_Range]:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.touch()
    if source.url.startswith(_WEB) or source.size is None:
        return [_Range(source, target, 0, -1)]
    starts = range(0, source.size, RANGE_BYTES)
    return [_Range(source, target, at, min(at + RANGE_BYTES, source.size)) for at in starts]


def _fetch_range(part: _Range) -> None:
    source, target = part.source, part.target
    try:
        if part.stop < 0:
            full = storage.with_retries(
                source.url, lambda fs, root: _stream(fs, root, source, target)
            )
            if full is not None:
                raise full
            return
        content = storage.read_range(source.url, part.start, part.stop, source.etag)
    except FileNotFoundError as error:  # it was removed meanwhile
        raise PreconditionFailed(source.url) from error
    with target.open("r+b") as stream:
        stream.seek(part.start)
        stream.write(content)


def _stream(fs: Any, root: str, source: _Object, target: Path) -> OSError | None:
    """Fetch one object; return the error of a full disk, which must not be retried."""
    try:
        fs.get_file(root, str(target))
    except OSError as error:
        if error.errno in cache.DISK_FULL:
            return error
        raise
    received = os.path.getsize(target)
    if source.size not in (None, received):
        raise ConnectionError(f"{received:,} of {source.size:,} bytes came")
    return None
