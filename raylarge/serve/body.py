"""The bodies of requests and replies: JSON that any client may send, and that any client reads.

What is no order is refused at once and in one sentence: 413 for too many bytes, 415 for another
content type, 422 (a `UserError`) for everything else.
"""

from __future__ import annotations

import json
from typing import Any

from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse

from raylarge.errors import UserError

DEEPEST = 16
"""Levels of lists and objects in an order, which needs four."""
_EXAMPLE = """post an order such as {"size": 512}."""


class Json(JSONResponse):
    """JSON in ASCII: text that is no Unicode (lone surrogates) is escaped, NaN is an error."""

    def render(self, content: Any) -> bytes:
        """Return the bytes."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


async def read_order(request: Request, limit: int) -> dict[str, Any]:
    """Return a request's JSON object, having read no more than `limit` bytes.

    Raises:
        HTTPException: 413 or 415.
        UserError: it is no JSON object, or no plain one (NaN, a key twice, too deep).
    """
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip()
    if kind and kind != "application/json" and not kind.endswith("+json"):
        raise HTTPException(415, f"{kind[:64]!a} is not application/json; {_EXAMPLE}")
    content = await _bytes(request, limit)
    try:
        values = json.loads(content, parse_constant=_refuse, object_pairs_hook=_object)
    except (RecursionError, ValueError) as error:
        raise UserError(f"the body is not JSON; {_EXAMPLE}") from error
    if not isinstance(values, dict):
        raise UserError('an order is a JSON object such as {"size": 512}.')
    if _is_deeper(values, DEEPEST):
        raise UserError(f"the body has more than {DEEPEST} levels; {_EXAMPLE}")
    return values


async def _bytes(request: Request, limit: int) -> bytes:
    declared = request.headers.get("content-length", "0")
    content = bytearray()
    if declared.isdecimal() and int(declared[:20]) <= limit:
        async for chunk in request.stream():
            content += chunk
            if len(content) > limit:
                break
        else:
            return bytes(content)
    raise HTTPException(413, f"an order has at most {limit} bytes.")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"{twice[:64]!a} stands twice in one object; leave one out.")
    return values


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _is_deeper(value: Any, levels: int) -> bool:
    layer = [value]
    for _ in range(levels):
        layer = [
            inner
            for value in layer
            if isinstance(value, dict | list)
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
    return any(isinstance(value, dict | list) for value in layer)
