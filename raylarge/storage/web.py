"""Web addresses: redact their secrets, and read files from servers without range requests.

The query of an address may be a secret (as in a presigned URL). Messages, logs and stored files
therefore hold addresses without query, fragment and user; this process alone remembers queries.
"""

from __future__ import annotations

import re
from typing import Any

from raylarge.errors import UserError

WEB = ("http://", "https://")
_SECRET = re.compile(r"(https?://)(?:[^\s/?#'\"@]*@)?([^\s?#'\"]*)(?:[?#][^\s'\"]*)?")
_full_urls: dict[str, str] = {}


def is_web_url(path: str) -> bool:
    """Return whether a path is an http or https address."""
    return path.startswith(WEB)


def redact_urls(text: str) -> str:
    """Return a text with every web address in it redacted."""
    return _SECRET.sub(r"\1\2", text)


def redacted(path: str) -> str:
    """Return a path without the query, fragment and user of a web address."""
    if not is_web_url(path):
        return path
    scheme, _, rest = path.partition("://")
    host, slash, place = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{place}"


def name_of(path: str) -> str:
    """Return the file name at the end of a path or URL."""
    return redacted(path).rstrip("/").rsplit("/", 1)[-1]


def remember_url(path: str) -> str:
    """Remember a full address for `full_url` in this process; return it redacted."""
    _full_urls[redacted(path)] = path
    return redacted(path)


def full_url(path: str) -> str:
    """Return the address that was remembered for a redacted one; else the path itself."""
    return _full_urls.get(path, path)


def info(fs: Any, root: str) -> dict[str, Any]:
    """Return fsspec's facts about a URL; unlike fsspec, tell an unreachable server from a 404.

    Raises:
        FileNotFoundError: the server has no such file.
        UserError: the server refuses the request.
    """
    try:
        return dict(fs.info(root))
    except FileNotFoundError as error:
        cause, status = error.__cause__, getattr(error.__cause__, "status", 0)
        if cause is None or isinstance(cause, FileNotFoundError) or status in (404, 410):
            raise
        if 400 <= status < 500:
            raise _access_denied(root, status) from error
        raise cause from error


def _access_denied(url: str, status: int) -> UserError:
    return UserError(
        f"{redacted(url)}: the server answers {status}; check the address and your access to it "
        "(a presigned address may have expired: give slides= again, with its query)."
    )


def edge_bytes(fs: Any, url: str, count: int) -> bytes:
    """Return the size and the first and last bytes of a file at a web address.

    For a server without range requests, its version headers replace the last bytes, so that the
    whole file is not downloaded.

    Raises:
        FileNotFoundError: the server has no such file.
        UserError: the server refuses the request.
    """
    from fsspec.asyn import sync

    headers = info(fs, url)
    size = headers["size"]
    first, is_range = sync(fs.loop, _range, fs, url, 0, count)
    if is_range and size is not None:
        last, is_range = sync(fs.loop, _range, fs, url, max(0, size - count), size)
        if is_range:
            return f"{size} ".encode() + first + last
    version = [headers.get(key) for key in ("ETag", "Last-Modified", "Content-MD5", "Digest")]
    return f"{size} {version} ".encode() + first


async def _range(fs: Any, url: str, start: int, stop: int) -> tuple[bytes, bool]:
    """Return bytes [start, stop) and True; the file's first bytes and False without ranges."""
    session = await fs.set_session()
    headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    content = bytearray()
    async with session.get(fs.encode_url(url), headers=headers) as response:
        if response.status == 416:  # an empty file
            return b"", False
        if response.status in (401, 403):
            raise _access_denied(url, response.status)
        if response.status == 404:
            raise FileNotFoundError(url)
        response.raise_for_status()
        while chunk := await response.content.read(stop - start - len(content)):
            content += chunk
        return bytes(content), response.status == 206
