"""The node's cache: slides and checkpoints out of stores, images converted into tiles.

    RAYLARGE_CACHE        its folder; by default raylarge-cache-UID in the temporary folder, which
                          nobody else may read or write
    RAYLARGE_CACHE_BYTES  its cap; by default 64 GiB, or half of the disk where that is less

An entry is a folder NAME, made beside its place and renamed. NAME.lock is an empty sparse file
as long as the entry's share of the cap, touched at each use. Who reads an entry holds a shared
lock, who makes or evicts it an exclusive one; the least recently used go first. Where all are
in use, who needs room waits for it. What goes wrong is a `Lack`: no file's fault.
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

from raylarge.errors import Lack
from raylarge.storage.files import digest
from raylarge.storage.lock import locked

_DEFAULT_BYTES = 64 << 30
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a full disk says."""
PATIENCE_S = 1800.0
"""For how long others are waited for to let go of their entries."""
WAIT_S = 1.0
"""Between two looks, on average."""

logger = logging.getLogger(__name__)


class Held:
    """A local file (or folder) that stays where it is until it is closed."""

    def __init__(self, path: str, lock: int | None = None) -> None:
        """Take over an open lock file, if there is one."""
        self.path = path
        self._lock = lock

    def close(self) -> None:
        """Let it be evicted."""
        if self._lock is not None:
            os.close(self._lock)
        self._lock = None


def hold(identity: str, need_bytes: int, make: Callable[[Path], None], name: str) -> Held:
    """An entry of the cache, made where it is not there yet; one process of a node makes it.

    Args:
        identity: what the entry is, with its version.
        need_bytes: the most room it may take while it is made.
        make: fills an empty folder.
        name: what the caller wants in that folder.

    Raises:
        Lack: there is no room for it, now or ever, or the cache's disk fails.
    """
    root = folder()
    entry = root / digest(identity.encode())
    wanted = entry / name  # looked for itself: who tidies temporary files leaves folders behind
    with _on_disk(root, need_bytes):
        while True:
            lock = locked(_lock_of(entry), fcntl.LOCK_SH)
            if wanted.exists():
                os.utime(lock)
                return Held(str(wanted), lock)
            os.close(lock)
            lock = locked(_lock_of(entry), fcntl.LOCK_EX)
            try:
                if not wanted.exists():
                    _make(entry, lock, need_bytes, make)
            finally:
                os.close(lock)


def folder() -> Path:
    """The cache's folder, made where it is not there yet.

    Raises:
        Lack: it cannot be made, or the default one is not ours alone.
    """
    given = os.environ.get("RAYLARGE_CACHE")
    root = Path(given or Path(tempfile.gettempdir()) / f"raylarge-cache-{os.getuid()}")
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = root.lstat()
    except OSError as error:
        raise Lack(
            f"needs a cache, and {root} cannot be made ({error.strerror}); set RAYLARGE_CACHE= "
            "to a folder that can be written."
        ) from error
    # Anybody may make a folder of this name where all keep their temporary files.
    ours = stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid()
    if not given and (not ours or facts.st_mode & 0o077):
        raise Lack(
            f"needs a cache, and {root} is no folder of yours that is closed to others (owner "
            f"{facts.st_uid}, mode {stat.S_IMODE(facts.st_mode):o}); remove it, or set "
            "RAYLARGE_CACHE= to a folder of your own."
        )
    return root


@contextmanager
def _on_disk(root: Path, need_bytes: int) -> Iterator[None]:
    """Failures of the cache's disk as ends of sentences."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise Lack(
                f"does not fit on the disk of the cache {root} ({need_bytes:,} bytes at most); "
                "free space there, or set RAYLARGE_CACHE= to a folder on a larger disk."
            ) from error
        raise Lack(
            f"cannot be kept in the cache {root} ({error}); set RAYLARGE_CACHE= to a folder that "
            "can be written."
        ) from error


def _cap_bytes(root: Path) -> int:
    wish = os.environ.get("RAYLARGE_CACHE_BYTES", "")
    if not wish:
        return min(_DEFAULT_BYTES, shutil.disk_usage(root).total // 2)
    if not wish.isdigit():
        raise Lack(
            f"needs the cache, and RAYLARGE_CACHE_BYTES={wish} is no number of bytes; set it to "
            "one such as 64000000000."
        )
    return int(wish)


def _lock_of(entry: Path) -> Path:
    return entry.with_name(f"{entry.name}.lock")


def _part_of(entry: Path) -> Path:
    return entry.with_name(f".{entry.name}.part")


def _make(entry: Path, lock: int, need_bytes: int, make: Callable[[Path], None]) -> None:
    part = _part_of(entry)
    os.truncate(lock, 0)  # what a killed process reserved
    for left in (part, entry):
        shutil.rmtree(left, ignore_errors=True)
    try:
        _reserve(entry.parent, lock, need_bytes)
        part.mkdir()
        make(part)
        os.truncate(lock, _synced_bytes(part))
        os.replace(part, entry)
    except BaseException:
        os.truncate(lock, 0)
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _reserve(root: Path, lock: int, need_bytes: int) -> None:
    """Take a share of the cap, as soon as others leave room for it."""
    cap, until = _cap_bytes(root), time.monotonic() + PATIENCE_S
    if need_bytes > cap:
        raise Lack(
            f"needs up to {need_bytes:,} bytes of the cache {root}, which may hold {cap:,}; set "
            "RAYLARGE_CACHE_BYTES= higher."
        )
    waits = False
    while (used := _taken(root, lock, need_bytes, cap)) is not None:
        if time.monotonic() > until:
            raise Lack(
                f"needs up to {need_bytes:,} bytes of the cache {root}, which may hold {cap:,} and "
                f"had {used:,} in use for {PATIENCE_S:g} s; set RAYLARGE_CACHE_BYTES= higher, or "
                "have fewer in use at once."
            )
        if not waits:
            logger.warning(
                "what is in use fills the cache %s (%s of %s bytes); waiting for room "
                "(RAYLARGE_CACHE_BYTES= sets its size)",
                root,
                f"{used:,}",
                f"{cap:,}",
            )
        waits = True
        time.sleep(WAIT_S * random.SystemRandom().uniform(0.5, 1.5))  # nobody's seed is touched


def _taken(root: Path, lock: int, need_bytes: int, cap: int) -> int | None:
    """None where the share could be taken, else what is in use; one process at a time looks."""
    room = locked(root / ".room", fcntl.LOCK_EX)
    try:
        shares = {path: path.stat() for path in root.glob("*.lock")}
        used = sum(share.st_size for share in shares.values())
        for path, share in sorted(shares.items(), key=lambda item: item[1].st_mtime_ns):
            if used + need_bytes <= cap:
                break
            used -= share.st_size if _evicted(path) else 0
        if used + need_bytes > cap:
            return used
        os.truncate(lock, need_bytes)
        return None
    finally:
        os.close(room)


def _evicted(path: Path) -> bool:
    """Whether an entry could be removed: not while anybody holds its lock."""
    try:
        lock = locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
    """The size of all files in a folder, once they are on the disk."""
    total = 0
    for path in part.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
            total += path.stat().st_size
    return total
