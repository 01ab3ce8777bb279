"""Configurations from layers of values, and back to plain values."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from raylarge.config import fields, messages, words
from raylarge.config.model import Config, merged
from raylarge.errors import UserError

T = TypeVar("T")


def build(schema: type[T], *layers: Mapping[str, Any]) -> T:
    """Return a configuration of layers of values, nested by section; later layers win.

    Values are validated; a string for a field that is no text is read as a word (`words`).

    Raises:
        UserError: an unknown key, a missing one, or a value that does not fit.
    """
    if not issubclass(schema, Config):
        return _build_dataclass(schema, *layers)
    values: dict[str, Any] = {}
    for layer in layers:
        values = merged(values, layer)
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise UserError(messages.sentence(schema, error, values)) from error


def plain(config: Any) -> dict[str, Any]:
    """Return a configuration as plain dicts and lists, ready for JSON."""
    if isinstance(config, Config):
        return config.plain()
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
            raise UserError(f"{key}={words.format_value(value)}: it must be {wish}.")


# --- dataclasses, until every configuration is a model ----------------------------------


def _build_dataclass(schema: type[T], *layers: Mapping[str, Any]) -> T:
    values: dict[str, Any] = {}
    for layer in layers:
        _merge(schema, values, layer, schema, "")
    missing = list(_missing(schema, values, ""))
    if missing:
        words_ = " ".join(f"{key}=..." for key in missing)
        raise UserError(f"{', '.join(missing)} must be given; give {words_}")
    return _instance(schema, values, None, "", schema)


def _merge(
    schema: type, into: dict[str, Any], layer: Mapping[str, Any], root: type, prefix: str
) -> None:
    """Put the values of a layer into a mapping, each as a value of its field's type."""
    by_name = {key.name: key for key in fields.keys(schema)}
    for name, value in layer.items():
        full = f"{prefix}{name}"
        if name not in by_name:
            raise UserError(messages.unknown(root, messages.deepest(full, value)))
        key = by_name[name]
        if key.section:
            inner = plain(value) if _is_instance(value) else value
            if not isinstance(inner, Mapping):
                example = fields.leaves(key.section, f"{full}.")[0]
                wish = f"its keys one by one, such as {example}"
                raise UserError(messages.unfit(full, value, wish))
            if issubclass(key.section, BaseModel):
                into[name] = merged(into.get(name, {}), inner)
            else:
                _merge(key.section, into.setdefault(name, {}), inner, root, f"{full}.")
        else:
            into[name] = _value(key, full, value, root)


def _value(key: fields.Key, full: str, value: Any, root: type) -> Any:
    """A single value as one of its field's type; JSON's null is the word, if that is a choice."""
    if isinstance(value, Mapping) and value and key.hint is not Any:
        raise UserError(messages.unknown(root, messages.deepest(full, value)))
    try:
        typed = key.read(value)
    except ValueError as error:
        wish = words.describe(key.hint)
        raise UserError(messages.unfit(full, value, wish)) from error
    fields.refuse(key, full, typed)
    return typed


def _missing(schema: type, values: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key in fields.keys(schema):
        full = f"{prefix}{key.name}"
        if dataclasses.is_dataclass(key.hint):
            yield from _missing(key.hint, values.get(key.name, {}), f"{full}.")  # type: ignore[arg-type]
        elif key.name not in values and key.default is fields.REQUIRED:
            yield full


def _instance(schema: type[T], values: Mapping[str, Any], base: Any, prefix: str, root: type) -> T:
    """An object of a dataclass: values, and what they leave open from `base` or the defaults."""
    filled: dict[str, Any] = {}
    owner: Any = schema
    for key in fields.keys(owner):
        default = key.default if base is None else getattr(base, key.name)
        full = f"{prefix}{key.name}"
        if dataclasses.is_dataclass(key.hint):
            inner = default if _is_instance(default) else None
            inside = values.get(key.name, {})
            filled[key.name] = _instance(key.hint, inside, inner, f"{full}.", root)  # type: ignore[arg-type]
        elif key.section and issubclass(key.section, BaseModel):
            filled[key.name] = _model(root, key, full, values.get(key.name, {}), default)
        else:
            filled[key.name] = values.get(key.name, default)
    return schema(**filled)


def _model(root: Any, key: fields.Key, full: str, values: Mapping[str, Any], default: Any) -> Any:
    """A model inside a dataclass; of a mapping that holds some of a model's keys, a mapping."""
    if isinstance(default, Config):
        values = merged(default.set_values(), values)
    try:
        model = key.section.model_validate(values)
    except ValidationError as error:
        raise UserError(messages.sentence(root, error, values, tuple(full.split(".")))) from error
    return model if key.hint is key.section else model.model_dump(exclude_unset=True)


def _is_instance(value: Any) -> bool:
    return isinstance(value, Config) or (
        dataclasses.is_dataclass(value) and not isinstance(value, type)
    )


def _plain(value: Any) -> Any:
    if _is_instance(value):
        return plain(value)
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value
