"""Processes that save into one bundle take turns, so that none writes out another's parts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from raylarge import storage

SAVING_S = 1800.0
"""How long one process waits for others to save their parts."""
_LOOK_S, _FOLDER = 0.2, ".saving"


@contextmanager
def saving(folder: str) -> Iterator[None]:
    """Let one process at a time save into a bundle; wait for others for SAVING_S.

    Two models that are trained into one bundle would else write each other's parts out of its
    index. The folder below is locked, as a command may hold the lock of the bundle itself.

    Raises:
        InUse: another process does not come to an end.
    """
    until = time.monotonic() + SAVING_S
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(storage.exclusive(storage.join(folder, _FOLDER), "saving"))
                break
            except storage.InUse:
                if time.monotonic() > until:
                    raise
            time.sleep(_LOOK_S)
        yield
    if storage.is_local(folder):  # a killed process leaves it
        with suppress(OSError):  # another process waits for its turn
            Path(storage.absolute(folder), _FOLDER).rmdir()
