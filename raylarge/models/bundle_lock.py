"""A lock for saving into a bundle, so that concurrent trainings do not overwrite its index."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from raylarge import storage

SAVING_S = 1800.0
"""Longest wait for other processes to save their parts."""
_POLL_S, _FOLDER = 0.2, ".saving"


@contextmanager
def saving(folder: str) -> Iterator[None]:
    """Hold the lock for saving into a bundle; wait up to SAVING_S for other processes.

    The lock is on a folder inside, since a command may already have locked the bundle itself.

    Raises:
        InUse: another process still saves.
    """
    deadline = time.monotonic() + SAVING_S
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(storage.exclusive(storage.join(folder, _FOLDER), "saving"))
                break
            except storage.InUse:
                if time.monotonic() > deadline:
                    raise
            time.sleep(_POLL_S)
        yield
    if storage.is_local(folder):  # may be left by a killed process
        with suppress(OSError):  # another process uses it
            Path(storage.absolute(folder), _FOLDER).rmdir()
