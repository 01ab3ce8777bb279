import numpy as np
import pyarrow as pa
import pytest
import torch

from raylarge import images, pyramid, resample, schema, storage
from raylarge.data.grid import TileGrid
from raylarge.data.prepare import prepare
from raylarge.data.shard import example_image, pooled
from raylarge.errors import UserError
from raylarge.report import Report
from raylarge.slides.reader import open_slide


@pytest.fixture(scope="module")
def data(tiny_slide, tmp_path_factory):
    """A folder with the examples of the tiny slide, every tile of it kept."""
    from raylarge import config
    from raylarge.data.prepare import Prepare

    root = str(tmp_path_factory.mktemp("shard") / "data")
    tile = {"patch_px": 64, "scales": [0, 1, 2, 3], "tissue": [0.0], "crops": 5, "block_tiles": 30}
    values = {"slides": tiny_slide, "out": root, "tile": tile, "embed": {"encoder": "toy"}}
    prepare(config.build(Prepare, values), Report(root + "/report.json"))
    return root


@pytest.fixture(scope="module")
def examples(data):
    parts = [storage.read_table(path) for path in storage.listing(f"{data}/examples/*.parquet")]
    return [row for part in parts for row in part.to_pylist()]


@pytest.fixture(scope="module")
def base(examples):
    """The base examples by their cell."""
    return {
        (row["row"], row["column"]): images.from_bytes(row["image"])
        for row in examples
        if row["scale"] == 0
    }


def mosaic(base, row, column, factor):
    rows = [
        np.concatenate([base[row + r, column + c] for c in range(factor)], axis=1)
        for r in range(factor)
    ]
    return np.concatenate(rows)


def test_law_2_tiles_put_together_are_the_slide(base, tiny_slide):
    assert len(base) == 12 * 10
    with open_slide(tiny_slide) as slide:
        whole = slide.read(0, 0, 768, 640)
    together = np.concatenate(
        [np.concatenate([base[r, c] for c in range(10)], axis=1) for r in range(12)]
    )
    assert (together == whole).all()
    assert whole.std() > 20


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_law_2_fine_examples_under_a_are_the_coarse_one(base, examples, scale):
    factor, exact = 1 << scale, []
    coarse = [row for row in examples if row["scale"] == scale]
    assert len(coarse) >= 6
    for row in coarse:
        fine = images.to_float(mosaic(base, row["row"], row["column"], factor))
        expected = images.to_uint8(resample.downsample(fine.double(), factor)).astype(int)
        found = images.from_bytes(row["image"])
        assert np.abs(found - expected).max() <= 1  # float32 against float64, at ties
        exact.append((found == expected).mean())
    assert np.mean(exact) > 0.999


def test_grids_hold_the_embeddings_they_cover(data, examples):
    parts = [storage.read_table(path) for path in storage.listing(f"{data}/embeddings/*.parquet")]
    vectors = {
        (row["row"], row["column"]): np.array(row["embedding"], np.float16)
        for part in parts
        for row in part.to_pylist()
    }
    for row in examples:
        factor = 1 << row["scale"]
        assert (row["grid_rows"], row["grid_columns"]) == (factor, factor)
        grid = np.array(row["grid"], np.float16).reshape(factor, factor, 32)
        for r, c in {(0, 0), (0, factor - 1), (factor - 1, 0), (factor // 2, factor - 1)}:
            assert (grid[r, c] == vectors[row["row"] + r, row["column"] + c]).all()


def test_larger_grids_are_pooled_to_8_by_8():
    raw = np.random.default_rng(0).normal(size=(16, 16, 5)).astype(np.float16)
    expected = raw.astype(np.float64).reshape(8, 2, 8, 2, 5).mean(axis=(1, 3))
    found = pooled(raw)
    assert found.shape == (8, 8, 5)
    assert np.abs(found - expected).max() < 2e-3
    assert (pooled(raw[:8, :8]) == raw[:8, :8]).all()


def test_examples_lie_in_the_block_of_their_upper_edge(data, examples):
    for number, path in enumerate(storage.listing(f"{data}/examples/*.parquet")):
        table = storage.read_table(path)
        assert table.schema.names == schema.EXAMPLES.names
        keys = [(row["scale"], row["row"], row["column"]) for row in table.to_pylist()]
        assert keys == sorted(keys)
        assert {row // 3 for _, row, _ in keys} <= {number}
    tiles = storage.read_table(storage.listing(f"{data}/tiles/*.parquet")[0])
    kept = tiles.filter(tiles["kept"]).to_pylist()
    where = ("slide_id", "patient_id", "split", "scale", "row", "column", "tissue")
    assert sorted(str([row[k] for k in where]) for row in kept) == sorted(
        str([row[k] for k in where]) for row in examples
    )


def test_a_small_cache_changes_nothing(tiny_slide, monkeypatch):
    whole = TileGrid(64, None, 0.5)
    whole.open(tiny_slide)
    monkeypatch.setattr("raylarge.data.grid._CACHE_BYTES", 3 * 64 * 64 * 3)
    small = TileGrid(64, None, 0.5)
    small.open(tiny_slide)
    assert (example_image(small, 2, 1, 4) == example_image(whole, 2, 1, 4)).all()


def test_a_40x_slide_gives_the_examples_of_the_20x_one(tmp_path):
    """Tolerance: two drawings of one procedural slide, see test_slides_procedural."""
    from raylarge.slides import procedural

    procedural.write(str(tmp_path / "20x.tif"), (320, 320), 3, mpp=0.5)
    procedural.write(str(tmp_path / "40x.tif"), (640, 640), 3, mpp=0.25)
    found = []
    for name in ("20x.tif", "40x.tif"):
        grid = TileGrid(64, None, 0.5)
        assert grid.open(str(tmp_path / name)).size_px == (320, 320)
        found.append([example_image(grid, 1, 1, f).astype(int) for f in (1, 2)])
    for low, high in zip(*found, strict=True):
        assert low.std() > 10
        assert np.abs(low - high).mean() < 3


def test_shard_wants_embed_first(tiny_prepare, tmp_path):
    log = Report(str(tmp_path / "report.json"))
    prepare(tiny_prepare(verbs="tile"), log)
    with pytest.raises(UserError, match=r"shard needs .*embed\.json; run verbs=embed"):
        prepare(tiny_prepare(verbs="shard"), log)


def test_a_slide_that_joins_later_is_added(tiny_prepare, tmp_path, tiny_slide):
    from raylarge.slides import procedural

    log = Report(str(tmp_path / "report.json"))
    first = prepare(tiny_prepare(), log)["shard"]
    procedural.write(str(tmp_path / "second.tif"), (400, 400), 1)
    both = f"{tiny_slide},{tmp_path}/second.tif"
    prepare(tiny_prepare(slides=both, verbs="tile"), log)
    with pytest.raises(UserError, match=r"tiled anew since embed ran; run verbs=embed,shard"):
        prepare(tiny_prepare(slides=both, verbs="shard"), log)
    done = prepare(tiny_prepare(slides=both), log)
    assert done["tile"]["made"] == 0
    assert done["shard"]["rows"] > first["rows"]
    assert done["shard"]["parts"] - done["shard"]["made"] == first["parts"]


def test_a_changed_slide_is_done_anew(tiny_prepare, tmp_path, tiny_slide):
    log = Report(str(tmp_path / "report.json"))
    mine = tmp_path / "slides" / "mine.tif"
    mine.parent.mkdir()
    mine.write_bytes(storage.read_bytes(tiny_slide))
    prepare(tiny_prepare(slides=str(mine)), log)
    pyramid.write_image(str(mine), np.full((800, 660, 3), (225, 150, 190), np.uint8), 0.5)
    done = prepare(tiny_prepare(slides=str(mine)), log)
    assert all(facts["made"] == facts["parts"] for facts in done.values())
    tables = [storage.read_table(p) for p in storage.listing(f"{tmp_path}/data/examples/*.parquet")]
    picture = images.from_bytes(pa.concat_tables(tables)["image"][0].as_py())
    assert (picture == (225, 150, 190)).all()
    assert torch.is_tensor(images.to_float(picture))
