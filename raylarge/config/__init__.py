"""Configuration: frozen pydantic models that stand beside their owner.

    defaults of the model  <  preset=NAME  <  a.b=c overrides

Subclass `Config` (its docstring shows how). `parse` reads words of the command line, `build`
layers of mappings; both raise `UserError` with one sentence: key, value, what it may be. `words`
reads a word, `fields` describes keys, `messages` makes the sentences, `help` prints the keys,
`places` checks folders and URLs.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from raylarge.config import help as _help
from raylarge.config.building import build, plain, require
from raylarge.config.fields import check_fields, choice, leaves, number, whole_numbers
from raylarge.config.messages import nearest
from raylarge.config.model import Config, merged
from raylarge.config.places import check_places, require_place
from raylarge.config.words import MISSING, Form, format_value, read, read_numbers
from raylarge.errors import UserError

T = TypeVar("T")

__all__ = [
    "MISSING",
    "Config",
    "Form",
    "build",
    "check_fields",
    "choice",
    "format_value",
    "merged",
    "nearest",
    "number",
    "parse",
    "plain",
    "read",
    "read_numbers",
    "require",
    "require_place",
    "show_help",
    "wants_help",
    "whole_numbers",
]


def parse(
    schema: type[T],
    arguments: Sequence[str],
    presets: Mapping[str, Mapping[str, Any]],
    about: str = "",
) -> T:
    """Turn command-line words such as `preset=tiny order.size=512` into a config object.

    Args:
        schema: a frozen dataclass; its fields are the keys, nested dataclasses the dots.
        arguments: words of the form `key=value`; of a key that is repeated the last counts.
        presets: named overrides, chosen by the word `preset=NAME`.
        about: what the job does, the head of its help.

    Raises:
        UserError: a word that is no `key=value`, an unknown preset or key, an unfit value, or a
            relative folder under a submitted Ray job.
        SystemExit: with status 0 after `--help` or `-h` was answered.
    """
    if wants_help(arguments):
        show_help(about, {"": schema}, presets)
    for word in arguments:
        if "=" not in word:
            keys = ", ".join(leaves(schema))
            raise UserError(f"'{format_value(word)}' is not of the form key=value; keys: {keys}.")
    pairs = [word.split("=", 1) for word in arguments]
    names = [value for key, value in pairs if key == "preset"]
    if names and names[-1] not in presets:
        choices = ", ".join(sorted(presets))
        cure = f"choose one of: {choices}" if choices else "leave out preset="
        raise UserError(f"there is no preset '{format_value(names[-1])}'; {cure}.")
    layers = [presets[names[-1]]] if names else []
    words = [_layer(key, value) for key, value in pairs if key != "preset"]
    config = build(schema, *layers, *words)
    check_places(config)
    return config


def wants_help(arguments: Sequence[str]) -> bool:
    """Whether the words ask for help."""
    return "--help" in arguments or "-h" in arguments


def show_help(
    about: str,
    schemas: Mapping[str, type],
    presets: Sequence[str] | Mapping[str, Any],
    leave_out: Sequence[str] = (),
) -> None:
    """Print the description of a job's keys and end with status 0.

    Args:
        about: what the job does.
        schemas: heading -> dataclass; an empty heading is not printed.
        presets: names for `preset=`.
        leave_out: keys of the dataclasses that are not described, with all below them.

    Raises:
        SystemExit: with status 0.
    """
    print(_help.text(about, schemas, list(presets), leave_out))
    sys.exit(0)


def _layer(key: str, value: Any) -> dict[str, Any]:
    """The nested mapping that one `a.b=value` stands for."""
    for part in reversed(key.split(".")):
        value = {part: value}
    layer: dict[str, Any] = value
    return layer
