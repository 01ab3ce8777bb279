"""Views of slides in the tables: their entries, their place in the slide, their splits.

A view (`slides/view.py`) is a slide of its own in every table, under a pseudonym of its own and
with the patient and split of its slide. Held-out rows stay those of the slide as it is.

Random crops of the base scale (`tile.base_crops`) are views, too: each further view contributes a
few random tiles of scale 0, so that a crop may begin at any pixel and is embedded by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from raylarge.data import slide_index
from raylarge.data.name_table import stems
from raylarge.data.tile_candidates import Cells, TileConfig, band_edge, band_rows
from raylarge.data.units import TileUnit
from raylarge.diffusion.noise import generator
from raylarge.slides.reader import Slide
from raylarge.slides.view import View

CROPS_PER_VIEW = 16
"""Most crops of one view: more share an origin and cost less time, fewer vary more."""
_MASK_CELLS = 8
"""Cells of a tissue mask along the side of a base tile."""


def with_views(entries: Sequence[slide_index.Entry], config: TileConfig) -> list[slide_index.Entry]:
    """Return slides and the further views of those that train, sorted by pseudonym."""
    views = [view for entry in entries for view in _views(entry, config)]
    return sorted([*entries, *views], key=lambda entry: entry.slide_id)


def _views(entry: slide_index.Entry, config: TileConfig) -> list[slide_index.Entry]:
    count = config.views + -(-config.base_crops // CROPS_PER_VIEW)
    numbers = range(1, count if entry.split in ("train", "band") else 1)
    name = stems(entry.path)[0]
    names = {
        number: slide_index.pseudonym(config.salt, f"{name} view {number}") for number in numbers
    }
    return [replace(entry, slide_id=slide_id, view=number) for number, slide_id in names.items()]


def drop_unused_crops(table: pa.Table, unit: TileUnit, config: TileConfig) -> pa.Table:
    """Return the candidates of a slide, in a view of crops no more kept ones than it contributes.

    Args:
        table: TILES of all scales.
        unit: its slide; views below `tile.views` are returned as they are.
        config: how many crops a slide has.
    """
    number = unit.view - config.views
    if number < 0:
        return table
    count = min(CROPS_PER_VIEW, config.base_crops - number * CROPS_PER_VIEW)
    eligible = np.flatnonzero(table["kept"].to_numpy() & (table["scale"].to_numpy() == 0))
    address = (int(unit.slide_id[:8], 16), int(unit.slide_id[8:], 16), unit.view)
    order = generator(config.seed, "tile base crops", *address).permutation(len(eligible))
    return table.take(pa.array(np.sort(eligible[order[:count]])))


def mask_cell_px(config: TileConfig) -> int:
    """Return the side of a cell of tissue masks in base pixels."""
    return max(1, config.patch_px // _MASK_CELLS)


def view_of(unit: Any, config: TileConfig) -> View:
    """Return how a unit's slide is shifted, turned and mirrored."""
    number = unit.view
    return (
        View.of(number, unit.slide_id, config.patch_px, mask_cell_px(config), config.seed)
        if number
        else View()
    )


def view_splits(cells: Cells, k: int, slide: Slide, split: str, config: TileConfig) -> list[str]:
    """Return each candidate's split in a view: train, or empty where it shows held-out rows."""
    if split != "band":
        return [split] * len(cells)
    side = config.patch_px
    edge_px = side * band_edge(band_rows(slide.whole_px[0], config), config.val_fraction)
    boxes = [(int(r) * side, int(c) * side, side << k, side << k) for r, c in cells]
    sources = [slide.view.source(box, slide.whole_px) for box in boxes]
    return ["train" if top + height <= edge_px else "" for top, _, height, _ in sources]
