"""Which rows of a part a derived verb reads, and the row groups of what it writes.

A row group of EXAMPLES, LATENTS and CAPTIONS never mixes scales, so scales that are not wanted
are not even fetched. Groups are [scale, split, rows], in the order of the file (`Stage.make`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool

from raylarge import storage
from raylarge.data.units import DerivedUnit
from raylarge.errors import UserError

Groups = list[list[Any]]


def read(
    root: str, unit: DerivedUnit, columns: Sequence[str], scales: Sequence[int] | None = None
) -> tuple[pa.Table, Groups]:
    """The rows of a unit's source at some scales (None: at all), and their groups.

    Args:
        root: the data folder.
        unit: with `source` (a part's path below the folder) and its `groups`.
        columns: what is read of a row.
        scales: which scales.
    """
    selected = [i for i, (k, _, _) in enumerate(unit.groups) if scales is None or k in scales]
    table = storage.read_rows(storage.join(root, unit.source), selected, columns)
    return table, [list(unit.groups[i]) for i in selected]


def kept(groups: Groups, keep: Bool[np.ndarray, " n"]) -> Groups:
    """The groups of the rows that stay; a group that loses all of them goes."""
    stops = list(accumulate((rows for _, _, rows in groups), initial=0))
    counts = [int(keep[a:b].sum()) for a, b in pairwise(stops)]
    pairs = zip(groups, counts, strict=True)
    return [[scale, split, count] for (scale, split, _), count in pairs if count]


def require(manifest: Mapping[str, Any], scales: Sequence[int] | None, key: str) -> None:
    """Refuse scales of which a table has no row.

    Args:
        manifest: the table's manifest.
        scales: what the user wants; None: whatever there is.
        key: what the configuration calls it, such as `caption.scales`.

    Raises:
        UserError: none are wanted, or one that the table lacks.
    """
    there = sorted(map(int, manifest["counts"]))
    if scales is not None and (not scales or not set(scales) <= set(there)):
        raise UserError(
            f"{key}={list(scales)}: choose among the scales that have rows, {there}, or leave it "
            "out for all of them."
        )
