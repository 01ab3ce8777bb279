"""The keys of a configuration: their types, defaults, bounds, choices and descriptions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from raylarge.config import words
from raylarge.config.descriptions import descriptions, split_example
from raylarge.config.words import Form, format_value
from raylarge.errors import UserError

REQUIRED: Any = object()
"""The default of a field that must be given."""


@dataclass(frozen=True)
class Key:
    """One field of a configuration.

    Attributes:
        name: of the field.
        hint: its type.
        default: its default, or REQUIRED.
        description: what it means, with units.
        example: a value as one types it; empty if there is none.
        metadata: bounds (`annotated_types`) and a `Form`.
        section: the model whose fields are the keys below this one; None for a single value.
    """

    name: str
    hint: Any
    default: Any
    description: str = ""
    example: str = ""
    metadata: tuple[Any, ...] = ()
    section: Any = None

    @property
    def choices(self) -> tuple[Any, ...]:
        """The values of a `Literal`; none for other fields."""
        literals = [one for one in words.alternatives(self.hint) if get_origin(one) is Literal]
        return tuple(value for literal in literals for value in get_args(literal))

    @property
    def form(self) -> str:
        """What the value must be, in words, such as `a whole number such as 3`."""
        form = self._form()
        return form.text if form else words.describe(self.hint)

    @property
    def rule(self) -> str:
        """Bounds and choices in words; empty: anything of its type."""
        if self.choices:
            return f"one of: {', '.join(map(format_value, self.choices))}"
        if of_key := _bounds(self.metadata):
            return of_key
        items = [item for kind in words.alternatives(self.hint) for item in get_args(kind)]
        of_items = [_bounds(get_args(item)[1:]) for item in items]
        return next((f"each {rule}" for rule in of_items if rule), "")

    def read(self, value: Any) -> Any:
        """Return a value as one of the field's type; JSON's null is the word, if that is a choice.

        Raises:
            ValueError: it is none of that type.
        """
        if value is None and "null" in self.choices:
            return "null"
        form = self._form()
        return form.read(value) if form else words.read(self.hint, value)

    def _form(self) -> Form | None:
        return next((one for one in self.metadata if isinstance(one, Form)), None)


@cache
def keys(schema: Any) -> tuple[Key, ...]:
    """Return the fields of a configuration in their order."""
    if issubclass(schema, BaseModel):
        return tuple(_of_model(name, field) for name, field in schema.model_fields.items())
    hints, texts = get_type_hints(schema), descriptions(schema)
    return tuple(
        _of_dataclass(field, hints[field.name], texts.get(field.name, ""))
        for field in dataclasses.fields(schema)
    )


def find(schema: Any, name: str) -> Key | None:
    """Return a field by its name, or None."""
    return next((key for key in keys(schema) if key.name == name), None)


def key(schema: Any, name: str) -> Key:
    """Return a field that is there by its name."""
    return _by_name(schema)[name]


@cache
def _by_name(schema: Any) -> dict[str, Key]:
    return {key.name: key for key in keys(schema)}


def leaves(schema: type, prefix: str = "") -> list[str]:
    """Return the dotted keys of all single values, those of sections included."""
    return [name for name, _ in walk(schema, prefix)]


def walk(schema: type, prefix: str = "") -> Iterator[tuple[str, Key]]:
    """Yield the dotted keys of all single values with their fields."""
    for key in keys(schema):
        if key.section:
            yield from walk(key.section, f"{prefix}{key.name}.")
        else:
            yield f"{prefix}{key.name}", key


def _of_model(name: str, field: FieldInfo) -> Key:
    hint = field.annotation
    default = REQUIRED if field.is_required() else field.get_default(call_default_factory=True)
    section = hint if isinstance(hint, type) and issubclass(hint, BaseModel) else None
    example = format_value(field.examples[0]) if field.examples else ""
    description = " ".join((field.description or "").split())
    return Key(name, hint, default, description, example, tuple(field.metadata), section)


def _bounds(metadata: Iterable[Any]) -> str:
    """Return bounds in words: `from 0 to 3`, `above 0, at most 1`, `at least 1`."""
    flat = [
        bound
        for one in metadata
        for bound in (one.metadata if isinstance(one, FieldInfo) else [one])
    ]
    limits: dict[type, Any] = {type(bound): bound for bound in flat}
    low, above = limits.get(annotated_types.Ge), limits.get(annotated_types.Gt)
    high, below = limits.get(annotated_types.Le), limits.get(annotated_types.Lt)
    if low and high:
        return f"from {format_value(low.ge)} to {format_value(high.le)}"
    parts = [f"above {format_value(above.gt)}"] if above else []
    parts += [f"at least {format_value(low.ge)}"] if low else []
    parts += [f"at most {format_value(high.le)}"] if high else []
    parts += [f"below {format_value(below.lt)}"] if below else []
    return ", ".join(parts)


# --- dataclasses, until every configuration is a model ----------------------------------


def number(default: int | float, least: int | float, most: int | float, above: bool = False) -> Any:
    """A field of a dataclass that holds a number from `least` (or above it) to `most`."""
    low = annotated_types.Gt(least) if above else annotated_types.Ge(least)
    return dataclasses.field(default=default, metadata={"bounds": (low, annotated_types.Le(most))})


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


def refuse(key: Key, name: str, value: Any) -> None:
    """Raise `UserError` if a value breaks the rule of its field."""
    fine = not key.choices or value in key.choices
    for bound in key.metadata:
        fine = fine and (not isinstance(bound, annotated_types.Ge) or value >= bound.ge)
        fine = fine and (not isinstance(bound, annotated_types.Gt) or value > bound.gt)
        fine = fine and (not isinstance(bound, annotated_types.Le) or value <= bound.le)
    if not fine:
        raise UserError(f"{name}={format_value(value)}: it must be {key.rule}.")


def whole_numbers(
    key: str, value: Any, such: str, least: int, most: int, between: str = ","
) -> tuple[int, ...]:
    """Whole numbers within bounds, from one number, a list, its word `[a,b]` or the word `a,b`.

    Raises:
        UserError: the value is none of these.
    """
    try:
        numbers: tuple[int, ...] = words.read_numbers(value, between)
    except ValueError as error:
        raise UserError(f"{key} {format_value(value)} is not {such}.") from error
    if not all(least <= number <= most for number in numbers):
        shown = format_value(value)
        raise UserError(f"{key} {shown} is not {such}, from {least} to at most {most}.")
    return numbers


def _of_dataclass(field: dataclasses.Field[Any], hint: Any, text: str) -> Key:
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    default = REQUIRED if default in (dataclasses.MISSING, words.MISSING) else default
    choices = field.metadata.get("choices")
    section = field.metadata.get("keys")
    if section is None and (
        dataclasses.is_dataclass(hint) or (isinstance(hint, type) and issubclass(hint, BaseModel))
    ):
        section = hint
    metadata = field.metadata.get("bounds", ())
    if "kind" in field.metadata:
        read = words.reader(hint)
        metadata = (*metadata, Form(field.metadata["kind"], read))
    hint = Literal[choices] if choices else hint
    return Key(field.name, hint, default, *split_example(text), metadata, section)
