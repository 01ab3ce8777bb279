"""What becomes of a failure of a disk or of an object store: patience, or a sentence.

    nothing there, or a condition does not hold     FileNotFoundError, Unmet: for the caller
    server away or busy, connection cut, bytes lost again after 0.2 s, 0.4 s ... 8 s (less by
                                                    chance), for PATIENCE_S after the first
    anything else, or patience at its end           UserError: path, what failed, the cure

This is the only loop: botocore and s3fs get one attempt each. With their own (5 times 5, some
calls 5 times more) a server that hangs would be waited for during half an hour.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import fsspec

from raylarge.errors import UserError

PATIENCE_S = 60.0  # RAYLARGE_STORAGE_PATIENCE_S replaces it
CONNECTIONS = 64  # of one process: its threads share a session
SLOWEST = 128 << 10  # bytes per second; whoever sends slower is taken for stuck
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 8.0

logger = logging.getLogger(__name__)
T = TypeVar("T")

_CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or renew the session"
_RIGHTS = "check the credentials, and what the bucket's policy allows them"
_SERVER = "check AWS_ENDPOINT_URL and AWS_DEFAULT_REGION"
_REFUSALS = {
    "NoSuchBucket": "the bucket does not exist; create it, or check the path",
    "InvalidBucketName": "this is no name of a bucket; check the path",
    "InvalidAccessKeyId": f"the store does not know these credentials; {_CREDENTIALS}",
    "SignatureDoesNotMatch": f"the store does not accept the secret key; {_CREDENTIALS}",
    "ExpiredToken": f"the credentials have expired; {_CREDENTIALS}",
    "InvalidToken": f"the store does not accept the session token; {_CREDENTIALS}",
    "AccessDenied": f"access denied; {_RIGHTS}",
    "403": f"access denied; {_RIGHTS}",  # the answer to HEAD has no other code
    "RequestTimeTooSkewed": "this machine's clock is wrong; set it",
    "PermanentRedirect": f"the bucket lies in another region; {_SERVER}",
    "301": f"the bucket lies in another region; {_SERVER}",
    "EntityTooLarge": "the store takes no object of this size; make smaller parts",
    "QuotaExceeded": "the store is full; free some space, or choose another bucket",
    "XMinioStorageFull": "the store is full; free some space, or choose another bucket",
}
_PASSING = {
    *("SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "InternalError"),
    *("RequestTimeout", "OperationAborted", "ConditionalRequestConflict", "ServiceUnavailable"),
    *("IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch", "408", "409", "429"),
}
# Names instead of classes: who works on a disk alone never imports botocore.
_PASSING_NAMES = {
    *("OSError", "HTTPClientError", "ConnectionError", "TimeoutError", "ResponseParserError"),
    *("IncompleteReadError", "IncompleteRead", "ResponseStreamingError", "ClientError"),
    *("ClientPayloadError", "FlexibleChecksumError", "CredentialRetrievalError"),
}
_SETTLED_NAMES = {
    "NoCredentialsError": f"there are no credentials; {_CREDENTIALS}",
    "PartialCredentialsError": f"half of the credentials is missing; {_CREDENTIALS}",
    "ProfileNotFound": "the profile in AWS_PROFILE does not exist; choose another",
    "ParamValidationError": "this is no path in an object store; check it",
    "NoRegionError": "no region is given; set AWS_DEFAULT_REGION",
    "PermissionError": f"access denied; {_RIGHTS}",
    "IsADirectoryError": "this is a folder; check the path",
    "NotADirectoryError": "this is no folder; check the path",
}
_DISK = {
    errno.ENOSPC: "the disk is full; free some space, or choose another folder",
    errno.EDQUOT: "your share of the disk is used up; free some space, or choose another folder",
    errno.EFBIG: "the file is larger than this disk or `ulimit -f` allows; choose another folder",
    errno.EACCES: "permission denied; change the rights, or choose another folder",
    errno.EPERM: "permission denied; change the rights, or choose another folder",
    errno.EROFS: "the disk is read-only; choose another folder",
    errno.EEXIST: "a file stands where a folder is needed; move it, or choose another path",
    errno.ENOTDIR: "a file stands where a folder is needed; move it, or choose another path",
    errno.EISDIR: "this is a folder; check the path",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
}

_session: dict[tuple[Any, ...], Any] = {}  # at most one: of this process and its environment
_answered: set[str] = set()  # endpoints that were there once


class Unmet(Exception):
    """A condition of a request (the object is new, or the same as before) does not hold."""


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


def sending_s(size: int) -> float:
    """After how long sending so many bytes is given up.

    The client's own timeouts only watch answers: a server that takes no bytes would be waited
    for without end, as would one that does not say `100 Continue`.
    """
    return patience_s() / 2 + size / SLOWEST


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
        raise UserError(f"{path} cannot be opened ({error}); check the path.") from error
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
            answer = action(fs, root)
        except Exception as error:
            what = _what_passes(path, error)
            started = started or time.monotonic()
            left = started + patience_s() - time.monotonic()
            if left <= 0:
                raise UserError(_given_up(path, what)) from error
        else:
            _answered.add(_endpoint())
            return answer
        if not failures:
            logger.warning("%s: %s; trying again for %g s", path, what, patience_s())
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
        what = _DISK.get(error.errno, f"{error.strerror}; check the disk")
        raise UserError(f"{path}: {what}.") from error


def _what_passes(path: str, error: Exception) -> str:
    """What failed, in words, if it may pass; everything else is raised."""
    if isinstance(error, UserError | Unmet):
        raise error
    chain = _chain(error)
    code, status, message = next((a for one in chain if (a := _answer(one))), ("", 0, ""))
    if code in _REFUSALS:
        raise UserError(f"{path}: {_REFUSALS[code]}.") from error
    if isinstance(error, FileNotFoundError):
        raise error
    if isinstance(error, FileExistsError) or status == 412:
        raise Unmet(path) from error
    if code:
        if code in _PASSING or status in (408, 429) or (status >= 500 and status != 501):
            return f"the store answers {code}"
        more = f"; {_RIGHTS}" if status == 403 else f"; {_SERVER}"
        raise UserError(f"{path}: the store refuses ({code}: {message}){more}.") from error
    names = [kind.__name__ for one in chain for kind in type(one).__mro__]
    for name in filter(_SETTLED_NAMES.__contains__, names):
        raise UserError(f"{path}: {_SETTLED_NAMES[name]} ({_brief(error)}).") from error
    if _is_misnamed(error, chain):
        raise UserError(f"{path}: {_brief(error)}; {_SERVER}.") from error
    if not _PASSING_NAMES & set(names):
        raise error
    return _brief(error)


def _is_misnamed(error: Exception, chain: list[BaseException]) -> bool:
    """Whether the server's address is wrong: no URL, another's, or one that never was there."""
    if isinstance(error, ValueError) and "Invalid endpoint" in str(error):
        return True
    nobody = any(isinstance(e, socket.gaierror) and e.errno == socket.EAI_NONAME for e in chain)
    return "CERTIFICATE" in str(error) or (nobody and _endpoint() not in _answered)


def _chain(error: BaseException | None) -> list[BaseException]:
    """An error and what it came from."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__ or getattr(error, "os_error", None)
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
    """An error's first line, for the middle of a sentence."""
    nothing = "no answer in time" if isinstance(error, TimeoutError) else type(error).__name__
    text = (str(error) or nothing).splitlines()[0].rstrip(".")
    return text if len(text) < 200 else f"{text[:200]}..."


def _given_up(path: str, what: str) -> str:
    return (
        f"{path}: {what}, for {patience_s():g} s; see that the server ({_endpoint()}) is up and "
        f"reached from here, then run the same again (RAYLARGE_STORAGE_PATIENCE_S= waits longer)."
    )


def _endpoint() -> str:
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        if os.environ.get(name):
            return os.environ[name]
    return "the store's own address"


def _key() -> tuple[Any, ...]:
    """What a session depends on: a fork or another environment needs one of its own."""
    known = (item for item in os.environ.items() if item[0].startswith("AWS_"))
    return os.getpid(), patience_s(), *sorted(known)


def _s3() -> Any:
    """The session of this process: no attempts of its own, and its waits fit the patience."""
    key = _key()
    fs = _session.get(key)
    if fs is None:
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
        _session.clear()
        _session[key] = fs
    return fs
