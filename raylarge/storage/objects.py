"""Whole objects of a store over HTTP: got, put, put if new, and read in ranges.

Every request has its own patience (`storage.patience`), so a large object survives a server
that restarts while it is read or sent. Large ones are sent in parts that become an object all
at once, or are taken back. A mark in an object's metadata tells whose a write was whose
answer was lost.
"""

from __future__ import annotations

import io
import math
import mimetypes
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec

from raylarge.errors import UserError
from raylarge.storage.patience import Unmet, filesystem, patiently, sending_s

PART_BYTES = 16 << 20
LANES = 4  # parts of one object under way at a time
MOST_PARTS = 10_000  # S3 takes no more
MARK = "raylarge-writer"
TRIES = 3  # of something that another one changed or took away meanwhile


def get(path: str) -> bytes:
    """An object's bytes, all of one version.

    Raises:
        FileNotFoundError: there is none.
        UserError: the store fails for good, or the object does not stop changing.
    """
    for _ in range(TRIES):
        found = patiently(path, _get)
        if isinstance(found, bytes):
            return found
        with suppress(Unmet):
            return _in_lanes(path, *found)
    raise changing(path)


def read_range(path: str, start: int, stop: int, etag: str | None = None) -> bytes:
    """The bytes [start, stop) of an object, all of them.

    Raises:
        FileNotFoundError: there is no object.
        Unmet: it is not the one of this ETag.
        UserError: the store fails for good.
    """
    same = {"IfMatch": etag} if etag else {}

    def read(fs: Any, root: str) -> bytes:
        if not _is_s3(fs):
            return _checked(fs.cat_file(root, start, stop), stop - start)
        answer = _call(fs, root, "get_object", Range=f"bytes={start}-{stop - 1}", **same)
        return _body(fs, answer, stop - start)

    return patiently(path, read) if stop > start else b""


class Ranges(io.RawIOBase):
    """An object as a file that is read in ranges, all of one version.

    Raises:
        FileNotFoundError: there is no object.
        Unmet: somebody wrote another one meanwhile (from reads).
        UserError: the store fails for good.
    """

    def __init__(self, path: str) -> None:
        """One request, for size and version."""
        found = patiently(path, lambda fs, root: fs.info(root))
        if found["type"] == "directory":
            raise FileNotFoundError(path)
        self.path, self.size, self.etag = path, int(found["size"]), found.get("ETag")
        self._at = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Where the next read begins."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set where the next read begins."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, as far as the object goes, by one request."""
        stop = min(self._at + len(buffer), self.size)
        content = read_range(self.path, self._at, stop, self.etag)
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


def put(path: str, source: bytes | Path) -> None:
    """Write an object from bytes or a local file; it is whole or absent at any time.

    Raises:
        UserError: the store fails for good; parts that were sent are taken back, if it lets us.
    """
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    if size > 2 * PART_BYTES and _is_s3(filesystem(path)[0]):
        _put_parts(path, size, _reader(source))
        return
    content = source if isinstance(source, bytes) else source.read_bytes()
    patiently(path, lambda fs, root: _put(fs, root, content))


def put_new(path: str, content: bytes) -> bool:
    """Write an object unless one stands there; whether this call did.

    Raises:
        UserError: the store fails for good, or knows no such condition.
    """
    mark = uuid.uuid4().hex

    def write(fs: Any, root: str) -> None:
        if _is_s3(fs):
            _call(fs, root, "put_object", Body=content, IfNoneMatch="*", Metadata={MARK: mark})
        else:
            fs.pipe_file(root, content, mode="create")

    if _stands(path):  # a store that does not know the condition must not lose what it has
        return False
    try:
        patiently(path, write)
    except Unmet:  # by another one, or by us when the answer was lost
        return _is_marked(path, mark)
    return not _is_s3(filesystem(path)[0]) or _is_marked(path, mark)


def changing(path: str) -> UserError:
    """What to say of an object that others write while it is read."""
    return UserError(f"{path} changes while it is read; run again when nobody writes it.")


def _is_s3(fs: Any) -> bool:
    return hasattr(fs, "call_s3")


def _call(fs: Any, root: str, method: str, **more: Any) -> Any:
    bucket, key, _ = fs.split_path(root)
    if "Body" in more:
        more["timeout"] = sending_s(len(more["Body"]))
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


def _put(fs: Any, root: str, content: bytes) -> None:
    if _is_s3(fs):
        _call(fs, root, "put_object", Body=content, **_kind(root))
    else:
        fs.pipe_file(root, content)


def _kind(root: str) -> dict[str, str]:
    kind = mimetypes.guess_type(root)[0]
    return {"ContentType": kind} if kind else {}


def _reader(source: bytes | Path) -> Callable[[int, int], bytes]:
    def read(start: int, stop: int) -> bytes:
        if isinstance(source, bytes):
            return source[start:stop]
        with source.open("rb") as stream:
            stream.seek(start)
            return stream.read(stop - start)

    return read


def _put_parts(path: str, size: int, read: Callable[[int, int], bytes]) -> None:
    """Send an object in parts; anew where the store forgot those that it had."""
    for _ in range(TRIES):
        mark = uuid.uuid4().hex
        with suppress(FileNotFoundError):
            _upload(path, size, read, mark)
            return
        if _stands(path) and _is_marked(path, mark):  # made, but the answer was lost
            return
    raise UserError(f"{path}: the store loses parts of an upload; see to the server, run again.")


def _upload(path: str, size: int, read: Callable[[int, int], bytes], mark: str) -> None:
    step = max(PART_BYTES, math.ceil(size / MOST_PARTS))

    def ask(method: str, **more: Any) -> Any:
        return patiently(path, lambda fs, root: _call(fs, root, method, **more))

    def send(number: int) -> dict[str, Any]:
        content = read((number - 1) * step, min(size, number * step))
        answer = ask("upload_part", UploadId=upload, PartNumber=number, Body=content)
        return {"PartNumber": number, "ETag": answer["ETag"]}

    upload = ask("create_multipart_upload", Metadata={MARK: mark}, **_kind(path))["UploadId"]
    try:
        # Leaving the block waits for parts under way: none comes in after the abort.
        with ThreadPoolExecutor(LANES) as lanes:
            parts = list(lanes.map(send, range(1, math.ceil(size / step) + 1)))
        ask("complete_multipart_upload", UploadId=upload, MultipartUpload={"Parts": parts})
    except BaseException:
        with suppress(Exception):  # once: who is gone was waited for already
            _call(*filesystem(path), "abort_multipart_upload", UploadId=upload)
        raise


def _stands(path: str) -> bool:
    try:
        patiently(path, lambda fs, root: fs.info(root))
    except FileNotFoundError:
        return False
    return True


def _is_marked(path: str, mark: str) -> bool:
    """Whether the object that stands is the one that was written with a mark."""

    def read(fs: Any, root: str) -> bool:
        if not _is_s3(fs):
            return False
        found: dict[str, str] = _call(fs, root, "head_object").get("Metadata", {})
        return found.get(MARK) == mark

    try:
        return patiently(path, read)
    except FileNotFoundError:
        return False
