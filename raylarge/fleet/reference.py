"""A region of a prepared slide as the condition of an order: its base tiles' embeddings."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float16

from raylarge import storage, tables
from raylarge.errors import UserError


def region(
    reference: str, at: tuple[int, int] | None, shape: tuple[int, int]
) -> Float16[np.ndarray, "rows columns C"]:
    """The raw embeddings of a rectangle of base tiles.

    Args:
        reference: a data folder with EMBEDDINGS, `DATA` or `DATA:slide_id`; without an id its
            first slide.
        at: row and column of the rectangle's first base tile; None takes the first place,
            row by row, where every tile was embedded.
        shape: rows and columns.

    Raises:
        UserError: no such data or slide, or a tile that was not embedded.
    """
    folder, slide = _parse(reference)
    valid, vectors = _read(folder, slide)
    row, column = _first(valid, shape, slide) if at is None else at
    cut = slice(row, row + shape[0]), slice(column, column + shape[1])
    if min(row, column) < 0 or valid[cut].shape != shape or not valid[cut].all():
        raise UserError(
            f"slide {slide} has no embeddings for all of the {shape[0]} x {shape[1]} base tiles "
            f"from at={row},{column}; leave out at= for the first place that has them."
        )
    return vectors[cut]


def _parse(reference: str) -> tuple[str, str]:
    """Folder and slide id of a reference."""
    folder, _, slide = reference.rpartition(":")
    if not folder or "/" in slide:  # no id; a colon may be part of a URL
        folder, slide = reference, ""
    slides = sorted({_slide_of(path) for path in _parts(folder)})
    if slide and slide not in slides:
        raise UserError(f"{folder} has no slide '{slide}'; it has: {', '.join(slides)}.")
    return folder, slide or slides[0]


def _parts(folder: str) -> list[str]:
    """Paths of the parts of EMBEDDINGS, one or more per slide."""
    made = tables.manifest(folder, "embeddings")
    return [storage.join(folder, part["part"]) for part in made["parts"]]


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


def _first(
    held: Bool[np.ndarray, "rows columns"], shape: tuple[int, int], slide: str
) -> tuple[int, int]:
    """The first place, row by row, where a rectangle is held whole."""
    fits = all(side <= whole for side, whole in zip(shape, held.shape, strict=True))
    held = held if fits else np.zeros(shape, bool)
    places = np.lib.stride_tricks.sliding_window_view(held, shape).all(axis=(2, 3))
    if not places.any():
        raise UserError(
            f"slide {slide} nowhere has {shape[0]} x {shape[1]} embedded base tiles together; "
            f"lower order.size or choose another slide."
        )
    row, column = np.argwhere(places)[0].tolist()
    return row, column
