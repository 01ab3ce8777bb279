"""Whether a place can be written, before hours of work end in front of a closed door."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from pathlib import Path

from raylarge.errors import UserError
from raylarge.storage.files import remove, write_bytes
from raylarge.storage.folders import absolute, join
from raylarge.storage.patience import is_local

_LONGEST_NAME = ".image.png.01234567"
"""As long as the names that are written first."""


def require_writable(key: str, folder: str) -> None:
    """Check that files can be written to a folder that may not exist yet; leave no trace.

    Args:
        key: the key of the command line that names the folder.
        folder: a path or URL.

    Raises:
        UserError: with the reason: a file is in the way, rights, no bucket, a name too long.
    """
    if is_local(folder):
        _try_disk(key, Path(absolute(folder)))
    else:
        path = join(folder, f".writable-{uuid.uuid4().hex[:8]}")
        write_bytes(path, b"")
        remove(path)


def _try_disk(key: str, folder: Path) -> None:
    """Write a file below the nearest folder that exists, as deep as `folder` lies below it."""
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
        return f"{nearest} is a link to nothing"
    if isinstance(error, FileNotFoundError):
        return f"nothing can be created in {nearest}"
    return getattr(error, "strerror", None) or str(error)
