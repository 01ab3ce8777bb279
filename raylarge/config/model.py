"""The base class of every configuration: a frozen pydantic model that reads words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from raylarge.config import fields, messages
from raylarge.errors import UserError

C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """A configuration: immutable, without unknown keys, its values of exactly their types.

    Types, bounds and choices say what a value may be; the string below a field says what it
    means, with units. `--help` and JSON schemas are made of the same:

        class Sampler(Config):
            '''Settings of the sampler.'''

            steps: int = Field(50, ge=1, le=999)
            '''Steps of the schedule.'''
            solver: Literal["ddim", "plms"] = "ddim"
            folder: str = Field(examples=["data"])  # without a default: it must be given
            canvas: Canvas = Canvas()  # a section: its keys are canvas.*

            @model_validator(mode="after")
            def _check(self) -> Sampler:
                if self.solver == "plms" and self.steps < 4:
                    raise ValueError(f"solver=plms needs steps=4 or more, not {self.steps}.")
                return self

    A string for a field that is no text is read as a word of the command line (`words`), so
    words, JSON documents and keyword arguments are validated alike. A value that its type cannot
    describe (`size=64x96`) has a `Form` in its annotation. Prefer tuples to lists.

    Raises:
        UserError: an unknown key, a missing one, or a value that does not fit.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )

    def __init__(self, **values: Any) -> None:
        """Validate values by field name."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UserError(messages.sentence(type(self), error, values)) from error

    # Without this mark pydantic builds nested models by their own `__init__`, which would name a
    # wrong value by the last part of its key alone.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @field_validator("*", mode="before")
    @classmethod
    def _read(cls, value: Any, info: Any) -> Any:
        """Return a value as one of its field's type; of a section, with the field's default."""
        key = fields.key(cls, str(info.field_name))
        if key.section:
            default = key.default
            if not isinstance(value, Mapping) or not isinstance(default, Config):
                return value
            usual = {other.name: other.default for other in fields.keys(type(default))}
            own = {n: v for n, v in default.set_values().items() if v != usual[n]}
            return merged(own, value)
        try:
            return key.read(value)
        except ValueError as error:
            raise PydanticCustomError("word", "does not fit") from error

    def set_values(self) -> dict[str, Any]:
        """Return the values that were set, by field; what they leave open are defaults."""
        return {name: getattr(self, name) for name in sorted(self.model_fields_set)}

    def replace(self: C, **changes: Any) -> C:
        """Return a validated copy with some fields changed.

        Raises:
            UserError: as for a new object.
        """
        return type(self)(**{**self.set_values(), **changes})

    def plain(self) -> dict[str, Any]:
        """Return plain dicts and lists, ready for JSON."""
        return {name: _plain(value) for name, value in self}


def merged(base: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping in which a layer's values replace the base's, nested mappings inside."""
    values = dict(base)
    for name, value in layer.items():
        below = values.get(name)
        below = below.set_values() if isinstance(below, Config) else below
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        values[name] = merged(below, value) if both else value  # type: ignore[arg-type]
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.plain()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
