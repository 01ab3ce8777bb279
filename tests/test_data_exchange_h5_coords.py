"""Coordinates in h5 files are pixels of the slide itself."""

import numpy as np
import pytest
from test_data_exchange_h5 import SIDE, exported, name_of, prepared, write

from raylarge import tables
from raylarge.data.exchange import h5
from raylarge.slides import masks

h5py = pytest.importorskip("h5py")


def test_coords_of_a_40x_slide_are_in_its_own_pixels(tmp_path):
    from raylarge.slides import procedural

    procedural.write(str(tmp_path / "40x.tif"), (1024, 768), 3, mpp=0.25)
    prepared(tmp_path / "data", str(tmp_path / "40x.tif"), mask="all")
    exported(str(tmp_path / "data"), tmp_path)
    name = name_of(tmp_path / "data")
    path = tmp_path / "20x_64px_0px_overlap" / "patches" / f"{name}_patches.h5"
    with h5py.File(path) as file:
        told = dict(file["coords"].attrs)
        assert sorted(map(tuple, file["coords"][:].tolist())) == [
            (x, y) for x in range(0, 768, 128) for y in range(0, 1024, 128)
        ]
    assert (told["patch_size"], told["patch_size_level0"]) == (SIDE, 128)
    assert (told["level0_magnification"], told["target_magnification"]) == (40, 20)
    assert (told["level0_width"], told["level0_height"]) == (768, 1024)


def test_patches_become_a_mask_of_exactly_their_tiles(tmp_path, tiny_slide):
    chosen = [(3, 1), (3, 2), (3, 4), (7, 8)]
    write(tmp_path / "p" / "tiny_patches.h5", [(c * SIDE, r * SIDE) for r, c in chosen], None)
    done = h5.outlines(h5.Outlines(source=str(tmp_path / "p"), out=str(tmp_path / "masks")))
    assert (done["slides"], done["patches"]) == (1, 4)
    mask = masks.read(str(tmp_path / "masks" / "tiny.geojson"), (768, 640), (96, 80))
    expected = np.zeros((12, 10), bool)
    expected[tuple(zip(*chosen, strict=True))] = True
    assert (mask == expected.repeat(8, axis=0).repeat(8, axis=1)).all()
    more = {"mask": f"{tmp_path}/masks/{{name}}.geojson", "scales": [0], "tissue": [0.5]}
    prepared(tmp_path / "data", tiny_slide, "tile", **more)
    tiles = tables.rows(str(tmp_path / "data"), "tiles").to_pylist()
    assert [(t["row"], t["column"]) for t in tiles if t["kept"]] == chosen
