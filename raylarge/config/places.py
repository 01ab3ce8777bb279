"""Folders and URLs that a user names: they must name a place that lasts.

Ray runs a submitted job in a temporary copy of its working directory, which it removes later. A
relative folder would lie in that copy, and no other node would see it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from raylarge.config import fields
from raylarge.config.words import format_value
from raylarge.errors import UserError

PLACES = frozenset(
    ("bundle", "data", "logs", "out", "reference", "slides", "source", "synthetic", "work")
)
"""Names of the keys that hold folders, or paths separated by commas. A single file that is sent
along with the job (a table, an image, weights) may be relative."""
SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""The environment variable that `ray job submit` sets for the driver, and nothing else does."""


def require_place(key: str, path: str) -> None:
    """Refuse a folder or a URL that names no place, or none that lasts.

    Raises:
        UserError: an empty path, a URL without its bucket, or a relative path in a submitted job.
    """
    if not path.removeprefix("file://").strip():
        raise UserError(f"{key}={format_value(path)} is empty; name a folder or an s3:// URL.")
    if re.match(r"(?!file:)\w+://(/|$)", path):
        raise UserError(
            f"{key}={format_value(path)} names no bucket; give one as in s3://BUCKET/FOLDER."
        )
    _refuse_temporary(key, path)


def check_places(config: Any) -> None:
    """Refuse relative folders of a config object in a submitted job.

    Raises:
        UserError: naming the key, the path and the cure.
    """
    if SUBMITTED in os.environ:
        for key, value in _places(config, ""):
            for path in filter(None, (word.strip() for word in value.split(","))):
                _refuse_temporary(key, path)


def _places(config: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield the keys that hold folders, and their values."""
    schema: Any = type(config)
    for key in fields.keys(schema):
        value = getattr(config, key.name)
        if key.section and isinstance(value, key.section):
            yield from _places(value, f"{prefix}{key.name}.")
        elif key.name in PLACES and isinstance(value, str):
            yield f"{prefix}{key.name}", value


def _refuse_temporary(key: str, path: str) -> None:
    local = path.removeprefix("file://")
    is_url = re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", local)
    if SUBMITTED in os.environ and not is_url and not os.path.isabs(local):
        raise UserError(
            f"{key}={format_value(path)} is relative, but Ray runs a submitted job in a temporary "
            f"copy of its working directory and removes it later; give an absolute path that every "
            f"node sees, or an s3:// URL."
        )
