"""Whole objects of a store over HTTP: got, put, removed, and read in ranges.

Every request has its own patience (`storage.patience`), so a large object survives a server
that restarts while it is read or sent. Large ones are sent in parts that become an object all
at once, or are taken back. Whoever lost an answer asks again: the same name gets the same bytes.

In all of these: FileNotFoundError, there is no object; Unmet, it is not the one of the ETag given
(somebody wrote another one meanwhile); UserError, the store fails for good.
"""

from __future__ import annotations

import io
import math
import mimetypes
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec

from raylarge.errors import UserError
from raylarge.storage.patience import Unmet, filesystem, patience_s, patiently

PART_BYTES = 16 << 20
LANES = 4  # parts of one object under way at a time
MOST_PARTS = 10_000  # S3 takes no more
MOST_REMOVED = 1000  # by one request; S3 takes no more
SLOWEST = 128 << 10  # bytes per second; whoever sends slower is taken for stuck
TRIES = 3  # of something that another one changed or took away meanwhile


def get(path: str) -> bytes:
    """An object's bytes, all of one version."""
    for _ in range(TRIES):
        found = patiently(path, _get)
        if isinstance(found, bytes):
            return found
        with suppress(Unmet):
            return _in_lanes(path, *found)
    raise changing(path)


def tail(path: str, size: int) -> bytes:
    """The last bytes of a file or an object, so many or all that it has, by one request."""
    return patiently(path, lambda fs, root: bytes(fs.cat_file(root, start=-size)))


def read_range(path: str, start: int, stop: int, etag: str | None = None) -> bytes:
    """The bytes [start, stop) of a file or an object, all of them."""
    same = {"IfMatch": etag} if etag else {}

    def read(fs: Any, root: str) -> bytes:
        if not _is_s3(fs):
            return _checked(fs.cat_file(root, start, stop), stop - start)
        answer = _call(fs, root, "get_object", Range=f"bytes={start}-{stop - 1}", **same)
        return _body(fs, answer, stop - start)

    return patiently(path, read) if stop > start else b""


class Ranges(io.RawIOBase):
    """An object as a file that is read in ranges, all of one version."""

    def __init__(self, path: str) -> None:
        """One request, for size and version."""
        found = patiently(path, lambda fs, root: fs.info(root))
        if found["type"] == "directory":
            raise FileNotFoundError(path)
        self.path, self.size, self.etag = path, int(found["size"]), found.get("ETag")
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, as far as the object goes, by one request."""
        stop = min(self._at + len(buffer), self.size)
        content = read_range(self.path, self._at, stop, self.etag)
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


def put(path: str, source: bytes | memoryview | Path) -> None:
    """Write an object from bytes or a local file; it is whole or absent at any time."""
    size = source.stat().st_size if isinstance(source, Path) else len(source)
    if size > 2 * PART_BYTES and _is_s3(filesystem(path)[0]):
        for _ in range(TRIES):
            with suppress(FileNotFoundError):  # the store forgot the upload, or lost its answer
                _put_parts(path, size, source)
                return
        raise UserError(f"{path}: the store loses parts of an upload; see to it and run again.")
    content = _piece(source, 0, size)

    def write(fs: Any, root: str) -> None:
        if _is_s3(fs):
            _call(fs, root, "put_object", Body=content, ContentType=_kind(path))
        else:
            fs.pipe_file(root, content)

    patiently(path, write)


def put_if(path: str, content: bytes, etag: str | None) -> str | None:
    """Write a small object where none stands, or in the place of the version that an ETag names.

    A store that knows no conditions is written to without one.

    Returns:
        The ETag of what was written; None where the store has none.

    Raises:
        Unmet, FileNotFoundError: another version stands there, or none.
    """
    condition = {"IfMatch": etag} if etag else {"IfNoneMatch": "*"}

    def write(fs: Any, root: str) -> str | None:
        """One request, without the condition where the store knows none."""
        if not _is_s3(fs):
            fs.pipe_file(root, content)
            return None
        try:
            return str(_call(fs, root, "put_object", Body=content, **condition)["ETag"])
        except Exception as error:
            if "NotImplemented" not in str(error):
                raise
            return str(_call(fs, root, "put_object", Body=content)["ETag"])

    return patiently(path, write)


def remove(paths: Sequence[str]) -> None:
    """Remove at most MOST_REMOVED objects of one bucket, as far as they are there."""

    def act(fs: Any, _: str) -> None:
        """One request for all of them where the store knows such a thing."""
        if len(paths) > 1 and _is_s3(fs):
            names = [fs.split_path(path)[:2] for path in paths]
            listed = {"Objects": [{"Key": key} for _, key in names], "Quiet": True}
            answer = fs.call_s3("delete_objects", Bucket=names[0][0], Delete=listed)
            for told in answer.get("Errors", []):  # the request itself succeeds
                from botocore.exceptions import ClientError  # who is here has it

                raise ClientError({"Error": told}, "DeleteObjects")
            return
        for path in paths:
            with suppress(FileNotFoundError):
                fs.rm_file(fs._strip_protocol(path))

    patiently(paths[0], act)


def changing(path: str) -> UserError:
    """What to say of an object that others write while it is read."""
    return UserError(f"{path} changes while it is read; run again when nobody writes it.")


def _is_s3(fs: Any) -> bool:
    return hasattr(fs, "call_s3")


def _call(fs: Any, root: str, method: str, **more: Any) -> Any:
    bucket, key, _ = fs.split_path(root)
    if "Body" in more:
        # The client's own timeouts only watch answers: a server that takes no bytes would be
        # waited for without end, as would one that does not say `100 Continue`.
        more["timeout"] = patience_s() / 2 + len(more["Body"]) / SLOWEST
    return fs.call_s3(method, Bucket=bucket, Key=key, **more)


def _get(fs: Any, root: str) -> bytes | tuple[int, str]:
    """An object's content; of a large one, size and version."""
    if not _is_s3(fs):
        return _checked(fs.cat_file(root), int(fs.info(root)["size"]))
    answer = _call(fs, root, "get_object")
    size = int(answer["ContentLength"])
    if size > 2 * PART_BYTES:
        fs.loop.call_soon_threadsafe(answer["Body"].close)
        return size, answer["ETag"]
    return _body(fs, answer, size)


def _body(fs: Any, answer: Any, size: int) -> bytes:
    try:
        return _checked(fsspec.asyn.sync(fs.loop, answer["Body"].read), size)
    finally:
        fs.loop.call_soon_threadsafe(answer["Body"].close)


def _checked(content: bytes, size: int) -> bytes:
    if len(content) != size:
        raise ConnectionError(f"{len(content)} of {size} bytes came")
    return bytes(content)


def _in_lanes(path: str, size: int, etag: str) -> bytes:
    def read(start: int) -> bytes:
        return read_range(path, start, min(size, start + PART_BYTES), etag)

    with ThreadPoolExecutor(LANES) as lanes:
        return b"".join(lanes.map(read, range(0, size, PART_BYTES)))


def _kind(path: str) -> str:
    return mimetypes.guess_type(path)[0] or "application/octet-stream"


def _piece(source: bytes | memoryview | Path, start: int, stop: int) -> bytes:
    if not isinstance(source, Path):
        return bytes(source[start:stop])
    with source.open("rb") as stream:
        stream.seek(start)
        return stream.read(stop - start)


def _put_parts(path: str, size: int, source: bytes | memoryview | Path) -> None:
    step = max(PART_BYTES, math.ceil(size / MOST_PARTS))

    def ask(method: str, **more: Any) -> Any:
        return patiently(path, lambda fs, root: _call(fs, root, method, **more))

    def send(number: int) -> dict[str, Any]:
        content = _piece(source, (number - 1) * step, min(size, number * step))
        answer = ask("upload_part", UploadId=upload, PartNumber=number, Body=content)
        return {"PartNumber": number, "ETag": answer["ETag"]}

    upload = ask("create_multipart_upload", ContentType=_kind(path))["UploadId"]
    try:
        # Leaving the block waits for parts under way: none comes in after the abort.
        with ThreadPoolExecutor(LANES) as lanes:
            parts = list(lanes.map(send, range(1, math.ceil(size / step) + 1)))
        ask("complete_multipart_upload", UploadId=upload, MultipartUpload={"Parts": parts})
    except BaseException:
        with suppress(Exception):  # once: who is gone was waited for already
            _call(*filesystem(path), "abort_multipart_upload", UploadId=upload)
        raise
