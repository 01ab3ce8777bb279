"""What becomes of a failure of a disk or of an object store: patience, or a sentence.

    nothing there, or a condition does not hold     FileNotFoundError, Unmet: for the caller
    server away or busy, connection cut, bytes lost again after 0.2 s, 0.4 s ... 8 s (less by
                                                    chance), for PATIENCE_S after the first
    anything else, or patience at its end           UserError: path, what failed, the cure

This is the only loop: botocore and s3fs get one attempt each. With their own (5 times 5, some
calls 5 times more) a server that hangs would be waited for during half an hour.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import fsspec

from raylarge.errors import UserError
from raylarge.storage.web import scrubbed, shown

PATIENCE_S = 60.0  # RAYLARGE_STORAGE_PATIENCE_S replaces it
CONNECTIONS = 64  # of one process: its threads share a session
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 8.0

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Codes that pass whatever their status; with one of 408, 409, 429 and 5xx any code does.
_PASSING = {
    *("RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch"),
    *("SlowDown", "InternalError", "ServiceUnavailable", "OperationAborted"),
}
# Names instead of classes: who works on a disk alone never imports botocore.
_PASSING_NAMES = {"OSError", "TimeoutError", "BotoCoreError", "ClientError"}  # the last: aiohttp's
_SETTLED_NAMES = {
    *("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "NoRegionError"),
    *("ParamValidationError", "PermissionError", "IsADirectoryError", "NotADirectoryError"),
}

_session: dict[tuple[Any, ...], Any] = {}  # at most one: of this process and its environment
_opening = threading.Lock()


class Unmet(Exception):
    """A condition of a request (the object is the same as before) does not hold."""


def patience_s() -> float:
    """For how long failures of an object store that may pass are borne.

    Raises:
        UserError: RAYLARGE_STORAGE_PATIENCE_S is no number above 0.
    """
    given = os.environ.get("RAYLARGE_STORAGE_PATIENCE_S") or PATIENCE_S
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UserError(f"RAYLARGE_STORAGE_PATIENCE_S={given}: give seconds, a number above 0.")
    return seconds


def is_local(path: str) -> bool:
    """Whether a path names the local disk."""
    return "://" not in path or path.startswith("file://")


def filesystem(path: str) -> tuple[Any, str]:
    """The file system of a path, and the path in it; it remembers no listings.

    All threads share one S3 session, as long as the environment's AWS_ variables are the same.

    Raises:
        UserError: nothing here can open such a path.
    """
    if path.startswith(("s3://", "s3a://")):
        fs = _s3()
        return fs, fs._strip_protocol(path)
    try:
        fs, root = fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise UserError(f"{shown(path)} cannot be opened ({error}); check the path.") from error
    fs.invalidate_cache()
    return fs, root


def patiently(path: str, action: Callable[[Any, str], T]) -> T:
    """What an action answers when called with a path's file system and the path in it.

    The action is called again after failures that may pass: it must bear that.

    Raises:
        FileNotFoundError: nothing stands there.
        Unmet: a condition that the action set does not hold.
        UserError: it failed for good, or for longer than the patience.
    """
    if is_local(path):
        with on_disk(path):
            return action(*filesystem(path))
    started, failures = 0.0, 0
    while True:
        fs, root = filesystem(path)
        try:
            return action(fs, root)
        except Exception as error:
            what = _what_passes(path, error)
            started = started or time.monotonic()
            left = started + patience_s() - time.monotonic()
            if left <= 0:
                raise UserError(_given_up(path, what)) from error
        if not failures:
            logger.warning("%s: %s; trying again for %g s", shown(path), what, patience_s())
        elif failures % 4 == 3 and _session.get(_key()) is fs:
            _session.clear()  # addresses and credentials are looked up anew, which is dear
        wait = min(FIRST_WAIT_S * 2**failures, LONGEST_WAIT_S)
        wait *= random.SystemRandom().uniform(0.5, 1)  # nobody's seed is touched
        time.sleep(min(wait, left))  # so the last attempt is at the end of the patience
        failures += 1


@contextmanager
def on_disk(path: str) -> Iterator[None]:
    """Failures of a disk as sentences; that a file is missing is for the caller.

    Raises:
        UserError: the disk is full or may not be written, a folder is in the way, ...
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno is None:  # pyarrow about a file's content
            raise
        raise UserError(
            f"{path}: {error.strerror}; make room, change the rights, or choose another path."
        ) from error


def _what_passes(path: str, error: Exception) -> str:
    """What failed, in words, if it may pass; everything else is raised."""
    if isinstance(error, UserError | Unmet):
        raise error
    chain = _chain(error)
    code, status, message = next((a for one in chain if (a := _answer(one))), ("", 0, ""))
    if isinstance(error, FileNotFoundError) and code != "NoSuchBucket":
        raise error
    if status == 412:
        raise Unmet(path) from error
    names = {kind.__name__ for one in chain for kind in type(one).__mro__}
    settled = isinstance(error, ValueError) or bool(names & _SETTLED_NAMES)
    if code:
        what = f"the store answers {code} ({message})"
        passes = code in _PASSING or status in (408, 409, 429) or (status >= 500 and status != 501)
    else:
        what = _brief(error)
        passes = bool(names & _PASSING_NAMES) and not settled
    if passes:
        return what
    if code or settled:
        raise UserError(
            f"{shown(path)}: {what}; check the path, the credentials (AWS_ACCESS_KEY_ID, "
            f"AWS_SECRET_ACCESS_KEY) and what they allow, AWS_ENDPOINT_URL, AWS_DEFAULT_REGION."
        ) from error
    raise error


def _chain(error: BaseException | None) -> list[BaseException]:
    """An error and what it came from."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _answer(error: BaseException) -> tuple[str, int, str] | None:
    """Code, status and message of a server's answer, if an error carries one."""
    response = getattr(error, "response", None)
    if not isinstance(response, dict) or "Error" not in response:
        return None
    told = response["Error"]
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return str(told.get("Code", status)), int(status), str(told.get("Message", ""))


def _brief(error: Exception) -> str:
    """What an error says, for the middle of a sentence."""
    nothing = "no answer in time" if isinstance(error, TimeoutError) else type(error).__name__
    text = scrubbed(" ".join((str(error) or nothing).split()).rstrip("."))
    return text if len(text) < 200 else f"{text[:200]}..."


def _given_up(path: str, what: str) -> str:
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    server = next(filter(None, map(os.environ.get, names)), "the store's own address")
    return (
        f"{shown(path)}: {what}, for {patience_s():g} s; see that the server ({server}) is up and "
        f"reached from here, then run the same again (RAYLARGE_STORAGE_PATIENCE_S= waits longer)."
    )


def _key() -> tuple[Any, ...]:
    """What a session depends on: a fork or another environment needs one of its own."""
    known = (item for item in os.environ.items() if item[0].startswith("AWS_"))
    return os.getpid(), patience_s(), *sorted(known)


def _s3() -> Any:
    """The session of this process."""
    key = _key()
    fs = _session.get(key)
    if fs is None:
        with _opening:  # of many threads that begin, one opens it: that costs 0.2 s
            fs = _session.get(key) or _opened()
            _session.clear()
            _session[key] = fs
    return fs


def _opened() -> Any:
    """A session with no attempts of its own, whose waits fit the patience."""
    wait = patience_s() / 2
    told = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    options = {
        "connect_timeout": min(5.0, wait),
        "read_timeout": wait,
        "max_pool_connections": CONNECTIONS,
        **told,
        "retries": {"total_max_attempts": 1, "mode": "standard"},
    }
    fs = fsspec.filesystem(
        "s3", config_kwargs=options, use_listings_cache=False, skip_instance_cache=True
    )
    fs.retries = 1
    return fs
