"""Place the patches of CLAM's and TRIDENT's files on our grid of base tiles, or refuse them.

    Patches (x, y in level-0 pixels) -> {(row, column) of a base tile: row of the file}

A vector at a wrong place conditions generation on tissue that is elsewhere, and nothing later can
notice: so every patch must begin inside the slide and on the grid, and no two at one place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from raylarge.data.exchange.h5_read import Cells, Patches
from raylarge.data.tile_candidates import TileConfig
from raylarge.errors import SlideError

Index = dict[tuple[int, int], int]
_OFF_PX = 1.0  # level-0 pixels by which both sides may have rounded differently
_COVERED = 0.75
"""Share of the tiles needed, or of the file's patches, below which tissue and patches disagree."""
_SWAPPED = 1.25
"""Times as many tiles met with x and y swapped that tell that they are."""


def index_of(layout: Patches, unit: Any, tile: TileConfig) -> Index:
    """Return which row of a file belongs to which base tile.

    Args:
        layout: what the file says.
        unit: the slide's `zoom` (level-0 per base pixel), `size_l0` and `grid`, (rows, columns).
        tile: the configuration of the base tiles.

    Raises:
        SlideError: patches of another size, of another slide, beyond it, off the grid, or two at
            one place; says how many, and the first.
    """
    side_l0 = tile.patch_px * unit.zoom
    _check_side(layout, side_l0, tile)
    _check_extent(layout, unit.size_l0, side_l0)
    _check_inside(layout, unit, side_l0)
    cells = _cells(layout, side_l0)
    distinct, first, counts = np.unique(cells, axis=0, return_index=True, return_counts=True)
    if len(distinct) < len(cells):
        x, y = layout.xy[first[counts > 1][0]].tolist()
        raise SlideError(
            f"its h5 has {len(cells) - len(distinct)} of {len(cells)} patches twice at one place, "
            f"the first at x={x}, y={y}; which vector counts cannot be known: cut the slide anew"
        )
    return {(row, column): i for i, (row, column) in enumerate(cells.tolist())}


def check_index(index: Index, needed: Sequence[tuple[int, int]]) -> None:
    """Refuse patches that lie elsewhere than the tissue, as swapped axes put them.

    Args:
        index: of `index_of`.
        needed: (row, column) of the base tiles that kept examples cover.

    Raises:
        SlideError: no patch meets a needed tile, or many more do with x and y swapped.
    """
    if not needed:
        return
    met = sum(cell in index for cell in needed)
    swapped = sum((column, row) in index for row, column in needed)
    if not met and not swapped:
        raise SlideError(
            f"none of its {len(index)} patches is one of the {len(needed)} tiles that kept "
            "examples cover; check that the file is of this slide"
        )
    if met < _COVERED * min(len(needed), len(index)) and swapped > _SWAPPED * met:
        raise SlideError(
            f"its patches look swapped: {met} of the {len(needed)} tiles that kept examples cover "
            f"are in its h5, and {swapped} with x and y exchanged; coords must be (x, y)"
        )


def _check_side(layout: Patches, side_l0: float, tile: TileConfig) -> None:
    if abs(layout.side_l0 - side_l0) > _OFF_PX:
        mpp = tile.base_mpp * tile.patch_px / layout.side_l0
        raise SlideError(
            f"its patches are {layout.side_l0:g} level-0 pixels wide and our tiles {side_l0:g}; "
            f"cut it anew, or tile with tile.mpp={mpp:.6g} if that is its resolution"
        )


def _check_extent(layout: Patches, size_l0: Sequence[int], side_l0: float) -> None:
    """Refuse a file that names the slide's size, and not this one's."""
    stated = layout.size_l0
    if stated is None or np.abs(np.subtract(stated, size_l0)).max() <= side_l0:
        return
    raise SlideError(
        f"its h5 was made of a slide of {stated[1]:g} x {stated[0]:g} level-0 pixels, and this one "
        f"has {size_l0[1]} x {size_l0[0]} (width x height); give the file of this slide"
    )


def _check_inside(layout: Patches, unit: Any, side_l0: float) -> None:
    """Refuse patches that begin beyond the slide and its padded grid."""
    rows, columns = (
        max(length, cells * side_l0) for length, cells in zip(unit.size_l0, unit.grid, strict=True)
    )

    def beyond(xy: Cells) -> np.ndarray:
        outside = (xy < -_OFF_PX) | (xy >= np.array([columns, rows]))
        return np.asarray(outside.any(axis=1))

    outside = beyond(layout.xy)
    if outside.any():
        x, y = layout.xy[outside][0].tolist()
        height, width = unit.size_l0
        if beyond(layout.xy[:, ::-1]).any():
            cure = "check that the file is of this slide, and its coords in level-0 pixels"
        else:
            cure = "x and y look swapped: coords must be (x, y)"
        raise SlideError(
            f"{int(outside.sum())} of its {len(outside)} patches begin outside the slide of "
            f"{width} x {height} level-0 pixels (width x height), the first at x={x}, y={y}; {cure}"
        )


def _cells(layout: Patches, side_l0: float) -> Cells:
    """Return (row, column) of each patch on the grid of base tiles, `side_l0` pixels wide each."""
    cells = np.rint(layout.xy / side_l0)
    off = np.abs(layout.xy - cells * side_l0).max(axis=1, initial=0) > _OFF_PX
    if off.any():
        x, y = layout.xy[off][0].tolist()
        raise SlideError(
            f"its patch at x={x}, y={y} does not lie on the grid of {side_l0:g} level-0 pixels "
            f"({int(off.sum())} of {len(off)} do not); cut the slide from its corner, without "
            "overlap (CLAM begins at each contour's own corner, TRIDENT at the slide's)"
        )
    return cells[:, ::-1].astype(np.int64)
