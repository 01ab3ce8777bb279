"""One sentence for a validation error: the key, the value and what it may be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from raylarge.config import fields
from raylarge.config.words import format_value

_SIMILAR, _ALMOST_SAME = 0.7, 0.87
"""Similarity (`difflib`) from which a name in the same section, or elsewhere, is proposed."""
_LONGEST_NAME = 200


def sentence(
    schema: type, error: ValidationError, values: Mapping[str, Any], path: tuple[str, ...] = ()
) -> str:
    """Return one sentence for what pydantic found wrong first; unknown keys come first.

    Args:
        schema: the model that was validated.
        error: what validation raised.
        values: what was validated, by field name.
        path: sections of the schema above what was validated.
    """
    details = error.errors(include_url=False)
    details.sort(key=lambda detail: _ORDER.get(detail["type"], 1))
    if details[0]["type"] == "missing":
        keys = [".".join(map(str, (*path, *detail["loc"]))) for detail in details]
        return f"{', '.join(keys)} must be given; give {' '.join(f'{key}=...' for key in keys)}"
    detail = details[0]
    name, key = _located(schema, (*path, *detail["loc"]))
    if detail["type"] == "extra_forbidden":
        return unknown(schema, deepest(name, detail["input"]))
    if detail["type"] == "string_unicode" and (key is None or key.section):
        return unknown(schema, f"{name}.{detail['input']}".lstrip("."))  # a key, not a value
    if detail["type"] == "value_error" and (key is None or key.section):
        text = str(detail["ctx"]["error"])
        return f"{name}: {text}" if name else text
    value = detail["input"]
    if key is None or key.section:
        example = fields.leaves(key.section, f"{name}.")[0] if key and key.section else "key=value"
        return unfit(name, value, f"its keys one by one, such as {example}")
    if detail["type"] == "word":
        if isinstance(value, Mapping) and value and key.hint is not Any:
            return unknown(schema, deepest(name, value))
        return unfit(name, value, key.form)
    parts = name.split(".")[len(path) :]
    if len(detail["loc"]) > len(parts):
        value = _value_at(values, parts)
    if detail["type"] == "value_error":
        return f"{name}={format_value(value)}: it must be {detail['ctx']['error']}."
    subject, rule = ("each", key.rule[5:]) if key.rule.startswith("each ") else ("it", key.rule)
    return f"{name}={format_value(value)}: {subject} must be {rule or detail['msg']}."


_ORDER = {"extra_forbidden": 0, "missing": 2}


def unfit(name: str, value: Any, form: str) -> str:
    """Return what to say of a value that is not of its field's type."""
    return f"{format_value(name)}={format_value(value)} does not fit; give {form}."


def nearest(word: str, names: Iterable[str], least: float = _SIMILAR) -> str | None:
    """Return which of some names a misspelt one may stand for, or None.

    Args:
        word: what was typed.
        names: what there is.
        least: similarity from 0 to 1 that a name must have.
    """
    if len(word) > _LONGEST_NAME:
        return None
    return next(iter(difflib.get_close_matches(word, list(names), n=1, cutoff=least)), None)


def unknown(schema: type, name: str) -> str:
    """Return what to say of an unknown key: keys that may be meant, or those of its section."""
    names = fields.leaves(schema)
    above, _, last = name.rpartition(".")
    siblings = _siblings(schema, above)
    sibling = nearest(last, siblings) if above in _sections(schema) else None
    meant = [full for full in names if full.endswith(f".{name}")]
    meant = meant or [full for full in names if full.rpartition(".")[2] == last]
    meant = meant or ([f"{above}.{sibling}".lstrip(".")] if sibling else _misspelt(name, names))
    if meant:
        proposals = " or ".join(f"'{full}'" for full in meant[:4])
        return f"unknown key '{format_value(name)}'; did you mean {proposals}?"
    return f"unknown key '{format_value(name)}'; the keys there are: {', '.join(siblings)}."


def _located(schema: Any, path: Sequence[int | str]) -> tuple[str, fields.Key | None]:
    """Return the dotted key at a path of an error, and its field; none for an unknown key."""
    names, key = [], None
    for part in path:
        if key and not key.section:
            break
        names.append(str(part))
        key = fields.find(key.section if key else schema, str(part))
        if key is None:
            break
    return ".".join(names), key


def deepest(name: str, value: Any) -> str:
    """Return the dotted key of the first single value in nested mappings."""
    while isinstance(value, Mapping) and value:
        part, value = next(iter(value.items()))
        name = f"{name}.{part}"
    return name


def _value_at(values: Any, path: Sequence[str]) -> Any:
    for part in path:
        values = values[part] if isinstance(values, Mapping) else getattr(values, part)
    return values


def _misspelt(name: str, names: Sequence[str]) -> list[str]:
    """Return the key whose end, from any of its sections on, is almost the same as a name."""
    ends: dict[str, str] = {}
    for full in names:
        parts = full.split(".")
        ends |= {".".join(parts[start:]): full for start in range(len(parts))}
    depth = name.count(".")
    match = nearest(name, [end for end in ends if end.count(".") == depth], _ALMOST_SAME)
    return [ends[match]] if match and nearest(name.split(".")[-1], [match.split(".")[-1]]) else []


def _sections(schema: type, prefix: str = "") -> list[str]:
    """Return the dotted names of the sections of a model; the empty name is the top."""
    names = [prefix.removesuffix(".")]
    for key in fields.keys(schema):
        if key.section:
            names += _sections(key.section, f"{prefix}{key.name}.")
    return names


def _siblings(schema: type, above: str) -> list[str]:
    """Return the names of the keys in a section; those at the top if there is no such section."""
    section = schema
    for part in above.split(".") if above in _sections(schema) and above else ():
        section = next(key.section for key in fields.keys(section) if key.name == part)
    return [key.name for key in fields.keys(section)]
