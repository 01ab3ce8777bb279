"""Read, write and remove objects of a store over HTTP, completely or by ranges.

Every request is retried by itself (`storage.retry`), so that a large object survives a server
that restarts during the transfer. Large objects are uploaded in parts, which become an object
all at once or are discarded. A request whose response got lost is sent again with the same bytes.

All functions raise FileNotFoundError if there is no object, PreconditionFailed if it is not the
version that an ETag names, and UserError for permanent failures of the store.
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
from raylarge.storage.retry import PreconditionFailed, filesystem, retry_s, with_retries

PART_BYTES = 16 << 20
LANES = 4  # concurrent requests for parts of one object
MOST_PARTS = 10_000  # S3's limit
MOST_REMOVED = 1000  # by one request; S3's limit
SLOWEST = 128 << 10  # bytes per second; a slower transfer counts as stuck
TRIES = 3  # if another process replaces or removes the object meanwhile


def get(path: str) -> bytes:
    """Return an object's bytes, all of one version."""
    for _ in range(TRIES):
        content = with_retries(path, _get)
        if isinstance(content, bytes):
            return content
        with suppress(PreconditionFailed):
            return _get_parts(path, *content)
    raise changing(path)


def tail(path: str, size: int) -> bytes:
    """Return the last `size` bytes of a file or an object, or all that it has, by one request."""
    return with_retries(path, lambda fs, root: bytes(fs.cat_file(root, start=-size)))


def read_range(path: str, start: int, stop: int, etag: str | None = None) -> bytes:
    """Return the bytes [start, stop) of a file or an object."""
    condition = {"IfMatch": etag} if etag else {}

    def read(fs: Any, root: str) -> bytes:
        if not _is_s3(fs):
            return _checked(fs.cat_file(root, start, stop), stop - start)
        response = _call(fs, root, "get_object", Range=f"bytes={start}-{stop - 1}", **condition)
        return _body(fs, response, stop - start)

    return with_retries(path, read) if stop > start else b""


class Ranges(io.RawIOBase):
    """An object as a file that is read in ranges, all of one version."""

    def __init__(self, path: str) -> None:
        """Request size and version."""
        info = with_retries(path, lambda fs, root: fs.info(root))
        if info["type"] == "directory":
            raise FileNotFoundError(path)
        self.path, self.size, self.etag = path, int(info["size"]), info.get("ETag")
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
    """Write an object from bytes or a local file, atomically."""
    size = source.stat().st_size if isinstance(source, Path) else len(source)
    if size > 2 * PART_BYTES and _is_s3(filesystem(path)[0]):
        for _ in range(TRIES):
            with suppress(FileNotFoundError):  # the store lost the upload, or its response got lost
                _put_parts(path, size, source)
                return
        raise UserError(f"{path}: the store loses parts of an upload; see to it and run again.")
    content = _part(source, 0, size)

    def write(fs: Any, root: str) -> None:
        if _is_s3(fs):
            _call(fs, root, "put_object", Body=content, ContentType=_content_type(path))
        else:
            fs.pipe_file(root, content)

    with_retries(path, write)


def put_if(path: str, content: bytes, etag: str | None) -> str | None:
    """Write a small object where none exists, or in place of the version that an ETag names.

    The condition is dropped for a store that does not implement conditions.

    Returns:
        The ETag of the new version; None where the store has none.

    Raises:
        PreconditionFailed, FileNotFoundError: another version exists, or none.
    """
    condition = {"IfMatch": etag} if etag else {"IfNoneMatch": "*"}

    def write(fs: Any, root: str) -> str | None:
        if not _is_s3(fs):
            fs.pipe_file(root, content)
            return None
        try:
            return str(_call(fs, root, "put_object", Body=content, **condition)["ETag"])
        except Exception as error:
            if "NotImplemented" not in str(error):
                raise
            return str(_call(fs, root, "put_object", Body=content)["ETag"])

    return with_retries(path, write)


def remove(paths: Sequence[str]) -> None:
    """Remove at most MOST_REMOVED objects of one bucket if they exist, by one request to S3."""

    def remove_batch(fs: Any, _: str) -> None:
        if len(paths) > 1 and _is_s3(fs):
            bucket = fs.split_path(paths[0])[0]
            keys = [{"Key": fs.split_path(path)[1]} for path in paths]
            delete = {"Objects": keys, "Quiet": True}
            response = fs.call_s3("delete_objects", Bucket=bucket, Delete=delete)
            for failure in response.get("Errors", []):  # the request itself succeeds
                from botocore.exceptions import ClientError  # installed with s3fs

                raise ClientError({"Error": failure}, "DeleteObjects")
            return
        for path in paths:
            with suppress(FileNotFoundError):
                fs.rm_file(fsspec.core.strip_protocol(path))

    with_retries(paths[0], remove_batch)


def changing(path: str) -> UserError:
    """Return the error for an object that others replace while it is read."""
    return UserError(f"{path} changes while it is read; run again when nobody writes it.")


def _is_s3(fs: Any) -> bool:
    return hasattr(fs, "call_s3")


def _call(fs: Any, root: str, method: str, **arguments: Any) -> Any:
    bucket, key, _ = fs.split_path(root)
    if "Body" in arguments:
        # The client's own timeouts only apply to responses: without this one, a server that
        # accepts no bytes, or never says `100 Continue`, would be waited for without end.
        arguments["timeout"] = retry_s() / 2 + len(arguments["Body"]) / SLOWEST
    return fs.call_s3(method, Bucket=bucket, Key=key, **arguments)


def _get(fs: Any, root: str) -> bytes | tuple[int, str]:
    """Return an object's content; of a large object, its size and version."""
    if not _is_s3(fs):
        return _checked(fs.cat_file(root), int(fs.info(root)["size"]))
    response = _call(fs, root, "get_object")
    size = int(response["ContentLength"])
    if size > 2 * PART_BYTES:
        fs.loop.call_soon_threadsafe(response["Body"].close)
        return size, response["ETag"]
    return _body(fs, response, size)


def _body(fs: Any, response: Any, size: int) -> bytes:
    try:
        return _checked(fsspec.asyn.sync(fs.loop, response["Body"].read), size)
    finally:
        fs.loop.call_soon_threadsafe(response["Body"].close)


def _checked(content: bytes, size: int) -> bytes:
    if len(content) != size:
        raise ConnectionError(f"{len(content)} of {size} bytes came")
    return bytes(content)


def _get_parts(path: str, size: int, etag: str) -> bytes:
    def read(start: int) -> bytes:
        return read_range(path, start, min(size, start + PART_BYTES), etag)

    with ThreadPoolExecutor(LANES) as lanes:
        return b"".join(lanes.map(read, range(0, size, PART_BYTES)))


def _content_type(path: str) -> str:
    return mimetypes.guess_type(path)[0] or "application/octet-stream"


def _part(source: bytes | memoryview | Path, start: int, stop: int) -> bytes:
    if not isinstance(source, Path):
        return bytes(source[start:stop])
    with source.open("rb") as stream:
        stream.seek(start)
        return stream.read(stop - start)


def _put_parts(path: str, size: int, source: bytes | memoryview | Path) -> None:
    part_bytes = max(PART_BYTES, math.ceil(size / MOST_PARTS))

    def call(method: str, **arguments: Any) -> Any:
        return with_retries(path, lambda fs, root: _call(fs, root, method, **arguments))

    def send(number: int) -> dict[str, Any]:
        content = _part(source, (number - 1) * part_bytes, min(size, number * part_bytes))
        response = call("upload_part", UploadId=upload, PartNumber=number, Body=content)
        return {"PartNumber": number, "ETag": response["ETag"]}

    upload = call("create_multipart_upload", ContentType=_content_type(path))["UploadId"]
    try:
        # Leaving the block waits for running requests: no part arrives after the abort.
        with ThreadPoolExecutor(LANES) as lanes:
            parts = list(lanes.map(send, range(1, math.ceil(size / part_bytes) + 1)))
        call("complete_multipart_upload", UploadId=upload, MultipartUpload={"Parts": parts})
    except BaseException:
        with suppress(Exception):  # no retries: a dead server was waited for already
            _call(*filesystem(path), "abort_multipart_upload", UploadId=upload)
        raise
