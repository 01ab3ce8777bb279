"""Real examples to compare generated images with: image, grid of embeddings, share of tissue."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc
from jaxtyping import Float16, UInt8

from raylarge import images, tables
from raylarge.errors import UserError


class ReferenceExample(NamedTuple):
    """One row of EXAMPLES."""

    image: UInt8[np.ndarray, "P P 3"]
    grid: Float16[np.ndarray, "rows columns C"]
    tissue: float


def references(
    data: str, scale: int, count: int | None, split: str = "val"
) -> list[ReferenceExample]:
    """Return examples of one scale, evenly spaced over the table; all of them if count is None.

    Rows of `split`, or training rows if there are none of the split.

    Raises:
        UserError: the data contain no example of the scale.
    """
    rows = tables.rows(data, "examples")
    rows = rows.filter(pc.equal(rows["scale"], scale))
    if not len(rows):
        raise UserError(f"{data} contains no example of scale {scale}; prepare it with that scale.")
    held_out = rows.filter(pc.equal(rows["split"], split))
    rows = held_out if len(held_out) else rows
    indices = range(len(rows)) if count is None else np.arange(count) * len(rows) // count
    return [_reference(rows.slice(int(i), 1).to_pylist()[0]) for i in indices]


def _reference(row: dict[str, object]) -> ReferenceExample:
    shape = (row["grid_rows"], row["grid_columns"], -1)
    grid = np.array(row["grid"], dtype=np.float16).reshape(shape)  # type: ignore[arg-type]
    return ReferenceExample(images.from_bytes(row["image"]), grid, float(row["tissue"]))  # type: ignore[arg-type]
