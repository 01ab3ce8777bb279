"""Check that a folder can be written before hours of work depend on it."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from pathlib import Path

from raylarge.errors import UserError
from raylarge.storage.files import remove, write_bytes
from raylarge.storage.folders import absolute, join
from raylarge.storage.retry import is_local

_LONGEST_NAME = ".image.png.01234567"
"""As long as the longest temporary name that a verb writes first."""


def require_writable(key: str, folder: str) -> None:
    """Raise `UserError` unless files can be written to a folder; leave no trace.

    Args:
        key: the command-line key that names the folder.
        folder: a path or URL, which need not exist yet.

    Raises:
        UserError: with the reason: a file is in the way, rights, no bucket, a name too long.
    """
    if is_local(folder):
        _write_probe(key, Path(absolute(folder)))
    else:
        path = join(folder, f".writable-{uuid.uuid4().hex[:8]}")
        write_bytes(path, b"")
        remove(path)


def _write_probe(key: str, folder: Path) -> None:
    """Write a file below the nearest existing folder, at the same depth as in `folder`."""
    missing: list[str] = []
    nearest = folder
    try:
        while not os.path.lexists(nearest):
            missing.insert(0, nearest.name)
            nearest = nearest.parent
        probe = Path(tempfile.mkdtemp(prefix=".writable-", dir=nearest))
        try:
            below = probe.joinpath(*missing)
            below.mkdir(parents=True, exist_ok=True)
            below.joinpath(_LONGEST_NAME).write_bytes(b"0")
        finally:
            shutil.rmtree(probe, ignore_errors=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{key}={folder} cannot be written: {_reason(error, nearest)}; choose another folder, "
            f"or make this one writable."
        ) from error


def _reason(error: Exception, nearest: Path) -> str:
    if isinstance(error, NotADirectoryError) and not nearest.is_dir():
        return f"{nearest} is a file, not a folder"
    if isinstance(error, FileNotFoundError) and nearest.is_symlink():
        return f"{nearest} is a link whose target does not exist"
    if isinstance(error, FileNotFoundError):
        return f"nothing can be created in {nearest}"
    return getattr(error, "strerror", None) or str(error)
