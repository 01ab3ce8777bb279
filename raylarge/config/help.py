"""The text of `--help`: every key of a job with its type, default, meaning and an example."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from raylarge.config import fields, words

_RULES = """\
Every word is key=value; of a key that is repeated the last counts. Text stands as it is after
the =, numbers are plain decimal numbers, flags true or false, lists [a,b], and null is no value
where that is offered. Put quotes around a word that holds spaces, *, # or brackets: they belong
to the shell."""


def text(
    about: str, schemas: Mapping[str, type], presets: Sequence[str], leave_out: Sequence[str] = ()
) -> str:
    """The description of a job, wrapped to the terminal.

    Args:
        about: what the job does.
        schemas: heading -> configuration whose fields are the keys.
        presets: names for `preset=`.
        leave_out: keys that are not described, with all below them.
    """
    width = max(40, min(100, shutil.get_terminal_size((100, 24)).columns))
    parts = [about.strip()] if about else []
    parts.append(textwrap.fill(_RULES, width))
    if presets:
        names = f"One of: {', '.join(presets)}"
        parts.append(
            _entry(
                "preset=NAME",
                names,
                "Values that other words may override",
                f"preset={presets[0]}",
                width,
            )
        )
    for heading, schema in schemas.items():
        parts += [f"{heading}\n{'-' * len(heading)}"] if heading else []
        parts += _section(schema, "", leave_out, width)
    return "\n\n".join(parts)


def _section(
    schema: type, prefix: str, leave_out: Sequence[str], width: int, defaults: Any = None
) -> list[str]:
    """Return the entries of a configuration and of its sections.

    Args:
        schema: the configuration's class.
        prefix: of its keys.
        leave_out: keys that are not described.
        width: of a line, in characters.
        defaults: an object with the defaults; None: those of the class.
    """
    parts = []
    for key in fields.keys(schema):
        if isinstance(defaults, schema):
            key = replace(key, default=getattr(defaults, key.name))
        name = f"{prefix}{key.name}"
        if name in leave_out:
            continue
        meaning, example = key.description, key.example
        if key.section:
            about = meaning or (key.section.__doc__ or "").strip().split("\n")[0]
            parts.append(_filled(f"{name}.*  {about}", width))
            parts += _section(key.section, f"{name}.", leave_out, width, key.default)
        else:
            example = example or _example(key)
            example = f"{name}={example}" if example else ""
            shell = f"'{example}'" if set(example) & set(' *#[]{}()|&;<>$\\"?') else example
            parts.append(_entry(_head(name, key), _kind(key), meaning, shell, width))
    return parts


def _entry(head: str, kind: str, meaning: str, example: str, width: int) -> str:
    meaning = f"{meaning}." if meaning and meaning[-1] not in ".?!" else meaning
    lines = [head, _filled(f"{kind}. {meaning[:1].upper()}{meaning[1:]}".strip(), width, "    ")]
    lines += [f"    example: {example}"] if example else []
    return "\n".join(lines)


def _filled(line: str, width: int, indent: str = "") -> str:
    return textwrap.fill(
        line, width, initial_indent=indent, subsequent_indent=indent or "    ",
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _head(name: str, key: fields.Key) -> str:
    """The key with its default."""
    if key.default is fields.REQUIRED:
        return f"{name}=...  (must be given)"
    if key.default in ("", ()) or key.default == []:
        return f"{name}=  (empty by default)"
    return f"{name}={words.format_value(key.default)}"


def _kind(key: fields.Key) -> str:
    """Return type and rule of a key."""
    kind = key.form.split(" such as")[0]
    kind += " or null" if words.optional(key.hint) and not kind.endswith(" or null") else ""
    return f"{kind[0].upper()}{kind[1:]}" + (f", {key.rule}" if key.rule else "")


def _example(key: fields.Key) -> str:
    """Return a value to show: the second choice, the default, or one of the type."""
    if key.choices:
        others = [choice for choice in key.choices if choice != key.default]
        return words.format_value((others or key.choices)[0])
    if key.hint is bool:
        return words.format_value(not key.default)
    if key.default in (fields.REQUIRED, None, "", (), 0) or key.default == []:
        return words.example(key.hint)
    return words.format_value(key.default)
