"""Real examples to set generated ones beside: image, grid of embeddings, amount of tissue."""

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
    """Held-out examples of one scale, spread evenly over the table; all of them if count is None.

    Without a row of the split the training rows stand in.

    Raises:
        UserError: the data hold no example of the scale.
    """
    rows = tables.rows(data, "examples")
    rows = rows.filter(pc.equal(rows["scale"], scale))
    if not len(rows):
        raise UserError(f"{data} holds no example of scale {scale}; prepare it with that scale.")
    held_out = rows.filter(pc.equal(rows["split"], split))
    rows = held_out if len(held_out) else rows
    picked = range(len(rows)) if count is None else np.arange(count) * len(rows) // count
    return [_reference(rows.slice(int(i), 1).to_pylist()[0]) for i in picked]


def _reference(row: dict[str, object]) -> ReferenceExample:
    shape = (row["grid_rows"], row["grid_columns"], -1)
    grid = np.array(row["grid"], dtype=np.float16).reshape(shape)  # type: ignore[arg-type]
    return ReferenceExample(images.from_bytes(row["image"]), grid, float(row["tissue"]))  # type: ignore[arg-type]
