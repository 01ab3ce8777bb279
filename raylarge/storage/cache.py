"""A cache on the node's disk for remote slides, remote checkpoints and converted images.

    RAYLARGE_CACHE        its folder; by default raylarge-cache-UID in the temporary folder, with
                          access for its owner alone
    RAYLARGE_CACHE_BYTES  its capacity; by default 64 GiB, or half of the disk if that is less

An entry is a folder NAME, filled under a temporary name and renamed. NAME.lock is an empty
sparse file whose length is the entry's share of the capacity and whose modification time is its
last use. A reader of an entry holds a shared lock, its writer or evictor an exclusive one. The
least recently used entries are evicted first; while all are in use, a new entry waits for room.
Failures are `MissingResource`: the file that was asked for is not at fault.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import random
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from raylarge.errors import MissingResource
from raylarge.storage.files import digest
from raylarge.storage.lock import open_locked

_DEFAULT_BYTES = 64 << 30
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
WAIT_S = 1800.0
"""How long to wait for others to release their entries."""
POLL_S = 1.0
"""Mean interval between two attempts."""

logger = logging.getLogger(__name__)


class Lease:
    """A local file or folder that is not evicted until the lease is closed."""

    def __init__(self, path: str, lock: int | None = None) -> None:
        """Own `lock`, the descriptor of an open lock file, if there is one."""
        self.path = path
        self._lock = lock

    def close(self) -> None:
        """Allow eviction."""
        if self._lock is not None:
            os.close(self._lock)
        self._lock = None


def acquire(identity: str, max_bytes: int, fill: Callable[[Path], None], name: str) -> Lease:
    """Return a file of a cache entry; the first process of a node to ask for it fills the entry.

    Args:
        identity: identifies the content, with its version.
        max_bytes: the largest size of the entry, while it is filled, too.
        fill: writes the content into an empty folder.
        name: the file in the entry; "" for the entry's folder.

    Raises:
        MissingResource: there is no room for it, or the cache's disk fails.
    """
    root = folder()
    entry = root / digest(identity.encode())
    target = entry / name  # checked itself: cleaners of temporary files leave folders behind
    with _disk_errors(root, max_bytes):
        while True:
            lock = open_locked(_lock_of(entry), fcntl.LOCK_SH)
            if target.exists():
                os.utime(lock)
                return Lease(str(target), lock)
            os.close(lock)
            lock = open_locked(_lock_of(entry), fcntl.LOCK_EX)
            try:
                if not target.exists():
                    _fill(entry, lock, max_bytes, fill)
            finally:
                os.close(lock)


def folder() -> Path:
    """Return the cache's folder; create it if it does not exist.

    Raises:
        MissingResource: it cannot be created, or others have access to the default folder.
    """
    setting = os.environ.get("RAYLARGE_CACHE")
    root = Path(setting or Path(tempfile.gettempdir()) / f"raylarge-cache-{os.getuid()}")
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = root.lstat()
    except OSError as error:
        raise MissingResource(
            f"the file needs a cache, and {root} cannot be made ({error.strerror}); set "
            "RAYLARGE_CACHE= to a folder that can be written."
        ) from error
    # Anybody may create a folder of this name in the shared temporary folder.
    ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
    if not setting and (not ours or status.st_mode & 0o077):
        raise MissingResource(
            f"the file needs a cache, and {root} is no folder of yours that is closed to others "
            f"(owner {status.st_uid}, mode {stat.S_IMODE(status.st_mode):o}); remove it, or set "
            "RAYLARGE_CACHE= to a folder of your own."
        )
    return root


@contextmanager
def _disk_errors(root: Path, max_bytes: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise MissingResource(
                f"the file does not fit on the disk of the cache {root} ({max_bytes:,} bytes at "
                "most); free space there, or set RAYLARGE_CACHE= to a folder on a larger disk."
            ) from error
        raise MissingResource(
            f"the file cannot be kept in the cache {root} ({error}); set RAYLARGE_CACHE= to a "
            "folder that can be written."
        ) from error


def _capacity(root: Path) -> int:
    setting = os.environ.get("RAYLARGE_CACHE_BYTES", "")
    if not setting:
        return min(_DEFAULT_BYTES, shutil.disk_usage(root).total // 2)
    if not setting.isdigit():
        raise MissingResource(
            f"the file needs the cache, and RAYLARGE_CACHE_BYTES={setting} is no number of bytes; "
            "set it to one such as 64000000000."
        )
    return int(setting)


def _lock_of(entry: Path) -> Path:
    return entry.with_name(f"{entry.name}.lock")


def _part_of(entry: Path) -> Path:
    return entry.with_name(f".{entry.name}.part")


def _fill(entry: Path, lock: int, max_bytes: int, fill: Callable[[Path], None]) -> None:
    part = _part_of(entry)
    os.truncate(lock, 0)  # the share of a killed process
    for path in (part, entry):
        shutil.rmtree(path, ignore_errors=True)
    try:
        _reserve(entry.parent, lock, max_bytes)
        part.mkdir()
        fill(part)
        os.truncate(lock, _synced_bytes(part))
        os.replace(part, entry)
    except BaseException:
        os.truncate(lock, 0)
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _reserve(root: Path, lock: int, max_bytes: int) -> None:
    """Reserve a share of the capacity as soon as there is room for it."""
    capacity, deadline = _capacity(root), time.monotonic() + WAIT_S
    need = (
        f"the file needs up to {max_bytes:,} bytes of the cache {root}, which may hold {capacity:,}"
    )
    if max_bytes > capacity:
        raise MissingResource(f"{need}; set RAYLARGE_CACHE_BYTES= higher.")
    warned = False
    while (used := _try_reserve(root, lock, max_bytes, capacity)) is not None:
        if time.monotonic() > deadline:
            raise MissingResource(
                f"{need} and had {used:,} in use for {WAIT_S:g} s; set RAYLARGE_CACHE_BYTES= "
                "higher, or have fewer in use at once."
            )
        if not warned:
            logger.warning(
                "entries in use fill the cache %s (%s of %s bytes); waiting for room "
                "(RAYLARGE_CACHE_BYTES= sets its size)",
                root,
                f"{used:,}",
                f"{capacity:,}",
            )
        warned = True
        # SystemRandom leaves the global generator alone.
        time.sleep(POLL_S * random.SystemRandom().uniform(0.5, 1.5))


def _try_reserve(root: Path, lock: int, max_bytes: int, capacity: int) -> int | None:
    """Reserve a share and return None; else the bytes in use. One process at a time does this."""
    mutex = open_locked(root / ".room", fcntl.LOCK_EX)
    try:
        shares = {path: path.stat() for path in root.glob("*.lock")}
        used = sum(share.st_size for share in shares.values())
        for path, share in sorted(shares.items(), key=lambda item: item[1].st_mtime_ns):
            if used + max_bytes <= capacity:
                break
            used -= share.st_size if _evict(path) else 0
        if used + max_bytes > capacity:
            return used
        os.truncate(lock, max_bytes)
        return None
    finally:
        os.close(mutex)


def _evict(path: Path) -> bool:
    """Remove the entry of a lock file; return False if it is in use."""
    try:
        lock = open_locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    entry = path.with_suffix("")
    try:
        shutil.rmtree(entry, ignore_errors=True)
        shutil.rmtree(_part_of(entry), ignore_errors=True)
        path.unlink()
    finally:
        os.close(lock)
    return True


def _synced_bytes(part: Path) -> int:
    """Sync all files of a folder to the disk; return their size."""
    total = 0
    for path in part.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
            total += path.stat().st_size
    return total
