"""Slides that stand at a URL, fetched to the node's disk once per version.

What changes when an object is written again (size, ETag, date) is its version. A MIRAX slide
brings the folder beside it, a URL that is a folder its DICOM instances. Local paths are read
where they are.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

from raylarge import storage
from raylarge.slides import cache
from raylarge.slides.cache import Held
from raylarge.slides.protocol import Refusal, speaking_of

_VERSION = ("size", "ETag", "LastModified", "Last-Modified", "VersionId", "generation", "mtime")
_INDEX_OF_FILES = (".vms", ".vmu")


def fetched(path: str) -> Held:
    """The local file (or folder) of a slide, held until it is closed.

    Raises:
        FileNotFoundError: nothing stands at the URL.
        Refusal: it is a part of a slide, or the cache has no room for it.
        UserError: its store cannot be reached, or does not let us in.
    """
    if storage.is_local(path):
        return Held(path.removeprefix("file://"))
    wanted, objects = storage.patiently(path, _objects)
    version = {name: [str(info.get(key)) for key in _VERSION] for name, info in objects.items()}
    return cache.hold(
        f"{path} {version}",
        sum(info.get("size") or 0 for info in objects.values()),
        lambda folder: _fetch(path, objects, folder),
        wanted,
    )


def local_copy(path: str) -> str:
    """The local path of a slide; an object of a store is fetched once per node and version.

    Nobody holds the copy: it may leave the cache when others need room.

    Raises:
        UserError: nothing stands at the URL, or it cannot be fetched.
    """
    with speaking_of(path):
        held = fetched(path)
    held.close()
    return held.path


def _objects(fs: Any, root: str) -> tuple[str, dict[str, Any]]:
    """What of the fetched files is opened, and every file to fetch: its name and facts."""
    info = fs.info(root)
    name = root.rstrip("/").rsplit("/", 1)[-1]
    if info["type"] == "directory":
        found = fs.find(root, detail=True)
        instances = {path: one for path, one in found.items() if path.lower().endswith(".dcm")}
        if not instances:
            raise Refusal("is a folder without DICOM instances (*.dcm); name a file in it.")
        return "", {path.rsplit("/", 1)[-1]: one for path, one in instances.items()}
    objects = {name.partition("?")[0]: info}  # what follows is a web address's query
    if name.lower().endswith(_INDEX_OF_FILES):
        raise Refusal("is an index of several files; copy all of them to a disk and name it there.")
    if name.lower().endswith(".mrxs"):
        folder = root.rpartition(".")[0]
        beside = fs.find(folder, detail=True)
        if not beside:
            raise Refusal(
                f"is a MIRAX index, and nothing is found in the folder {folder}/ that belongs to "
                "it (web addresses cannot list one); copy both to a store or a disk."
            )
        above = folder.rpartition("/")[0]
        objects |= {path.removeprefix(above).lstrip("/"): one for path, one in beside.items()}
    return name.partition("?")[0], objects


def _fetch(path: str, objects: dict[str, Any], folder: Path) -> None:
    for name, info in objects.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        full = storage.patiently(path, partial(_get, source=info["name"], target=str(target)))
        if full is not None:
            raise full
        size = os.path.getsize(target)
        if info.get("size") not in (None, size):
            raise Refusal(
                f"was cut short on its way ({size:,} of {info['size']:,} bytes came); try again."
            )


def _get(fs: Any, _: str, source: str, target: str) -> OSError | None:
    """Fetch one object; a full disk is returned, since trying again does not mend it."""
    try:
        fs.get_file(source, target)
    except OSError as error:
        if error.errno in cache.FULL:
            return error
        raise
    return None
