"""What stands where: paths, folders and patterns, on a disk and in object stores.

fsspec's own `glob` takes a store that fails for a folder that is empty, and its `ls` of a disk
fails when a file goes while it looks. Here a folder is listed whole or a UserError says why not.
"""

from __future__ import annotations

import errno
import os
from fnmatch import fnmatchcase
from glob import has_magic
from typing import Any, NamedTuple

from raylarge.storage.patience import is_local, patiently
from raylarge.storage.web import is_web

_TO_NOTHING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.ENAMETOOLONG)
"""What a link says that leads nowhere: it is listed, so that whoever reads it can say so."""


class Entry(NamedTuple):
    """What stands in a folder."""

    name: str
    size: int
    is_folder: bool


def join(folder: str, *names: str) -> str:
    """A path below a folder."""
    return "/".join([folder.rstrip("/"), *names])


def absolute(path: str) -> str:
    """A path that means the same in every process: local ones from the root of the disk."""
    return os.path.abspath(path.removeprefix("file://")) if is_local(path) else path


def without_places(document: Any) -> Any:
    """Return a JSON document in which absolute paths and URLs are their last names.

    What is meant to be shared must not tell where it was made: user names, machines, buckets.
    """
    if isinstance(document, dict):
        return {key: without_places(value) for key, value in document.items()}
    if isinstance(document, list | tuple):
        return [without_places(value) for value in document]
    if isinstance(document, str) and (document.startswith(("/", "~")) or "://" in document):
        return document.rstrip("/").rsplit("/", 1)[-1]
    return document


def exists(path: str) -> bool:
    """Whether a file, an object or a folder stands at a path (never from a stale listing)."""
    if is_local(path):
        return os.path.exists(absolute(path))
    try:
        patiently(path, lambda fs, root: fs.info(root))  # exists() of some stores hides failures
    except FileNotFoundError:
        return False
    return True


def entries(folder: str) -> list[Entry]:
    """What stands in a folder, in no order; nothing if there is none."""
    try:
        return patiently(folder, _on_disk if is_local(folder) else _in_store)
    except FileNotFoundError:
        return []


def sizes(folder: str) -> dict[str, int]:
    """Names of the files in a folder, and how many bytes each holds; none if there is none."""
    return {one.name: one.size for one in entries(folder) if not one.is_folder}


def children(folder: str, pattern: str = "*") -> list[str]:
    """Sorted paths in a folder whose names match a pattern; none if there is no folder.

    Unlike in `listing`, the folder is taken at its word: it may be called `b [1]`.
    """
    names = (one.name for one in entries(folder))
    return [join(folder, name) for name in sorted(names) if fnmatchcase(name, pattern)]


def listing(pattern: str) -> list[str]:
    """Sorted paths that match a pattern such as `s3://bucket/*.svs`; `**` is any folders.

    What stands goes before what a bracket may mean: `b [1]/*` looks into `b [1]`, and into `b 1`
    only if there is no such folder. Where only the name is a pattern, take `children`.
    """
    if is_web(pattern) and ("?" in pattern or not has_magic(pattern)):
        return [pattern]  # its query is no pattern, and whoever reads it says what is wrong
    scheme, at, rest = pattern.rpartition("://") if not is_local(pattern) else ("", "", "")
    start, *parts = (rest or absolute(pattern)).rstrip("/").split("/")
    found = [scheme + at + start]
    while parts and found:
        part = parts.pop(0)
        if part == "**":
            found = [path for folder in found for path in _below(folder, not parts)]
        elif has_magic(part):
            found = [path for folder in found for path in _matching(folder, part, bool(parts))]
        else:
            found = [f"{folder}/{part}" for folder in found]
            found = found if parts else [path for path in found if exists(path) or _is_link(path)]
    return sorted(set(found))


def _is_link(path: str) -> bool:
    """Whether a local link stands there, if only one to nothing."""
    return is_local(path) and os.path.islink(path)


def _matching(folder: str, pattern: str, only_folders: bool) -> list[str]:
    names = [one.name for one in entries(folder or "/") if one.is_folder or not only_folders]
    if pattern in names:
        return [f"{folder}/{pattern}"]
    return [f"{folder}/{name}" for name in names if fnmatchcase(name, pattern)]


def _below(folder: str, everything: bool) -> list[str]:
    """All folders from one down, itself too; or everything that stands below it."""
    inside = entries(folder or "/")
    found = [f"{folder}/{one.name}" for one in inside] if everything else [folder]
    deeper = [_below(f"{folder}/{one.name}", everything) for one in inside if one.is_folder]
    return found + [path for paths in deeper for path in paths]


def _on_disk(_: Any, root: str) -> list[Entry]:
    found = []
    try:
        with os.scandir(root) as inside:
            for one in inside:
                try:
                    found.append(Entry(one.name, one.stat().st_size, one.is_dir()))
                except OSError as error:
                    if one.is_symlink() and error.errno in _TO_NOTHING:
                        found.append(Entry(one.name, 0, False))
                    elif not isinstance(error, FileNotFoundError):  # gone since
                        raise
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
            raise
        return []
    return found


def _in_store(fs: Any, root: str) -> list[Entry]:
    found = [(one, one["name"].rstrip("/")) for one in fs.ls(root, detail=True)]
    return [
        Entry(name.rsplit("/", 1)[-1], int(one["size"] or 0), one["type"] == "directory")
        for one, name in found
        if name != root.rstrip("/")  # the folder's own marker, or a file that is no folder
    ]
