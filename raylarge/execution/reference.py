"""A region of a prepared slide as the condition of an order: its base tiles' embeddings."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any

import numpy as np
from jaxtyping import Bool, Float16
from numpy.lib.stride_tricks import sliding_window_view
from pydantic import Field

from raylarge import storage, tables
from raylarge.config import Form, read_numbers
from raylarge.errors import UserError
from raylarge.geometry import Patch
from raylarge.order import LIMIT_PX, Order

_LISTED = 8
"""Slides that a message names."""


def _read_place(value: Any) -> tuple[int, ...] | None:
    if value is None or value == "null":
        return None
    place = read_numbers(value)
    if len(place) != 2:
        raise ValueError("no row and column")
    return place


_Index = Annotated[int, Field(ge=0, le=LIMIT_PX)]
Place = Annotated[tuple[_Index, _Index] | None, Form("a row and a column such as 3,5", _read_place)]
"""Row and column of a base tile; None: the first that will do."""


@dataclass(frozen=True)
class Region:
    """A rectangle of base tiles and their raw embeddings.

    Attributes:
        slide: the slide's id (its pseudonym).
        row, column: of the first base tile, as `at=` takes them.
        grid: the embeddings.
    """

    slide: str
    row: int
    column: int
    grid: Float16[np.ndarray, "rows columns C"]

    @property
    def facts(self) -> dict[str, int | str]:
        """Where the region lies, for a report."""
        rows, columns = self.grid.shape[:2]
        place = {"slide": self.slide, "row": self.row, "column": self.column}
        return {**place, "rows": rows, "columns": columns}

    def __str__(self) -> str:
        rows, columns = self.grid.shape[:2]
        return (
            f"slide {self.slide}, at={self.row},{self.column} ({rows} x {columns} base tiles; its "
            f"right neighbour is at={self.row},{self.column + columns})"
        )


def find_region(reference: str, at: tuple[int, int] | None, order: Order, patch: Patch) -> Region:
    """The raw embeddings of a rectangle of base tiles, and where it lies.

    Args:
        reference: a data folder with EMBEDDINGS, `DATA` or `DATA:slide_id`; without an id its
            first slide, views left aside.
        at: row and column of the rectangle's first base tile; None takes the first place,
            row by row, where every tile was embedded.
        order: whose canvas the rectangle covers.
        patch: the sizes of the bundle.

    Raises:
        UserError: no such data or slide, or a tile that was not embedded.
    """
    rows, columns = ((length << order.scale) // patch.side_px for length in order.size)
    shape = rows, columns
    if min(shape) < 1:
        raise UserError(f"order.size {order.size} is smaller than a patch of the bundle.")
    folder, slide = _parse(reference)
    valid, vectors = _read(folder, slide)
    if at is None and not len(_places(valid, shape)):
        raise UserError(
            f"slide {slide} nowhere has {rows} x {columns} embedded base tiles together; "
            f"{_cure(valid, order, patch)}."
        )
    row, column = _places(valid, shape)[0].tolist() if at is None else at
    cut = slice(row, row + shape[0]), slice(column, column + shape[1])
    if min(row, column) < 0 or valid[cut].shape != shape or not valid[cut].all():
        first, last = np.argwhere(valid).min(axis=0), np.argwhere(valid).max(axis=0)
        raise UserError(
            f"slide {slide} has no embeddings for all of the {shape[0]} x {shape[1]} base tiles "
            f"from at={row},{column} (it has some in rows {first[0]} to {last[0]}, columns "
            f"{first[1]} to {last[1]}); leave out at= for the first place that has them."
        )
    return Region(slide, row, column, vectors[cut])


def _parse(reference: str) -> tuple[str, str]:
    """Folder and slide id of a reference."""
    folder, _, slide = reference.rpartition(":")
    if not folder or "/" in slide:  # no id; a colon may be part of a URL
        folder, slide = reference, ""
    slides = sorted({_slide_of(path) for path in _parts(folder)})
    if slide and slide not in slides:
        more = f" and {len(slides) - _LISTED} more" if len(slides) > _LISTED else ""
        close = get_close_matches(slide, slides, 3)
        some = ", ".join(list(dict.fromkeys([*close, *slides]))[:_LISTED])
        raise UserError(f"{folder} has no slide '{slide}'; it has: {some}{more}.")
    views = set() if slide else _views(folder)
    return folder, slide or next((one for one in slides if one not in views), slides[0])


def _views(folder: str) -> set[str]:
    """Return the slides of a folder that are further views of others (`tile.views`)."""
    path = storage.join(folder, "slides.json")
    slides = storage.read_json(path)["slides"] if storage.exists(path) else []
    return {slide["slide_id"] for slide in slides if slide.get("view")}


def _parts(folder: str) -> list[str]:
    """Paths of the parts of EMBEDDINGS, one or more per slide."""
    manifest = tables.manifest(folder, "embeddings")
    return [storage.join(folder, part["part"]) for part in manifest["parts"]]


def _slide_of(path: str) -> str:
    return path.rsplit("/", 1)[-1].rsplit("-", 1)[0]


def _read(folder: str, slide: str) -> tuple[np.ndarray, np.ndarray]:
    """The base grid of a slide: which tiles were embedded [r, c], and their vectors [r, c, C]."""
    tables_of = [storage.read_table(path) for path in _parts(folder) if _slide_of(path) == slide]
    grids = [tables.dense(table) for table in tables_of if len(table)]
    if not any(valid.any() for valid, _ in grids):
        raise UserError(f"slide {slide} in {folder} has no embedded tile; choose another slide.")
    valid, vectors = (np.concatenate(each) for each in zip(*grids, strict=True))
    return valid, vectors


def _cure(valid: Bool[np.ndarray, "rows columns"], order: Order, patch: Patch) -> str:
    """What to order in place of a canvas that no region covers."""
    tiles = _largest(valid)
    side_px = (tiles >> order.scale) * patch.side_px
    if not side_px:
        return "choose another slide or a lower order.scale"
    guided_px = patch.side_px << max(0, patch.scales - 1 - order.scale)
    if order.algorithm != "joint" or side_px <= guided_px:
        return f"the largest square gives order.size={side_px}; or choose another slide"
    return (
        f"the largest square gives order.size={side_px} with order.algorithm=strided, or "
        f"order.size={guided_px} without; or choose another slide"
    )


def _places(valid: Bool[np.ndarray, "rows columns"], shape: tuple[int, int]) -> np.ndarray:
    """Row and column of all places where a rectangle is wholly embedded: [n, 2]."""
    if any(side > whole for side, whole in zip(shape, valid.shape, strict=True)):
        return np.zeros((0, 2), int)
    return np.argwhere(sliding_window_view(valid, shape).all(axis=(2, 3)))


def _largest(valid: Bool[np.ndarray, "rows columns"]) -> int:
    """Return the side of the largest square that is wholly embedded."""
    sides = range(1, min(valid.shape) + 1)
    return bisect_left(sides, True, key=lambda side: not len(_places(valid, (side, side))))
