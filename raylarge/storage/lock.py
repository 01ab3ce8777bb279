"""Lock a folder, so that one command at a time writes to it.

    with exclusive("data", "prepare"):          # UserError if another command writes to it
        ...

    local folder   FOLDER/.lock under `flock`, which the kernel releases when the process ends
    object store   FOLDER/.lock is created only where none exists, and rewritten every RENEW_S. It
                   may be replaced if its process has ended (on the same machine), or if nobody
                   has rewritten it for STALE_S.

The file names the holder (command, host, process, start time) and is removed at the end.
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
from raylarge.storage.retry import PreconditionFailed, disk_errors, is_local

NAME = ".lock"
RENEW_S = 10.0
"""Interval between two renewals of a lock in an object store."""
STALE_S = 60.0
"""A lock that was not renewed for this long may be replaced."""
_REMOVALS = 100
"""How often the folder of a lock may vanish while it is being locked."""
_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""Errors of a file system without `flock`."""

_active_tokens: set[str] = set()
"""Tokens of the locks that this process holds or is acquiring in object stores."""

logger = logging.getLogger(__name__)


class InUse(UserError):
    """Another running process writes to a folder."""


@contextmanager
def exclusive(folder: str, purpose: str) -> Iterator[Callable[[], None]]:
    """Keep other commands out of a folder while the block runs.

    Args:
        folder: a path or URL; a local folder is created.
        purpose: the command, for the message that others get ("prepare").

    Yields:
        A function that raises `UserError` if another command has replaced the lock, which can
        only happen to a lock in an object store that was not renewed for STALE_S. It is also
        called at the end of the block.

    Raises:
        InUse: another running process writes to the folder.
        UserError: the folder cannot be created.
    """
    path, holder = join(absolute(folder), NAME), _holder(purpose)
    with _file_lock(path, holder) if is_local(folder) else _object_lock(path, holder) as check:
        yield check
        check()


def open_locked(path: Path, operation: int) -> int:
    """Open a lock file, lock it by `flock(operation)` and return its descriptor.

    The file is opened again if another process removed it before it was locked.

    Raises:
        BlockingIOError: another process holds the lock, and `operation` includes LOCK_NB.
    """
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, operation)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), os.stat(path)):
                    return lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


@contextmanager
def _file_lock(path: str, holder: dict[str, Any]) -> Iterator[Callable[[], None]]:
    """Hold an exclusive `flock`; none, with a warning, if the file system has no locks."""
    file = Path(path)
    new_folder = not file.parent.exists()
    lock = _lock_in_folder(file)
    if lock is None:
        yield lambda: None
        return
    try:
        os.truncate(lock, 0)
        os.write(lock, _encode(holder))
        yield lambda: None
    finally:
        file.unlink(missing_ok=True)
        os.close(lock)
        if new_folder:
            with suppress(OSError):  # it has content
                file.parent.rmdir()


def _lock_in_folder(file: Path) -> int | None:
    """Create the folder of a lock file and lock the file, although others may remove the folder."""
    with disk_errors(str(file.parent)):
        for _ in range(_REMOVALS):
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
            except FileNotFoundError:  # such as below /proc
                break
            with suppress(FileNotFoundError):
                return _try_flock(file)
    raise UserError(f"{file.parent} cannot be created; choose another path.")


def _try_flock(file: Path) -> int | None:
    try:
        return open_locked(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        content = file.read_bytes() if file.exists() else b""
        raise _in_use(str(file), _decode(content)) from error
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        logger.warning("%s has no file locks; do not run two commands in it", file.parent)
        return None


@contextmanager
def _object_lock(path: str, holder: dict[str, Any]) -> Iterator[Callable[[], None]]:
    """Hold a lock in an object store, renewed by a thread."""
    lock, ended = _ObjectLock(path, holder), threading.Event()
    thread = threading.Thread(target=lock.renew_until, args=(ended,), daemon=True)
    _active_tokens.add(holder["token"])
    try:
        lock.acquire()
        thread.start()
        try:
            yield lock.check
        finally:
            ended.set()
            thread.join()
            lock.release()
    finally:
        _active_tokens.discard(holder["token"])


class _ObjectLock:
    """An object that names the process which writes to its folder."""

    def __init__(self, path: str, holder: dict[str, Any]) -> None:
        self._path, self._holder = path, holder
        self._etag: str | None = None
        self._lost = False

    def acquire(self) -> None:
        """Create the object, or replace an abandoned one; raise `InUse` for a live one."""
        while (other := self._read()) is None or not self._is_mine(other):
            if other is not None and not self._is_abandoned(other):
                cure = f" If that process has ended, wait {STALE_S:g} s or remove {self._path}."
                raise _in_use(self._path, other, cure)
            with suppress(PreconditionFailed, FileNotFoundError):  # another process was faster
                self._write()  # then read again: a store may ignore conditions

    def renew_until(self, ended: threading.Event) -> None:
        """Renew the lock until an event, or until another process has replaced it."""
        while not self._lost and not ended.wait(RENEW_S):
            try:
                self._renew()
            except UserError as error:
                logger.warning("the lock %s could not be renewed: %s", self._path, error)

    def check(self) -> None:
        """Raise `UserError` if another process has replaced the lock."""
        if self._lost:
            raise UserError(
                f"another command has taken over {_folder_of(self._path)}, because this one could "
                f"not renew {self._path} for {STALE_S:g} s; run it again when the other has ended."
            )

    def release(self) -> None:
        """Remove the lock, unless another process has replaced it."""
        with suppress(UserError):  # it becomes stale soon
            if not self._lost and self._is_mine(self._read()):
                objects.remove([self._path])

    def _renew(self) -> None:
        try:
            self._write()
        except (PreconditionFailed, FileNotFoundError):
            # It is still ours if it was written and only the response got lost.
            self._lost = not self._is_mine(self._read())

    def _write(self) -> None:
        content = _encode({**self._holder, "renewed": time.time()})
        self._etag = objects.put_if(self._path, content, self._etag)

    def _is_mine(self, other: dict[str, Any] | None) -> bool:
        return other is not None and other.get("token") == self._holder["token"]

    def _read(self) -> dict[str, Any] | None:
        """Return the current holder, None if there is none; remember the object's version."""
        while True:
            with suppress(PreconditionFailed):  # replaced between the two requests
                try:
                    source = objects.Ranges(self._path)
                    holder = _decode(source.read())
                except FileNotFoundError:
                    self._etag = None
                    return None
                self._etag = source.etag
                return holder

    def _is_abandoned(self, other: dict[str, Any]) -> bool:
        """Return whether a lock is no longer renewed; read it twice, as clocks of hosts differ."""
        if other.get("machine") == self._holder["machine"]:
            # If the store failed at the end of an earlier block of this process, its lock stayed.
            mine = other.get("process") == os.getpid()
            return not _is_alive(other) or (mine and other.get("token") not in _active_tokens)
        if time.time() - other.get("renewed", 0) < STALE_S:
            return False
        logger.warning("%s seems abandoned; watching it for %g s", self._path, 2 * RENEW_S)
        time.sleep(2 * RENEW_S)
        return self._read() in (other, None)


def _holder(purpose: str) -> dict[str, Any]:
    """Return what a lock says of this process: for messages, and to tell whether it runs."""
    return {
        "purpose": purpose,
        "host": socket.gethostname(),
        "machine": _machine(),
        "process": os.getpid(),
        "born": _start_ticks(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "token": uuid.uuid4().hex,
    }


def _machine() -> str:
    """Return the identity of the kernel and process namespace in which process ids are valid."""
    words = [socket.gethostname()]
    with suppress(OSError):
        words.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        words.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(words)


def _is_alive(holder: dict[str, Any]) -> bool:
    """Return whether a process of this machine still runs, not a later one of the same id."""
    try:
        os.kill(int(holder["process"]), 0)
    except (ProcessLookupError, KeyError, ValueError):
        return False
    except PermissionError:  # it belongs to another user
        pass
    return _start_ticks(holder["process"]) == holder.get("born")


def _start_ticks(process: int) -> str:
    """Return when a process started, in the kernel's ticks; "" without /proc."""
    with suppress(OSError, IndexError):
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[19]
    return ""


def _encode(holder: dict[str, Any]) -> bytes:
    return (json.dumps(holder, sort_keys=True) + "\n").encode()


def _decode(content: bytes) -> dict[str, Any]:
    """Return the content of a lock file; {} if it is damaged or not written yet."""
    try:
        holder = json.loads(content)
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _folder_of(path: str) -> str:
    return path.rsplit("/", 1)[0]


def _in_use(path: str, other: dict[str, Any], cure: str = "") -> InUse:
    command = other.get("purpose", "another command")
    process = f"process {other.get('process', '?')} on {other.get('host', '?')}"
    return InUse(
        f"{_folder_of(path)} is in use: {command} has been writing to it since "
        f"{other.get('since', 'just now')} ({process}); wait until it ends, stop it, or give "
        f"another out=.{cure}"
    )
