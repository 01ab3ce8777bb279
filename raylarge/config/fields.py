"""The keys of a dataclass: its fields, their types, bounds and choices, and misspelt ones.

A field's metadata may have `keys` (a dataclass: the field is a mapping that holds some of its
keys), `choices`, bounds (`least`, `most`, `above`), or `kind` (the forms that its class reads).
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple, get_type_hints

from raylarge.config.words import shown, typed
from raylarge.errors import UserError

_NEAR, _ALMOST_SAME = 0.7, 0.87
"""Similarity (`difflib`) from which a name beside a misspelt one, or elsewhere, is meant."""
_LONGEST_NAME = 200


class Key(NamedTuple):
    """One field of a dataclass."""

    name: str
    hint: Any
    field: dataclasses.Field[Any]

    @property
    def section(self) -> type | None:
        """The dataclass whose fields are the keys below this one; None for a single value."""
        hint: Any = self.hint
        section: Any = self.field.metadata.get("keys")
        if section is None and dataclasses.is_dataclass(hint):
            section = hint
        return section if isinstance(section, type) else None

    @property
    def default(self) -> Any:
        """The default; `dataclasses.MISSING` if there is none."""
        if self.field.default_factory is not dataclasses.MISSING:
            return self.field.default_factory()
        return self.field.default

    @property
    def rule(self) -> str:
        """What the value must be besides its type, in words; empty: anything."""
        about = self.field.metadata
        if "choices" in about:
            return f"one of: {', '.join(map(shown, about['choices']))}"
        if "least" in about:
            least, most = shown(about["least"]), shown(about["most"])
            return f"above {least}, at most {most}" if about["above"] else f"from {least} to {most}"
        return ""

    def allows(self, value: Any) -> bool:
        """Whether a value of the right type keeps the rule."""
        about = self.field.metadata
        if "choices" in about:
            return value in about["choices"]
        if "least" in about:
            enough = value > about["least"] if about["above"] else value >= about["least"]
            return bool(enough and value <= about["most"])
        return True


def number(default: int | float, least: int | float, most: int | float, above: bool = False) -> Any:
    """A field of a dataclass that holds a number from `least` (or above it) to `most`."""
    bounds = {"least": least, "most": most, "above": above}
    return dataclasses.field(default=default, metadata=bounds)


def choice(default: str, choices: Sequence[str]) -> Any:
    """A field of a dataclass that holds one of some words."""
    return dataclasses.field(default=default, metadata={"choices": tuple(choices)})


def check_fields(config: Any) -> None:
    """Refuse values of a dataclass that its fields' bounds and choices exclude.

    Raises:
        UserError: naming the field, its value and what it must be.
    """
    schema: Any = type(config)
    for key in keys(schema):
        refuse(key, key.name, getattr(config, key.name))


def whole_numbers(
    key: str, value: Any, such: str, least: int, most: int, between: str = ","
) -> tuple[int, ...]:
    """Whole numbers within bounds, from one number, a list, its word `[a,b]` or the word `a,b`.

    Args:
        key: names the value in a refusal.
        value: what was given.
        such: says what it should be.
        least, most: bounds of each number.
        between: what stands between the numbers of a word without brackets.

    Raises:
        UserError: the value is none of these.
    """
    parts = [value] if isinstance(value, int) else value
    if isinstance(value, str) and not value.startswith("["):
        parts = value.split(between) if value else []
    try:
        numbers: tuple[int, ...] = typed(tuple[int, ...], parts)
    except ValueError as error:
        raise UserError(f"{key} {shown(value)} is not {such}.") from error
    if not all(least <= number <= most for number in numbers):
        raise UserError(f"{key} {shown(value)} is not {such}, from {least} to at most {most}.")
    return numbers


def refuse(key: Key, name: str, value: Any) -> None:
    """Raise `UserError` if a value breaks the rule of its field."""
    if not key.allows(value):
        raise UserError(f"{name}={shown(value)}: it must be {key.rule}.")


@cache
def keys(schema: Any) -> tuple[Key, ...]:
    """The fields of a dataclass in their order."""
    hints = get_type_hints(schema)
    return tuple(Key(one.name, hints[one.name], one) for one in dataclasses.fields(schema))


def leaves(schema: type, prefix: str = "") -> list[str]:
    """The dotted keys of all single values of a dataclass and of those inside it."""
    return [name for name, _ in described(schema, prefix)]


def described(schema: type, prefix: str = "") -> Iterator[tuple[str, Key]]:
    """The dotted keys of all single values, with their fields."""
    for key in keys(schema):
        if key.section:
            yield from described(key.section, f"{prefix}{key.name}.")
        else:
            yield f"{prefix}{key.name}", key


def near(word: str, names: Iterable[str], least: float = _NEAR) -> str | None:
    """Which of some names a misspelt one may stand for."""
    if len(word) > _LONGEST_NAME:
        return None
    return next(iter(difflib.get_close_matches(word, list(names), n=1, cutoff=least)), None)


def unknown(schema: type, name: str) -> str:
    """What to say of an unknown key: keys that may be meant, or those that stand beside it."""
    names = leaves(schema)
    above, _, last = name.rpartition(".")
    beside = _beside(schema, above)
    sibling = near(last, beside) if above in _sections(schema) else None
    meant = [full for full in names if full.endswith(f".{name}")]
    meant = meant or [full for full in names if full.rpartition(".")[2] == last]
    meant = meant or ([f"{above}.{sibling}".lstrip(".")] if sibling else _misspelt(name, names))
    if meant:
        listed = " or ".join(f"'{one}'" for one in meant[:4])
        return f"unknown key '{shown(name)}'; did you mean {listed}?"
    return f"unknown key '{shown(name)}'; the keys there are: {', '.join(beside)}."


def _misspelt(name: str, names: Sequence[str]) -> list[str]:
    """The keys whose end, from any of their sections on, is almost the same as a name."""
    ends: dict[str, str] = {}
    for full in names:
        parts = full.split(".")
        ends |= {".".join(parts[start:]): full for start in range(len(parts))}
    depth = name.count(".")
    alike = [end for end in ends if end.count(".") == depth]
    match = near(name, alike, _ALMOST_SAME)
    return [ends[match]] if match and near(name.split(".")[-1], [match.split(".")[-1]]) else []


def _sections(schema: type, prefix: str = "") -> list[str]:
    """The dotted names of the sections of a dataclass; the empty name is the top."""
    names = [prefix.removesuffix(".")]
    for key in keys(schema):
        if key.section:
            names += _sections(key.section, f"{prefix}{key.name}.")
    return names


def _beside(schema: type, above: str) -> list[str]:
    """The names of the keys in a section; those at the top if there is no such section."""
    inside = schema
    for part in above.split(".") if above in _sections(schema) and above else ():
        inside = next(key.section for key in keys(inside) if key.name == part and key.section)
    return [key.name for key in keys(inside)]
