"""Row groups of tables that go together, read as arrays.

    manifest: parts, each with `groups` [scale, split, rows] -> RowGroup -read-> Group

A table's part is only taken if its footer bears the stamp that the manifest lists.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float16, Float32, Int

from raylarge import schema, storage, tables
from raylarge.errors import UserError
from raylarge.models.conditioner import SLOTS


class NoRows(UserError):
    """A split that holds nothing."""


class Table:
    """One table by its manifest."""

    def __init__(self, root: str, name: str, columns: Sequence[str]) -> None:
        """Read the manifest.

        Raises:
            UserError: the table is not whole, or of another version.
        """
        self.root, self.name = root, name
        self.made = tables.manifest(root, name)
        self.parts: list[dict[str, Any]] = self.made["parts"]
        if unfit := _unfit(self.made):
            raise UserError(
                f"the manifest of {name} in {root} lacks {unfit}: it is damaged; prepare the data "
                f"again."
            )
        self.digest = str(self.made["digest"])
        self.kind: pa.Schema = getattr(schema, name.split("-", 1)[0].upper())
        more = ["grid_rows", "grid_columns"] if "grid" in columns else []
        flip = ["flip"] if "flip" in self.kind.names else []
        self.columns = ["key", *columns, *more, *flip]
        self._checked: set[str] = set()
        self._lock = Lock()

    def like(self, part: int, group: RowGroup) -> list[int]:
        """The row groups that may hold a group's rows: its like, or what is left of several."""
        groups = [tuple(one) for one in self.parts[part]["groups"]]
        same = [i for i, one in enumerate(groups) if one[:2] == (group.scale, group.split)]
        alike = group.number in same and group.rows % groups[group.number][2] == 0
        return [group.number] if alike and len(groups) == group.of else same

    def read(self, part: int, groups: Sequence[int]) -> pa.Table:
        """Some row groups.

        Raises:
            UserError: the part was made anew since the manifest was written, or is damaged.
        """
        path = storage.join(self.root, self.parts[part]["part"])
        with self._lock:
            known = path in self._checked
        if not known:
            tables.check_part(path, storage.read_metadata(path), self.parts[part])
        with self._lock:
            self._checked.add(path)
        rows = storage.read_rows(path, groups, self.columns)
        rows = tables.fitting(path, rows, self.kind, self.columns)
        if empty := [name for name in self.columns if name != "labels" and rows[name].null_count]:
            raise UserError(f"{path} has rows without {empty[0]}; prepare the data again.")
        return rows


class RowGroup(NamedTuple):
    """A row group of the table that leads; large tables have hundreds of thousands.

    Attributes:
        of: how many its part has.
    """

    part: int
    number: int
    rows: int
    scale: int
    split: str
    of: int

    def read(self, tables_: Sequence[Table]) -> Group:
        """Its arrays, and those of the same rows, by their keys, in the other tables.

        Raises:
            UserError: a part does not fit, or another table lacks rows. Vectors may be missing:
                they are zeros then.
        """
        lead, *others = tables_
        found = [lead.read(self.part, [self.number])]
        if found[0].num_rows != self.rows:
            raise self._damaged(lead, f"{found[0].num_rows} rows, not the {self.rows} of the list")
        at = [np.arange(self.rows)]
        for table in others:
            found.append(table.read(self.part, table.like(self.part, self)))
            place = pc.index_in(found[0]["key"], value_set=found[-1]["key"]).fill_null(-1)
            at.append(place.to_numpy())
            if (at[-1] < 0).any() and "vector" not in table.columns:
                raise UserError(
                    f"{table.name} lacks {(at[-1] < 0).sum()} of {self.rows} rows of {lead.name}; "
                    f"make both anew from the same examples."
                )
        width = max((part.get("width", 0) for one in tables_ for part in one.parts), default=0)
        try:
            return Group.of(found, at, lead.parts[self.part].get("shape", ()), width)
        except ValueError as error:
            raise self._damaged(lead, str(error)) from error

    def _damaged(self, lead: Table, what: str) -> UserError:
        part = storage.join(lead.root, lead.parts[self.part]["part"])
        return UserError(
            f"row group {self.number} of {part} is damaged: {what}; prepare the data again."
        )


@dataclass(frozen=True)
class Group:
    """Rows as arrays; what was not read is None."""

    sizes: Int[np.ndarray, "n 2"] | None = None
    starts: Int[np.ndarray, " n1"] | None = None
    grid: Float16[np.ndarray, " values"] | None = None
    latent: Float16[np.ndarray, "n c h w"] | None = None
    vector: Float32[np.ndarray, "n V"] | None = None
    image: list[bytes] | None = None
    flip: Int[np.ndarray, " n"] | None = None
    labels: list[dict[str, str]] | None = None

    @staticmethod
    def of(
        found: Sequence[pa.Table],
        places: Sequence[Int[np.ndarray, " n"]],
        shape: Sequence[int],
        width: int,
    ) -> Group:
        """The arrays of one row group of several tables.

        Args:
            found: the rows of each table.
            places: where in each the rows of the first are; -1: nowhere.
            shape: of a latent.
            width: of a vector.

        Raises:
            ValueError: what belongs together does not fit.
        """
        made: dict[str, Any] = {}
        for table, place in zip(found, places, strict=True):
            table = table.take(place[place >= 0])
            names = set(table.column_names)
            if "grid" in names:
                made |= _grids(table)
            if "latent" in names:
                made["latent"] = _latents(table, shape)
            if "vector" in names:
                values, starts = tables.lists(table["vector"])
                made["vector"] = np.zeros((len(place), width), np.float32)
                given = values[starts[0] : starts[-1]].reshape(table.num_rows, width)
                made["vector"][place >= 0] = given
            if "image" in names:
                made["image"] = table["image"].to_pylist()
            if "labels" in names:
                made["labels"] = [dict(row or ()) for row in table["labels"].to_pylist()]
        if "flip" in found[0].column_names:  # of the table that leads: others are turned to it
            made["flip"] = found[0]["flip"].to_numpy().astype(np.int64)
        return Group(**made)

    @property
    def channels(self) -> int:
        """Width of one embedding; 0 without grids."""
        if self.grid is None or self.starts is None or self.sizes is None:
            return 0
        return int(self.starts[1] - self.starts[0]) // int(self.sizes[0].prod())

    @property
    def bytes(self) -> int:
        """About what it holds in memory."""
        arrays = (self.grid, self.latent, self.vector)
        held = sum(array.nbytes for array in arrays if array is not None)
        return held + sum(map(len, self.image or ()))

    def grid_of(self, row: int) -> tuple[Float16[np.ndarray, "cells C"], Int[np.ndarray, "2"]]:
        """The cells of a row, and how many rows and columns they make."""
        assert self.grid is not None
        assert self.starts is not None
        assert self.sizes is not None
        cells = self.grid[self.starts[row] : self.starts[row + 1]]
        return cells.reshape(int(self.sizes[row].prod()), -1), self.sizes[row]


def manifest_groups(
    found: Sequence[Table], split: str, scales: Sequence[int] | None
) -> dict[int, list[RowGroup]]:
    """The row groups of a split by scale, in one order however the manifest lists its parts.

    Raises:
        NoRows: none is of the split.
        UserError: tables of other parts, or no row of a scale asked for.
    """
    lead = found[0]
    names = [[part["part"].rsplit("/", 1)[-1] for part in table.parts] for table in found]
    for table, its in zip(found, names, strict=True):
        if sorted(its) != sorted(names[0]):
            raise UserError(
                f"{table.name} was not made of the examples that {lead.name} was made of; run "
                f"jobs/prepare.py again for both."
            )
        table.parts = [part for _, part in sorted(zip(its, table.parts, strict=True), key=_name)]
    groups: dict[int, list[RowGroup]] = {}
    for number, part in enumerate(lead.parts):
        of = len(part["groups"])
        for at, (k, its_split, rows) in enumerate(part["groups"]):
            if its_split == split and rows > 0 and (scales is None or k in scales):
                group = RowGroup(number, at, rows, k, its_split, of)
                groups.setdefault(k, []).append(group)
    if missing := sorted(set(scales or ()) - groups.keys()):
        raise NoRows(
            f"scale {missing[0]} has no row of the split '{split}' in {lead.root}; prepare the "
            f"data with that scale, or leave it out."
        )
    if not groups:
        raise NoRows(
            f"none of the {lead.made['rows']} rows that {lead.made['verb']} made in {lead.root} "
            f"is of the split '{split}'; prepare more slides, or hold out fewer."
        )
    return groups


def _grids(table: pa.Table) -> dict[str, np.ndarray]:
    """The cells of all rows end to end, where each row's begin, and how many there are.

    Raises:
        ValueError: rows that are not of so many cells, all of one width.
    """
    values, starts = tables.lists(table["grid"])
    both = [table[name].to_numpy() for name in ("grid_rows", "grid_columns")]
    sizes = np.stack(both, axis=1).astype(np.int64)
    cells, lengths = sizes.prod(axis=1), np.diff(starts)
    width = lengths[0] // max(1, cells[0])
    if (sizes < 1).any() or (cells > SLOTS).any() or width < 1 or (lengths != width * cells).any():
        raise ValueError("grids that are not as large as they say")
    return {"grid": values, "starts": starts, "sizes": sizes}


def _unfit(made: dict[str, Any]) -> str:
    """What of a manifest that training goes by is missing or of another kind; else nothing."""
    kinds = {"digest": str, "patch_px": int, "encoder": dict, "rows": int}
    for name, kind in kinds.items():
        if not isinstance(made.get(name), kind):
            return name
    for part in made["parts"]:
        if not _are_groups(part.get("groups")):
            return f"groups of {part['part']}"
    return ""


def _are_groups(groups: Any) -> bool:
    """Whether they are rows of [scale, split, rows]; column by column, as they may be many."""
    try:
        columns = list(zip(*groups, strict=True))
    except (TypeError, ValueError):
        return False
    return not columns or [set(map(type, column)) for column in columns] == [{int}, {str}, {int}]


def _name(pair: tuple[str, dict[str, Any]]) -> str:
    return pair[0]


def _latents(table: pa.Table, shape: Sequence[int]) -> Float16[np.ndarray, "n c h w"]:
    """Latents as an array.

    Raises:
        ValueError: they are not of the shape that their manifest tells.
    """
    values, starts = tables.lists(table["latent"])
    length = int(starts[1] - starts[0])
    if len(shape) != 3 or math.prod(shape) != length or (np.diff(starts) != length).any():
        raise ValueError(f"latents of {length} values in the first are not of one shape {shape}")
    return values[starts[0] : starts[-1]].reshape(-1, *shape)
