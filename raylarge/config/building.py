"""Config objects from layers of values, and back to plain values."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from raylarge.config import fields, words
from raylarge.errors import UserError

T = TypeVar("T")


def build(schema: type[T], *layers: Mapping[str, Any]) -> T:
    """A config object from a dataclass and layers of values, later layers winning.

    A string for a field that is no text is read as a word (`words.typed`).

    Raises:
        UserError: an unknown key, a missing one, or a value that is not of its type or rule.
    """
    values: dict[str, Any] = {}
    for layer in layers:
        _merge(schema, values, layer, schema, "")
    missing = list(_missing(schema, values, ""))
    if missing:
        words_ = " ".join(f"{key}=..." for key in missing)
        raise UserError(f"{', '.join(missing)} must be given; give {words_}")
    return _instance(schema, values, None)


def plain(config: Any) -> dict[str, Any]:
    """A config object as plain dicts and lists, ready for JSON."""
    return {one.name: _plain(getattr(config, one.name)) for one in dataclasses.fields(config)}


def require(*rules: tuple[str, Any, bool, str]) -> None:
    """Refuse values that make no sense.

    Args:
        rules: key, value, whether it is fine, and what it must be.

    Raises:
        UserError: naming the first key that is not fine, its value and what it must be.
    """
    for key, value, fine, wish in rules:
        if not fine:
            raise UserError(f"{key}={words.shown(value)}: it must be {wish}.")


def _merge(
    schema: type, into: dict[str, Any], layer: Mapping[str, Any], root: type, prefix: str
) -> None:
    """Put the values of a layer into a mapping, each as a value of its field's type."""
    known = {key.name: key for key in fields.keys(schema)}
    for name, value in layer.items():
        full = f"{prefix}{name}"
        if name not in known:
            raise UserError(fields.unknown(root, _deepest(full, value)))
        key = known[name]
        if key.section:
            inner = plain(value) if _is_instance(value) else value
            if not isinstance(inner, Mapping):
                such = fields.leaves(key.section, f"{full}.")[0]
                raise _unfit(full, value, f"its keys one by one, such as {such}")
            _merge(key.section, into.setdefault(name, {}), inner, root, f"{full}.")
        else:
            into[name] = _value(key, full, value, root)


def _value(key: fields.Key, full: str, value: Any, root: type) -> Any:
    """A single value as one of its field's type; JSON's null is the word, if that is a choice."""
    if value is None and "null" in key.field.metadata.get("choices", ()):
        return "null"
    if isinstance(value, Mapping) and value and key.hint is not Any:
        raise UserError(fields.unknown(root, _deepest(full, value)))
    try:
        typed = words.typed(key.hint, value)
    except ValueError as error:
        raise _unfit(full, value, words.wanted(key.hint)) from error
    fields.refuse(key, full, typed)
    return typed


def _deepest(full: str, value: Any) -> str:
    """The dotted key of the first single value in nested mappings."""
    while isinstance(value, Mapping) and value:
        name, value = next(iter(value.items()))
        full = f"{full}.{name}"
    return full


def _missing(schema: type, values: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key in fields.keys(schema):
        full = f"{prefix}{key.name}"
        if dataclasses.is_dataclass(key.hint):
            yield from _missing(key.hint, values.get(key.name, {}), f"{full}.")  # type: ignore[arg-type]
        elif key.name not in values and key.default in (words.MISSING, dataclasses.MISSING):
            yield full


def _instance(schema: type[T], values: Mapping[str, Any], base: Any) -> T:
    """An object of a dataclass: values, and what they leave open from `base` or the defaults."""
    filled: dict[str, Any] = {}
    owner: Any = schema
    for key in fields.keys(owner):
        default = key.default if base is None else getattr(base, key.name)
        if dataclasses.is_dataclass(key.hint):
            inner = default if _is_instance(default) else None
            filled[key.name] = _instance(key.hint, values.get(key.name, {}), inner)  # type: ignore[arg-type]
        else:
            filled[key.name] = values.get(key.name, default)
    return schema(**filled)


def _is_instance(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _plain(value: Any) -> Any:
    if _is_instance(value):
        return plain(value)
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _unfit(full: str, value: Any, wish: str) -> UserError:
    return UserError(f"{words.shown(full)}={words.shown(value)} does not fit; give {wish}.")
