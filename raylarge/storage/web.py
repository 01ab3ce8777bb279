"""Web addresses: what of them may be shown and stored, and how servers without ranges are read.

The query of an address may be a secret (a presigned URL is one): names, messages and files hold
addresses without query, fragment and user. Only this process remembers the queries it was given.
"""

from __future__ import annotations

import re
from typing import Any

from raylarge.errors import UserError

_SCHEMES = ("http://", "https://")
_SECRET = re.compile(r"(https?://)(?:[^\s/?#'\"@]*@)?([^\s?#'\"]*)(?:[?#][^\s'\"]*)?")
_queries: dict[str, str] = {}


def is_web(path: str) -> bool:
    """Whether a path is a web address."""
    return path.startswith(_SCHEMES)


def scrubbed(text: str) -> str:
    """A text with all its web addresses as they may be shown."""
    return _SECRET.sub(r"\1\2", text)


def shown(path: str) -> str:
    """A path as it may be shown and stored: of a web address, no query, fragment and user."""
    if not is_web(path):
        return path
    scheme, _, rest = path.partition("://")
    host, slash, place = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{place}"


def name_of(path: str) -> str:
    """The file name that a path ends with."""
    return shown(path).rstrip("/").rsplit("/", 1)[-1]


def remember(path: str) -> str:
    """Keep the whole address for `whole`, in this process alone; return it as it may be stored."""
    _queries[shown(path)] = path
    return shown(path)


def whole(path: str) -> str:
    """The address that was remembered for a stored path; else the path itself."""
    return _queries.get(path, path)


def facts(fs: Any, root: str) -> dict[str, Any]:
    """What stands at a URL; fsspec takes a web server that is away for one without the file.

    Raises:
        FileNotFoundError: nothing stands there.
        UserError: the server refuses.
    """
    try:
        info: dict[str, Any] = fs.info(root)
    except FileNotFoundError as error:
        cause, status = error.__cause__, getattr(error.__cause__, "status", 0)
        if cause is None or isinstance(cause, FileNotFoundError) or status in (404, 410):
            raise
        if 400 <= status < 500:
            raise _refused(root, status) from error
        raise cause from error
    return info


def _refused(url: str, status: int) -> UserError:
    return UserError(
        f"{shown(url)}: the server answers {status}; check the address, and that it lets you in (a "
        "presigned address may have run out: give slides= anew, with its query)."
    )


def ends(fs: Any, url: str, count: int) -> bytes:
    """The size, and the first and last bytes of a file at a web address.

    Where the server knows no ranges, what it says of the version stands for the last bytes, so
    nothing is fetched whole.

    Raises:
        FileNotFoundError: nothing stands there.
        UserError: the server refuses.
    """
    from fsspec.asyn import sync

    info = facts(fs, url)
    size = info["size"]
    first, partial = sync(fs.loop, _range, fs, url, 0, count)
    if partial and size is not None:
        last, partial = sync(fs.loop, _range, fs, url, max(0, size - count), size)
        if partial:
            return f"{size} ".encode() + first + last
    version = [info.get(key) for key in ("ETag", "Last-Modified", "Content-MD5", "Digest")]
    return f"{size} {version} ".encode() + first


async def _range(fs: Any, url: str, start: int, stop: int) -> tuple[bytes, bool]:
    """Bytes [start, stop), and whether the server gave just these; else the file's first ones."""
    session = await fs.set_session()
    headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    pieces, count = [], 0
    async with session.get(fs.encode_url(url), headers=headers) as answer:
        if answer.status == 416:  # an empty file
            return b"", False
        if answer.status in (401, 403):
            raise _refused(url, answer.status)
        fs._raise_not_found_for_status(answer, url)
        while count < stop - start and (piece := await answer.content.read(stop - start - count)):
            pieces.append(piece)
            count += len(piece)
        return b"".join(pieces), answer.status == 206
