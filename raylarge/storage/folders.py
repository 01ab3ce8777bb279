"""List folders and match patterns, on a disk and in object stores.

fsspec's own `glob` returns nothing when a store fails, and its `ls` of a disk fails if a file
disappears meanwhile. Here a folder is listed completely, or a UserError gives the reason.
"""

from __future__ import annotations

import errno
import os
from fnmatch import fnmatchcase
from glob import has_magic
from typing import Any, NamedTuple

from raylarge.storage.retry import is_local, with_retries
from raylarge.storage.web import is_web_url

_BROKEN_LINK = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.ENAMETOOLONG)
"""Errors of a link without a target; it is listed, so that its reader can report it."""


class FolderEntry(NamedTuple):
    """A file or folder in a folder."""

    name: str
    size: int
    is_folder: bool


def join(folder: str, *names: str) -> str:
    """Return a path below a folder."""
    return "/".join([folder.rstrip("/"), *names])


def absolute(path: str) -> str:
    """Return a path that is valid in every process; a URL stays as it is."""
    return os.path.abspath(path.removeprefix("file://")) if is_local(path) else path


def without_folders(document: Any) -> Any:
    """Return a JSON document whose absolute paths and URLs are reduced to their last names.

    A document that is shared must not contain user names, machines or buckets.
    """
    if isinstance(document, dict):
        return {key: without_folders(value) for key, value in document.items()}
    if isinstance(document, list | tuple):
        return [without_folders(value) for value in document]
    if isinstance(document, str) and (document.startswith(("/", "~")) or "://" in document):
        return document.rstrip("/").rsplit("/", 1)[-1]
    return document


def exists(path: str) -> bool:
    """Return whether a file, object or folder exists at a path; never from a cached listing."""
    if is_local(path):
        return os.path.exists(absolute(path))
    try:
        with_retries(path, lambda fs, root: fs.info(root))  # some stores' exists() hides failures
    except FileNotFoundError:
        return False
    return True


def entries(folder: str) -> list[FolderEntry]:
    """Return the content of a folder, in no order; [] if the folder does not exist."""
    try:
        return with_retries(folder, _list_disk if is_local(folder) else _list_store)
    except FileNotFoundError:
        return []


def sizes(folder: str) -> dict[str, int]:
    """Return names and sizes in bytes of a folder's files; {} if the folder does not exist."""
    return {entry.name: entry.size for entry in entries(folder) if not entry.is_folder}


def children(folder: str, pattern: str = "*") -> list[str]:
    """Return sorted paths in a folder whose names match a pattern; [] if it does not exist.

    Unlike in `glob`, the folder's own name is no pattern: it may be called `b [1]`.
    """
    names = sorted(entry.name for entry in entries(folder))
    return [join(folder, name) for name in names if fnmatchcase(name, pattern)]


def glob(pattern: str) -> list[str]:
    """Return sorted paths that match a pattern such as `s3://bucket/*.svs`; `**` is any folders.

    An existing name wins over its meaning as a pattern: `b [1]/*` lists `b [1]`, and `b 1` only if
    there is no such folder. If only the last name is a pattern, use `children`.
    """
    if is_web_url(pattern) and ("?" in pattern or not has_magic(pattern)):
        return [pattern]  # its query is no pattern; the reader of the file reports failures
    scheme, at, rest = pattern.rpartition("://") if not is_local(pattern) else ("", "", "")
    start, *parts = (rest or absolute(pattern)).rstrip("/").split("/")
    paths = [scheme + at + start]
    for number, part in enumerate(parts, 1):
        last = number == len(parts)
        if part == "**":
            paths = [path for folder in paths for path in _below(folder, last)]
        elif has_magic(part):
            paths = [path for folder in paths for path in _matching(folder, part, not last)]
        else:
            paths = [f"{folder}/{part}" for folder in paths]
            paths = [path for path in paths if not last or exists(path) or _is_link(path)]
    return sorted(set(paths))


def _is_link(path: str) -> bool:
    return is_local(path) and os.path.islink(path)


def _matching(folder: str, pattern: str, only_folders: bool) -> list[str]:
    names = [entry.name for entry in entries(folder or "/") if entry.is_folder or not only_folders]
    if pattern in names:
        return [f"{folder}/{pattern}"]
    return [f"{folder}/{name}" for name in names if fnmatchcase(name, pattern)]


def _below(folder: str, with_files: bool) -> list[str]:
    """Return a folder and all folders below it; or all files and folders below it."""
    content = entries(folder or "/")
    paths = [f"{folder}/{entry.name}" for entry in content] if with_files else [folder]
    deeper = [_below(f"{folder}/{entry.name}", with_files) for entry in content if entry.is_folder]
    return paths + [path for below in deeper for path in below]


def _list_disk(_: Any, root: str) -> list[FolderEntry]:
    content = []
    try:
        with os.scandir(root) as scan:
            for entry in scan:
                try:
                    content.append(FolderEntry(entry.name, entry.stat().st_size, entry.is_dir()))
                except OSError as error:
                    if entry.is_symlink() and error.errno in _BROKEN_LINK:
                        content.append(FolderEntry(entry.name, 0, False))
                    elif not isinstance(error, FileNotFoundError):  # removed meanwhile
                        raise
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
            raise
        return []
    return content


def _list_store(fs: Any, root: str) -> list[FolderEntry]:
    listed = [(entry, entry["name"].rstrip("/")) for entry in fs.ls(root, detail=True)]
    return [
        FolderEntry(name.rsplit("/", 1)[-1], int(entry["size"] or 0), entry["type"] == "directory")
        for entry, name in listed
        if name != root.rstrip("/")  # the folder's own marker, or `root` is a file
    ]
