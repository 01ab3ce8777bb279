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
    cells, vectors = _read(folder, slide)
    held = np.zeros(np.maximum(cells.max(axis=0) + 1, shape), bool)
    held[tuple(cells.T)] = True
    row, column = _first(held, shape, slide) if at is None else at
    index = np.full(held.shape, -1)
    index[tuple(cells.T)] = np.arange(len(cells))
    cut = index[row : row + shape[0], column : column + shape[1]]
    if min(row, column) < 0 or cut.shape != shape or (cut < 0).any():
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
    """All (row, column) of a slide [n, 2] and their embeddings [n, C]."""
    paths = [path for path in _parts(folder) if _slide_of(path) == slide]
    cells, vectors = [], []
    for path in paths:
        table = storage.read_table(path, ("row", "column", "embedding"))
        if len(table):
            cells.append(np.stack([table["row"].to_numpy(), table["column"].to_numpy()], axis=1))
            flat = table["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            vectors.append(flat.reshape(len(table), -1))
    if not cells:
        raise UserError(f"slide {slide} in {folder} has no embedded tile; choose another slide.")
    return np.concatenate(cells), np.concatenate(vectors)


def _first(
    held: Bool[np.ndarray, "rows columns"], shape: tuple[int, int], slide: str
) -> tuple[int, int]:
    """The first place, row by row, where a rectangle is held whole."""
    places = np.lib.stride_tricks.sliding_window_view(held, shape).all(axis=(2, 3))
    if not places.any():
        raise UserError(
            f"slide {slide} nowhere has {shape[0]} x {shape[1]} embedded base tiles together; "
            f"lower order.size or choose another slide."
        )
    row, column = np.argwhere(places)[0].tolist()
    return row, column
