"""One command at a time writes to a folder.

    with exclusive("data", "prepare"):          # UserError if another command writes to it
        ...

    on a disk           FOLDER/.lock under `flock`: the kernel frees it when the process ends
    in an object store  FOLDER/.lock is a lease: created only where none stands, renewed every
                        RENEW_S. It is taken over when its process no longer exists (on the same
                        machine), or when nobody has renewed it for STALE_S.

The file says who writes (command, host, process, since when) and is removed at the end.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from raylarge.errors import UserError
from raylarge.storage import objects
from raylarge.storage.folders import absolute, join
from raylarge.storage.patience import Unmet, is_local, on_disk

NAME = ".lock"
RENEW_S = 10.0
"""Between two renewals of a lease."""
STALE_S = 60.0
"""A lease that was not renewed for so long may be taken over."""
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""What a file system without `flock` says."""

_own_tokens: set[str] = set()
"""Of the leases that blocks of this process hold or are about to take."""

logger = logging.getLogger(__name__)


class InUse(UserError):
    """Another live process writes to a folder."""


@contextmanager
def exclusive(folder: str, purpose: str) -> Iterator[Callable[[], None]]:
    """Keep other commands out of a folder while the block runs.

    Args:
        folder: a path or URL; a local folder is created.
        purpose: what the command does, for the message that others get ("prepare").

    Yields:
        A function that raises `UserError` once another command has taken the folder over, which
        happens only to a lease that could not be renewed for STALE_S. It is also called at the
        end of the block.

    Raises:
        InUse: another live process writes to the folder.
        UserError: the folder cannot be created.
    """
    path, holder = join(absolute(folder), NAME), _holder(purpose)
    with _file_lock(path, holder) if is_local(folder) else _lease(path, holder) as check:
        yield check
        check()


def locked(path: Path, kind: int) -> int:
    """An open, locked lock file; wait for it unless `kind` has LOCK_NB.

    The lock is taken again where another process removed the file meanwhile.

    Raises:
        BlockingIOError: another process has locked it, and `kind` has LOCK_NB.
    """
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, kind)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), os.stat(path)):
                    return lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


@contextmanager
def _file_lock(path: str, holder: dict[str, Any]) -> Iterator[Callable[[], None]]:
    """An exclusive `flock`; none, with a warning, where the file system has no locks."""
    file = Path(path)
    new_folder = not file.parent.exists()
    try:
        with on_disk(str(file.parent)):
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = _locked_or_none(file)
    except FileNotFoundError as error:  # such as below /proc
        raise UserError(f"{file.parent} cannot be created; choose another path.") from error
    if lock is None:
        yield lambda: None
        return
    try:
        os.truncate(lock, 0)
        os.write(lock, _encoded(holder))
        yield lambda: None
    finally:
        with suppress(FileNotFoundError):
            file.unlink()
        os.close(lock)
        if new_folder:
            with suppress(OSError):  # it has content
                file.parent.rmdir()


def _locked_or_none(file: Path) -> int | None:
    try:
        return locked(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        content = file.read_bytes() if file.exists() else b""
        raise _in_use(str(file), _decoded(content), "") from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning("%s has no file locks; do not run two commands in it", file.parent)
        return None


@contextmanager
def _lease(path: str, holder: dict[str, Any]) -> Iterator[Callable[[], None]]:
    """A lease in an object store, renewed by a thread."""
    lease = _Lease(path, holder)
    ended = threading.Event()
    thread = threading.Thread(target=lease.renew_until, args=(ended,), daemon=True)
    _own_tokens.add(holder["token"])
    try:
        lease.acquire()
        thread.start()
        try:
            yield lease.check
        finally:
            ended.set()
            thread.join()
            lease.release()
    finally:
        _own_tokens.discard(holder["token"])


class _Lease:
    """An object that says who writes to its folder."""

    def __init__(self, path: str, holder: dict[str, Any]) -> None:
        self._path, self._holder = path, holder
        self._etag: str | None = None
        self._lost = False

    def acquire(self) -> None:
        """Create the lease, or replace one that nobody renews."""
        while True:
            try:
                other, self._etag = self._read()
            except FileNotFoundError:
                other, self._etag = None, None
            if other is not None and other.get("token") == self._holder["token"]:
                return
            if other is not None and not self._abandoned(other):
                cure = f" If that process has ended, wait {STALE_S:g} s or remove {self._path}."
                raise _in_use(self._path, other, cure)
            with suppress(Unmet, FileNotFoundError):  # another process was faster
                self._write()

    def renew_until(self, ended: threading.Event) -> None:
        """Renew the lease until an event, or until another process has taken it over."""
        while not self._lost and not ended.wait(RENEW_S):
            try:
                self._renew()
            except UserError as error:
                logger.warning("the lease of %s could not be renewed: %s", self._path, error)

    def check(self) -> None:
        """Raise UserError if another process has taken the lease over."""
        if self._lost:
            raise UserError(
                f"another command has taken over {_folder_of(self._path)}, because this one could "
                f"not renew {self._path} for {STALE_S:g} s; run it again when the other has ended."
            )

    def release(self) -> None:
        """Remove the lease, unless it belongs to another process by now."""
        with suppress(UserError):  # it will be stale soon
            if not self._lost and self._is_mine():
                objects.remove([self._path])

    def _renew(self) -> None:
        try:
            self._write()
        except (Unmet, FileNotFoundError):
            self._lost = not self._is_mine()  # ours: written, though the answer was lost

    def _write(self) -> None:
        content = _encoded({**self._holder, "renewed": time.time()})
        self._etag = objects.put_if(self._path, content, self._etag)

    def _is_mine(self) -> bool:
        try:
            other, self._etag = self._read()
        except FileNotFoundError:
            return False
        return bool(other.get("token") == self._holder["token"])

    def _read(self) -> tuple[dict[str, Any], str | None]:
        """Who has the lease, and the version of the object."""
        while True:
            source = objects.Ranges(self._path)
            with suppress(Unmet):  # written anew meanwhile
                return _decoded(source.read()), source.etag

    def _abandoned(self, other: dict[str, Any]) -> bool:
        """Whether nobody renews a lease any more; looks twice, as clocks of hosts differ."""
        if other.get("machine") == self._holder["machine"]:
            mine = other.get("process") == os.getpid()
            # Where the store was away at the end of a block, its lease stayed.
            return not _is_alive(other) or (mine and other.get("token") not in _own_tokens)
        if time.time() - other.get("renewed", 0) < STALE_S:
            return False
        logger.warning("%s seems abandoned; watching it for %g s", self._path, 2 * RENEW_S)
        time.sleep(2 * RENEW_S)
        try:
            return self._read()[0] == other
        except FileNotFoundError:
            return True


def _holder(purpose: str) -> dict[str, Any]:
    """Who writes: what others are told, and what tells them whether it still runs."""
    return {
        "purpose": purpose,
        "host": socket.gethostname(),
        "machine": _machine(),
        "process": os.getpid(),
        "born": _born(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "token": uuid.uuid4().hex,
    }


def _machine() -> str:
    """What processes that see each other's numbers have in common."""
    words = [socket.gethostname()]
    with suppress(OSError):
        words.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        words.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(words)


def _is_alive(holder: dict[str, Any]) -> bool:
    """Whether a process of this machine still runs (and is no later one of the same number)."""
    try:
        os.kill(int(holder["process"]), 0)
    except (ProcessLookupError, KeyError, ValueError):
        return False
    except PermissionError:  # somebody else's
        pass
    return _born(holder["process"]) == holder.get("born")


def _born(process: int) -> str:
    """When a process started, in the kernel's ticks; nothing where /proc does not say."""
    with suppress(OSError, IndexError):
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[19]
    return ""


def _encoded(holder: dict[str, Any]) -> bytes:
    return (json.dumps(holder, sort_keys=True) + "\n").encode()


def _decoded(content: bytes) -> dict[str, Any]:
    """What a lock file says; nothing where it is damaged or not written yet."""
    try:
        holder = json.loads(content)
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _folder_of(path: str) -> str:
    return path.rsplit("/", 1)[0]


def _in_use(path: str, other: dict[str, Any], cure: str) -> InUse:
    who = other.get("purpose", "another command")
    process = f"process {other.get('process', '?')} on {other.get('host', '?')}"
    return InUse(
        f"{_folder_of(path)} is in use: {who} has been writing to it since "
        f"{other.get('since', 'just now')} ({process}); wait until it ends, stop it, or give "
        f"another out=.{cure}"
    )
