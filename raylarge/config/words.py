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
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Union, get_args, get_origin

from raylarge.errors import printable

MISSING: Any = "???"
"""The default of a field that must be given."""

_WORDS = {
    int: "a whole number such as 3",
    float: "a number such as 0.5",
    bool: "true or false",
    str: "text",
}
_SUCH = {int: "3", float: "0.5", bool: "true", str: "a"}
_INTEGER = re.compile(r"[+-]?(0|[1-9][0-9]*)")
_DECIMAL = re.compile(r"[+-]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_LONGEST = 20
"""Digits of the largest whole number of 64 bits."""
_SHOWN = 120
"""Characters of a value that a message repeats."""


def typed(hint: Any, value: Any) -> Any:
    """A value as one of a field's type; a string that stands for another type is read as a word.

    Raises:
        ValueError: the value is none of that type.
    """
    if hint is Any:
        return _items(value) if _is_list_word(value) else value
    if get_origin(hint) in (Union, types.UnionType):
        return _any_of(get_args(hint), value)
    if get_origin(hint) in (list, tuple):
        return _sequence(hint, value)
    if hint in _READERS:
        return _READERS[hint](value)
    kind = get_origin(hint) or hint
    if not isinstance(value, kind):
        raise ValueError(f"not a {kind}")
    return value


def wanted(hint: Any) -> str:
    """What the value of a field of a type must be, in words."""
    kinds, null = [hint], ""
    if get_origin(hint) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not type(None)]
        null = "" if str in kinds or len(kinds) == len(get_args(hint)) else " or null"
    return " or ".join(map(_kind, kinds)) + null


def such(hint: Any) -> str:
    """A value that a field of a type may have; empty if any text would do."""
    kinds = [kind for kind in get_args(hint) or [hint] if kind is not type(None)]
    if get_origin(hint) in (list, tuple):
        return f"[{','.join(_SUCH.get(kind, 'a') for kind in kinds if kind is not ...)}]"
    first = kinds[0]
    if get_args(first):
        return such(first)
    return "" if first is str else _SUCH.get(first, "")


def shown(value: Any) -> str:
    """A value as one writes it on the command line; long ones are cut, odd characters escaped."""
    if isinstance(value, list | tuple):
        flat = ("[...]" if isinstance(one, list | tuple) else shown(one) for one in value[:_SHOWN])
        text = f"[{','.join(flat)}]"
    elif isinstance(value, Mapping):
        text = "{...}"
    elif isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, int) and value.bit_length() > 400:
        text = f"a whole number of {value.bit_length()} bits"
    else:
        text = "null" if value is None else str(value)
    if len(text) > _SHOWN:
        text = f"{text[:_SHOWN]}… ({len(text)} characters)"
    return printable(text)


def _any_of(kinds: Sequence[Any], value: Any) -> Any:
    """A value as the first type of a union that it fits; text comes last."""
    if type(None) in kinds and (value is None or (value == "null" and str not in kinds)):
        return None
    for kind in sorted(kinds, key=lambda kind: kind is str):
        try:
            return typed(kind, value)
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
        typed(item, _trimmed(item, one)) for item, one in pairs
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
        if not _INTEGER.fullmatch(value) or len(value.lstrip("+-")) > _LONGEST:
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


def _kind(kind: Any) -> str:
    if get_origin(kind) in (tuple, list):
        items = get_args(kind)
        count = "" if ... in items or len(items) == 1 else f"of {len(items)} "
        such = ",".join(_SUCH.get(item, "a") for item in items if item is not ...)
        return f"a list {count}such as [{such}]"
    return _WORDS.get(kind, "another value")


_READERS: dict[Any, Callable[[Any], Any]] = {
    str: _text,
    bool: _flag,
    int: _integer,
    float: _decimal,
}
