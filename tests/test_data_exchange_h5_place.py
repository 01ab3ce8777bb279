"""Patches of other tools on our grid: where each lies, and every kind of wrong place refused."""

from types import SimpleNamespace

import numpy as np
import pytest

from raylarge.data.exchange import h5_place
from raylarge.data.exchange.h5_read import Patches
from raylarge.data.tile_candidates import TileConfig
from raylarge.errors import SlideError

TILE = TileConfig(patch_px=64)
UNIT = SimpleNamespace(zoom=1.0, size_l0=[700, 900], grid=[10, 14])  # rows, columns


def patches(xy, side=64.0, size=None):
    xy = np.array(xy, np.int64).reshape(-1, 2)
    return Patches(xy, side, (len(xy), 8), size)


def grid(rows=10, columns=14, step=64):
    return np.array([(c * step, r * step) for r in range(rows) for c in range(columns)])


def test_each_patch_has_its_row_and_column():
    index = h5_place.index_of(patches(grid()[::-1]), UNIT, TILE)
    assert len(index) == 140
    assert index[0, 0] == 139
    assert index[9, 13] == 0
    assert index[2, 1] == 139 - (2 * 14 + 1)


@pytest.mark.parametrize(
    ("layout", "why"),
    [
        (patches(grid()[:, ::-1]), r"^30 of its 140 .* at x=0, y=704; x and y look swapped"),
        (patches(grid() - 6400), r"^140 of its 140 patches begin outside .* at x=-6400, y=-6400"),
        (
            patches([*grid()[:139], (6400, 0)]),
            r"^1 of its 140 .* 900 x 700 .* at x=6400, y=0; check",
        ),
        (patches(grid(step=128), 128.0), r"128 level-0 pixels wide and our tiles 64; .*mpp=0.25 "),
        (patches(grid(5, 7, 32)), r"x=32, y=0 does not lie on the grid of 64 .* \(23 of 35 do not"),
        (patches(grid(9, 13) + 5), r"\(117 of 117 do not\)"),
        (
            patches([(0, 0), (64, 0), (65, 0), (64, 64)]),
            r"^its h5 has 1 of 4 .* twice at one place",
        ),
        (patches(grid(), size=(900, 700)), "of a slide of 700 x 900 level-0 pixels, and this one"),
        (patches(grid(), size=(1400, 1800)), r"1800 x 1400 .* has 900 x 700"),
    ],
)
def test_patches_at_a_wrong_place_are_refused(layout, why):
    with pytest.raises(SlideError, match=why):
        h5_place.index_of(layout, UNIT, TILE)


def test_patches_over_the_edge_and_of_a_padded_grid_are_none():
    assert (10, 0) in h5_place.index_of(patches([(0, 640)], size=(700, 900)), UNIT, TILE)
    padded = SimpleNamespace(**vars(UNIT) | {"grid": [16, 16]})
    assert (15, 15) in h5_place.index_of(patches([(960, 960)]), padded, TILE)


def test_a_slide_of_another_resolution_has_wider_tiles():
    unit = SimpleNamespace(**vars(UNIT) | {"zoom": 2.003})
    points = np.rint(grid(5, 6, 64 * 2.003)).astype(np.int64)
    assert (4, 5) in h5_place.index_of(patches(points, 128.0), unit, TILE)


def test_swapped_axes_on_a_square_slide_show_in_the_tissue():
    tissue = [(r, c) for r in range(3, 12) for c in range(1, 5)]
    right = {cell: i for i, cell in enumerate(tissue)}
    swapped = {(c, r): i for (r, c), i in right.items()}
    h5_place.check_index(right, tissue)
    h5_place.check_index(dict(list(right.items())[:3]), tissue)  # few patches are no fault
    h5_place.check_index({**right, **swapped}, tissue)
    with pytest.raises(SlideError, match=r"look swapped: 4 of the 36 tiles .* 36 with x and y"):
        h5_place.check_index(swapped, tissue)
    with pytest.raises(SlideError, match=r"^none of its 1 patches is one of the 36 tiles"):
        h5_place.check_index({(30, 30): 0}, tissue)
    with pytest.raises(SlideError, match=r"^none of its 0 patches"):
        h5_place.check_index({}, tissue)
    h5_place.check_index({}, [])  # no tissue, no patches
