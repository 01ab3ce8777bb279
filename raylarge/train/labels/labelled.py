"""What supervised tasks share: labels of slides, rows a few at a time, and keeping a network.

    EXAMPLES -labels of a slide-> {slide_id: value}          (`tile.labels` put them there)
    any table -row groups of a scale and split-> pyarrow tables, never the whole

A trained classifier is no part of a sampling bundle; it stands beside one, in diffusers' layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import save

from raylarge import storage, tables
from raylarge.errors import UserError

_GROUPS = 64  # row groups read at a time
_WEIGHTS, _CONFIG = "diffusion_pytorch_model.safetensors", "config.json"

Where = tuple[str, Sequence[int], Sequence[str]]
"""A table's name, and the scales and the splits whose rows are wanted; empty means all."""


def count(root: str, where: Where) -> int:
    """How many rows there are."""
    return sum(rows for _, found in _wanted(root, where) for _, rows in found)


def pieces(
    root: str, where: Where, columns: Sequence[str], at_once: int = _GROUPS
) -> Iterator[pa.Table]:
    """The rows, some row groups at a time, in the order of the table's parts.

    Raises:
        UserError: no such table, or a part that is not the one its manifest lists.
    """
    for part, found in _wanted(root, where):
        path = storage.join(root, part["part"])
        for start in range(0, len(found), at_once):
            groups = [number for number, _ in found[start : start + at_once]]
            table = storage.read_rows(path, groups, columns)
            tables.check_part(path, table.schema.metadata or {}, part)
            yield table


def slide_labels(root: str, label: str, key: str) -> dict[str, str]:
    """What one label says of each slide that has examples; "" where it says nothing.

    Args:
        root: the data folder.
        label: its name.
        key: what the configuration calls it, such as `mil.label`.

    Raises:
        UserError: no slide has it; tells the labels there are.
    """
    said: dict[str, Mapping[str, str]] = {}
    for table in pieces(root, ("examples", (), ()), ("slide_id", "labels")):
        names = np.array(table["slide_id"].to_pylist())
        _, first = np.unique(names, return_index=True)  # rows of a slide say the same
        rows = table["labels"].take(pa.array(first)).to_pylist()
        said.update((str(names[at]), dict(row or ())) for at, row in zip(first, rows, strict=True))
    found = {slide: row.get(label, "") for slide, row in said.items()}
    if not label or not any(found.values()):
        there = sorted({name for row in said.values() for name in row})
        listed = ", ".join(there) or "none (tile.table= and tile.labels= of jobs/prepare.py)"
        raise UserError(
            f"{key}={label or '(empty)'} is no label of a slide in {root}; the labels there "
            f"are: {listed}."
        )
    return found


def classes(root: str, label: str, key: str) -> tuple[str, ...]:
    """The values of a label over all slides, sorted.

    Raises:
        UserError: no such label, one that slides lack, or one value alone.
    """
    said = slide_labels(root, label, key)
    found = sorted(set(said.values()))
    if "" in found:
        lacking = sum(not value for value in said.values())
        raise UserError(
            f"{key}={label}: {lacking} of the {len(said)} slides in {root} have no such label; "
            f"give it to all in tile.table, or leave those slides out."
        )
    if len(found) < 2:
        raise UserError(
            f"{key}={label} is '{found[0]}' for all {len(said)} slides in {root}; there is nothing "
            f"to tell apart."
        )
    return tuple(found)


def keep(network: ModelMixin, folder: str) -> None:
    """Write a network; its config goes first and comes last, so that half of it is none."""
    config = storage.join(folder, _CONFIG)
    storage.remove(config)
    state = {
        name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()
    }
    storage.write_bytes(storage.join(folder, _WEIGHTS), save(state, {"format": "pt"}))
    storage.write_bytes(config, network.to_json_string().encode())


def _wanted(root: str, where: Where) -> Iterator[tuple[dict[str, Any], list[tuple[int, int]]]]:
    """Each part with the numbers and sizes of its wanted row groups, where it has any."""
    name, scales, splits = where
    for part in tables.manifest(root, name)["parts"]:
        found = [
            (number, int(rows))
            for number, (k, split, rows) in enumerate(part.get("groups", ()))
            if (not scales or k in scales) and (not splits or split in splits)
        ]
        if found:
            yield part, found
