"""Retry requests to object stores; turn other failures of a disk or store into a `UserError`.

    nothing exists at the path, or a condition   FileNotFoundError, PreconditionFailed: the
    of the request fails                         caller handles them
    server down or busy, connection lost,        retried after 0.2 s, 0.4 s ... 8 s (with jitter),
    bytes missing                                for RETRY_S after the first failure
    anything else, or RETRY_S is over            UserError with path, failure and cure

botocore and s3fs get one attempt each, so that this is the only loop of retries: theirs would
multiply to half an hour for a server that hangs.
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
from raylarge.storage.web import redact_urls, redacted

RETRY_S = 60.0
"""RAYLARGE_STORAGE_PATIENCE_S replaces it."""
CONNECTIONS = 64
"""Of one process, whose threads share a session."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 8.0

logger = logging.getLogger(__name__)
T = TypeVar("T")

# These codes are transient whatever their status is; so is any code with 408, 409, 429 or 5xx.
_TRANSIENT_CODES = {
    *("RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch"),
    *("SlowDown", "InternalError", "ServiceUnavailable", "OperationAborted"),
}
# Names instead of classes: a process that only uses a local disk never imports botocore.
# ClientError is aiohttp's; botocore's carries a response.
_TRANSIENT_CLASSES = {"OSError", "TimeoutError", "BotoCoreError", "ClientError"}
_PERMANENT_CLASSES = {
    *("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "NoRegionError"),
    *("ParamValidationError", "PermissionError", "IsADirectoryError", "NotADirectoryError"),
}

_session: dict[tuple[Any, ...], Any] = {}  # at most one: of this process and its environment
_opening = threading.Lock()


class PreconditionFailed(Exception):
    """A condition of a request, such as an unchanged ETag, does not hold."""


def retry_s() -> float:
    """Return for how many seconds transient failures of an object store are retried.

    Raises:
        UserError: RAYLARGE_STORAGE_PATIENCE_S is not a number above 0.
    """
    value = os.environ.get("RAYLARGE_STORAGE_PATIENCE_S") or RETRY_S
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UserError(f"RAYLARGE_STORAGE_PATIENCE_S={value}: give seconds, a number above 0.")
    return seconds


def is_local(path: str) -> bool:
    """Return whether a path is on the local disk."""
    return "://" not in path or path.startswith("file://")


def filesystem(path: str) -> tuple[Any, str]:
    """Return the fsspec file system of a path, without cached listings, and the path in it.

    All threads share one S3 session while the environment's AWS_ variables stay the same.

    Raises:
        UserError: no installed package can open such a path.
    """
    if path.startswith(("s3://", "s3a://")):
        return _s3(), fsspec.core.strip_protocol(path)
    try:
        fs, root = fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise UserError(f"{redacted(path)} cannot be opened ({error}); check the path.") from error
    fs.invalidate_cache()
    return fs, root


def with_retries(path: str, action: Callable[[Any, str], T]) -> T:
    """Return `action(file system, path in it)`; call it again after transient failures.

    Raises:
        FileNotFoundError: nothing exists at the path.
        PreconditionFailed: a condition that the action set does not hold.
        UserError: a permanent failure, or transient ones for longer than `retry_s()`.
    """
    if is_local(path):
        with disk_errors(path):
            return action(*filesystem(path))
    first_failure_s, failures = 0.0, 0
    while True:
        fs, root = filesystem(path)
        try:
            return action(fs, root)
        except Exception as error:
            failure = _transient_failure(path, error)
            first_failure_s = first_failure_s or time.monotonic()
            left_s = first_failure_s + retry_s() - time.monotonic()
            if left_s <= 0:
                raise UserError(_gave_up(path, failure)) from error
        if not failures:
            logger.warning("%s: %s; trying again for %g s", redacted(path), failure, retry_s())
        elif failures % 4 == 3 and _session.get(_session_key()) is fs:
            _session.clear()  # resolve addresses and credentials again, which takes long
        wait_s = min(FIRST_WAIT_S * 2**failures, LONGEST_WAIT_S)
        wait_s *= random.SystemRandom().uniform(0.5, 1)  # leave the global generator alone
        time.sleep(min(wait_s, left_s))  # so that the last attempt is at the very end
        failures += 1


@contextmanager
def disk_errors(path: str) -> Iterator[None]:
    """Raise `UserError` for failures of the local disk, except FileNotFoundError."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError) or error.errno is None:  # pyarrow on bad content
            raise
        raise UserError(
            f"{path}: {error.strerror}; make room, change the rights, or choose another path."
        ) from error


def _transient_failure(path: str, error: Exception) -> str:
    """Return a description of a transient failure; raise any other error."""
    if isinstance(error, UserError | PreconditionFailed):
        raise error
    chain = _chain(error)
    code, status, message = next(filter(None, map(_response, chain)), ("", 0, ""))
    if isinstance(error, FileNotFoundError) and code != "NoSuchBucket":
        raise error
    if status == 412:
        raise PreconditionFailed(path) from error
    if code:
        failure = f"the store answers {code} ({message})"
        retried = status in (408, 409, 429) or (status >= 500 and status != 501)
        transient, permanent = retried or code in _TRANSIENT_CODES, True
    else:
        failure = _shortened(error)
        classes = {kind.__name__ for cause in chain for kind in type(cause).__mro__}
        permanent = isinstance(error, ValueError) or bool(classes & _PERMANENT_CLASSES)
        transient = bool(classes & _TRANSIENT_CLASSES) and not permanent
    if transient:
        return failure
    if permanent:
        raise UserError(
            f"{redacted(path)}: {failure}; check the path, the credentials (AWS_ACCESS_KEY_ID, "
            f"AWS_SECRET_ACCESS_KEY) and what they allow, AWS_ENDPOINT_URL, AWS_DEFAULT_REGION."
        ) from error
    raise error


def _chain(error: BaseException | None) -> list[BaseException]:
    """Return an error and its causes."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _response(error: BaseException) -> tuple[str, int, str] | None:
    """Return code, status and message of the server's response in a botocore error."""
    response = getattr(error, "response", None)
    if not isinstance(response, dict) or "Error" not in response:
        return None
    details = response["Error"]
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return str(details.get("Code", status)), int(status), str(details.get("Message", ""))


def _shortened(error: Exception) -> str:
    """Return an error's text on one line, for the middle of a sentence."""
    empty = "no answer in time" if isinstance(error, TimeoutError) else type(error).__name__
    text = redact_urls(" ".join((str(error) or empty).split()).rstrip("."))
    return text if len(text) < 200 else f"{text[:200]}..."


def _gave_up(path: str, failure: str) -> str:
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    server = next(filter(None, map(os.environ.get, names)), "the store's own address")
    return (
        f"{redacted(path)}: {failure}, for {retry_s():g} s; see that the server ({server}) is up "
        "and reached from here, then run the same again (RAYLARGE_STORAGE_PATIENCE_S= waits "
        "longer)."
    )


def _session_key() -> tuple[Any, ...]:
    """Return what a session depends on; a fork or another environment opens a new one."""
    aws = sorted(item for item in os.environ.items() if item[0].startswith("AWS_"))
    return os.getpid(), retry_s(), *aws


def _s3() -> Any:
    """Return the S3 session of this process."""
    key = _session_key()
    fs = _session.get(key)
    if fs is None:
        with _opening:  # one of many threads opens it, which takes 0.2 s
            fs = _session.get(key) or _open_session()
            _session.clear()
            _session[key] = fs
    return fs


def _open_session() -> Any:
    """Open an S3 session that does not retry and whose timeouts fit into `retry_s()`."""
    timeout_s = retry_s() / 2
    options = {
        "connect_timeout": min(5.0, timeout_s),
        "read_timeout": timeout_s,
        "max_pool_connections": CONNECTIONS,
        **fsspec.config.conf.get("s3", {}).get("config_kwargs", {}),
        "retries": {"total_max_attempts": 1, "mode": "standard"},
    }
    fs = fsspec.filesystem(
        "s3", config_kwargs=options, use_listings_cache=False, skip_instance_cache=True
    )
    fs.retries = 1
    return fs
