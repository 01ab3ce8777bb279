"""What the fields of a dataclass mean, as its source says it.

A field is described by the `Attributes:` section of its class, by a string below it, or by a
comment behind it:

    rate: float = 0.5
    \"\"\"Learning rate. Example: 0.1\"\"\"
    steps: int = 10  # optimiser steps
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from functools import cache

_EXAMPLE = re.compile(r"\s*Example: (.+?)\.?$")


@cache
def descriptions(schema: type) -> dict[str, str]:
    """Name of a field -> its description; fields of base classes are included."""
    texts: dict[str, str] = {}
    for owner in reversed(schema.__mro__):
        if "__dataclass_fields__" in vars(owner):
            texts |= _from_source(owner) | _from_attributes(owner)
    return texts


def split_example(text: str) -> tuple[str, str]:
    """A description without its `Example: ...`, and the example; empty if there is none."""
    match = _EXAMPLE.search(text)
    return (text[: match.start()], match[1]) if match else (text, "")


def _from_attributes(owner: type) -> dict[str, str]:
    """The entries of the section `Attributes:` of a class's docstring."""
    _, _, section = inspect.cleandoc(owner.__doc__ or "").partition("Attributes:\n")
    texts: dict[str, str] = {}
    names: list[str] = []
    for line in textwrap.dedent(section).splitlines():
        match = re.match(r"(\w+(?:, \w+)*): (.*)", line)
        if match:
            names = match[1].split(", ")
            texts |= dict.fromkeys(names, match[2])
        elif line.startswith(" ") and names:
            texts |= dict.fromkeys(names, f"{texts[names[0]]} {line.strip()}")
        elif line.strip():
            break
    return texts


def _from_source(owner: type) -> dict[str, str]:
    """The strings below fields and the comments behind them; none where the source is away."""
    try:
        source = textwrap.dedent(inspect.getsource(owner))
    except OSError:
        return {}
    lines, body = source.splitlines(), ast.parse(source).body[0].body  # type: ignore[attr-defined]
    texts = {}
    for node, after in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        behind = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode().strip()  # type: ignore[operator]
        if behind.startswith("#"):
            texts[node.target.id] = behind.removeprefix("#").strip()
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            texts[node.target.id] = " ".join(str(after.value.value).split())
    return texts
