"""Words of the command line as values of a field's type. Nothing is read as YAML.

text    the word as it stands: `img #2`, `2024_01`, `012`, `on`, quotes and spaces too
number  a plain decimal number: 3, -0.5, 1e-4; not 1_000, 0x10, 012, 1:30, inf or nan
flag    true or false
list    [a,b]: the items stand between commas, each read by these rules; [] is empty
null    no value, where a field that is no text may have none
"""

from __future__ import annotations

import math
import os
import re
import types
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import GetJsonSchemaHandler

from raylarge.errors import printable

MISSING: Any = "???"
"""The default of a field of a dataclass that must be given."""

_DESCRIPTIONS = {
    int: "a whole number such as 3",
    float: "a number such as 0.5",
    bool: "true or false",
    str: "text",
}
_EXAMPLES = {int: "3", float: "0.5", bool: "true", str: "a"}
_INTEGER = re.compile(r"[+-]?(0|[1-9][0-9]*)")
_DECIMAL = re.compile(r"[+-]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_MOST_DIGITS = 20
"""Digits of the largest whole number of 64 bits."""
_LONGEST_SHOWN = 120
"""Characters of a value that a message repeats."""


@dataclass(frozen=True)
class Form:
    """How a field reads its values where its type does not say it; stands in an `Annotated`.

        Size = Annotated[tuple[int, int], Form("a number of pixels such as 4096", read_size)]

    Attributes:
        text: what the value must be, with an example behind `such as`.
        read: returns a word or a JSON value as one of the field's type, or raises ValueError.
    """

    text: str
    read: Callable[[Any], Any]

    def __get_pydantic_json_schema__(
        self, core_schema: Any, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Return the type's schema, or a text or a number in the place of it."""
        return {"anyOf": [handler(core_schema), {"type": ["string", "integer"]}]}


def read(hint: Any, value: Any) -> Any:
    """Return a value as one of a field's type; a string for another type is read as a word.

    Raises:
        ValueError: the value is none of that type.
    """
    if hint is Any:
        return _items(value) if _is_list_word(value) else value
    origin = get_origin(hint)
    if origin is Annotated:
        return read(get_args(hint)[0], value)
    if origin is Literal:
        return _any_of({type(choice) for choice in get_args(hint)}, value)
    if origin in (Union, types.UnionType):
        return _any_of(get_args(hint), value)
    if origin in (list, tuple):
        return _sequence(hint, value)
    if hint in _READERS:
        return _READERS[hint](value)
    kind = origin or hint
    if not isinstance(value, kind):
        raise ValueError(f"not a {kind}")
    return value


def reader(hint: Any) -> Callable[[Any], Any]:
    """Return `read` of a type."""
    return partial(read, hint)


def read_numbers(value: Any, between: str = ",") -> tuple[int, ...]:
    """Return whole numbers from one number, a list, its word `[a,b]` or the word `a,b`.

    Args:
        value: a word or a JSON value.
        between: what stands between the numbers of a word without brackets.

    Raises:
        ValueError: the value is none of these.
    """
    parts = [value] if isinstance(value, int) else value
    if isinstance(value, str) and not value.startswith("["):
        parts = value.split(between) if value else []
    numbers: tuple[int, ...] = read(tuple[int, ...], parts)
    return numbers


def alternatives(hint: Any) -> list[Any]:
    """Return the types of a union but None; the type itself if it is no union."""
    hint = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    if get_origin(hint) in (Union, types.UnionType):
        return [kind for kind in get_args(hint) if kind is not type(None)]
    return [hint]


def optional(hint: Any) -> bool:
    """Whether the word `null` stands for None in a field of a type."""
    return type(None) in get_args(hint) and str not in get_args(hint)


def describe(hint: Any) -> str:
    """Return what the value of a field of a type must be, in words."""
    kinds = list(dict.fromkeys(map(_describe_one, alternatives(hint))))
    return " or ".join(kinds) + (" or null" if optional(hint) else "")


def example(hint: Any) -> str:
    """Return a value that a field of a type may have; empty if any text would do."""
    first = alternatives(hint)[0]
    if get_origin(first) in (list, tuple):
        return f"[{_item_examples(first)}]"
    return "" if first is str else _EXAMPLES.get(first, "")


def format_value(value: Any) -> str:
    """Return a value as one types it; long ones are cut, odd characters escaped."""
    if isinstance(value, list | tuple):
        flat = (
            "[...]" if isinstance(item, list | tuple) else format_value(item)
            for item in value[:_LONGEST_SHOWN]
        )
        text = f"[{','.join(flat)}]"
    elif isinstance(value, Mapping):
        text = "{...}"
    elif isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, int) and value.bit_length() > 400:
        text = f"a whole number of {value.bit_length()} bits"
    else:
        text = "null" if value is None else str(value)
    if len(text) > _LONGEST_SHOWN:
        text = f"{text[:_LONGEST_SHOWN]}… ({len(text)} characters)"
    return printable(text)


def _any_of(kinds: Collection[Any], value: Any) -> Any:
    """Return a value as the first type of a union that it fits; text comes last."""
    if type(None) in kinds and (value is None or (value == "null" and str not in kinds)):
        return None
    for kind in sorted(kinds, key=lambda kind: kind is str):
        try:
            return read(kind, value)
        except ValueError:
            continue
    raise ValueError("none of the union's types")


def _sequence(hint: Any, value: Any) -> list[Any] | tuple[Any, ...]:
    kind, items = get_origin(hint), get_args(hint)
    if _is_list_word(value):
        value = _items(value)
    if not isinstance(value, list | tuple):
        raise ValueError("no list")
    if kind is list or ... in items:
        items = (items[0],) * len(value)
    if len(items) != len(value):
        raise ValueError(f"{len(value)} items")
    pairs = zip(items, value, strict=True)
    result: list[Any] | tuple[Any, ...] = kind(
        read(item, _trimmed(item, word)) for item, word in pairs
    )
    return result


def _trimmed(hint: Any, value: Any) -> Any:
    """Spaces beside the items of a list belong to texts alone."""
    return value if hint is str or not isinstance(value, str) else value.strip()


def _is_list_word(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("[") and value.endswith("]")


def _items(word: str) -> list[str]:
    inside = word[1:-1]
    return inside.split(",") if inside else []


def _text(value: Any) -> str:
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str) or "\0" in text:
        raise ValueError("no text")
    return text


def _flag(value: Any) -> bool:
    if isinstance(value, str) and value in ("true", "false"):
        return value == "true"
    if not isinstance(value, bool):
        raise ValueError("no flag")
    return value


def _integer(value: Any) -> int:
    if isinstance(value, str):
        if not _INTEGER.fullmatch(value) or len(value.lstrip("+-")) > _MOST_DIGITS:
            raise ValueError("no whole number")
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not -(1 << 63) <= value < 1 << 64:
        raise ValueError("no whole number of 64 bits")
    return value


def _decimal(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("no number")
    if isinstance(value, str) and not _DECIMAL.fullmatch(value):
        raise ValueError("no decimal number")
    try:
        number = float(value)
    except OverflowError as error:
        raise ValueError("too large") from error
    if not math.isfinite(number):
        raise ValueError("not finite")
    return number


def _describe_one(kind: Any) -> str:
    if get_origin(kind) in (tuple, list):
        items = get_args(kind)
        count = "" if ... in items or len(items) == 1 else f"of {len(items)} "
        return f"a list {count}such as [{_item_examples(kind)}]"
    if get_origin(kind) is Literal:
        return _describe_one(type(get_args(kind)[0]))
    return _DESCRIPTIONS.get(kind, "another value")


def _item_examples(hint: Any) -> str:
    """Return the examples of a list's items."""
    items = [alternatives(item)[0] for item in get_args(hint) if item is not ...]
    return ",".join(_EXAMPLES.get(item, "a") for item in items)


_READERS: dict[Any, Callable[[Any], Any]] = {
    str: _text,
    bool: _flag,
    int: _integer,
    float: _decimal,
}
