import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from raylarge import images, pyramid, resample, schema, storage, tables
from raylarge.data.grid import TileGrid
from raylarge.data.prepare import prepare
from raylarge.data.shard import example_image, key, pooled
from raylarge.data.tile_candidates import TileConfig
from raylarge.errors import UserError
from raylarge.models import ssl
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
    parts = [storage.read_table(path) for path in storage.glob(f"{data}/examples/*.parquet")]
    return [row for part in parts for row in part.to_pylist()]


@pytest.fixture(scope="module")
def base(examples):
    """The base examples by their cell."""
    return {
        (row["row"], row["column"]): images.from_bytes(row["image"])
        for row in examples
        if row["scale"] == 0
    }


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


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
    parts = [storage.read_table(path) for path in storage.glob(f"{data}/embeddings/*.parquet")]
    vectors = {
        (row["row"], column): vector
        for part in parts
        for row in part.to_pylist()
        for column, vector in enumerate(np.array(row["embedding"], np.float16).reshape(-1, 32))
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


def test_examples_lie_in_buckets_by_scale_split_and_key(data, examples):
    blocks, made = {}, storage.read_json(f"{data}/shard.json")
    assert [f"{data}/{part['part']}" for part in made["parts"]] == storage.glob(
        f"{data}/examples/*.parquet"
    )
    for part in made["parts"]:
        table = storage.read_table(f"{data}/{part['part']}")
        assert table.schema.names == schema.EXAMPLES.names
        rows = table.to_pylist()
        order = [(row["scale"], row["split"], row["key"]) for row in rows]
        assert order == sorted(order)
        for row in rows:
            assert row["key"] == key(row["slide_id"], row["scale"], row["row"], row["column"])
            blocks.setdefault(row["row"] // 3, set()).add(part["part"])
        counted = [[row["scale"], row["split"]] for row in rows]
        groups = [[scale, split] for scale, split, n in part["groups"] for _ in range(n)]
        assert counted == groups
        assert max(n for _, _, n in part["groups"]) <= 64
        file = pq.ParquetFile(f"{data}/{part['part']}")
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        assert sizes == [n for _, _, n in part["groups"]]
    assert all(len(found) == 1 for found in blocks.values())  # a block stays together
    assert len(set.union(*blocks.values())) > 1
    assert not storage.exists(f"{data}/blocks") or not os.listdir(f"{data}/blocks")
    tiles = storage.read_table(storage.glob(f"{data}/tiles/*.parquet")[0])
    kept = tiles.filter(tiles["kept"]).to_pylist()
    where = ("slide_id", "patient_id", "split", "scale", "row", "column", "tissue")
    assert sorted(str([row[k] for k in where]) for row in kept) == sorted(
        str([row[k] for k in where]) for row in examples
    )


def test_a_small_cache_changes_nothing(tiny_slide, monkeypatch):
    unit = SimpleNamespace(path=tiny_slide, mpp_override=None, view=0)
    whole = TileGrid(TileConfig(64))
    whole.open(unit)
    monkeypatch.setattr("raylarge.data.grid._CACHE_BYTES", 3 * 64 * 64 * 3)
    small = TileGrid(TileConfig(64))
    small.open(unit)
    assert (example_image(small, 2, 1, 4) == example_image(whole, 2, 1, 4)).all()


def test_a_40x_slide_gives_the_examples_of_the_20x_one(tmp_path):
    """Tolerance: two drawings of one procedural slide, see test_slides_procedural."""
    from raylarge.slides import procedural

    procedural.write(str(tmp_path / "20x.tif"), (320, 320), 3, mpp=0.5)
    procedural.write(str(tmp_path / "40x.tif"), (640, 640), 3, mpp=0.25)
    found = []
    for name in ("20x.tif", "40x.tif"):
        grid = TileGrid(TileConfig(64))
        assert grid.open(
            SimpleNamespace(path=str(tmp_path / name), mpp_override=None, view=0)
        ).size_px == (320, 320)
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
    assert done["shard"]["blocks_made"] == 2  # those of the new slide alone
    again = tiny_prepare(slides=both, out=f"{tmp_path}/again")
    prepare(again, log)
    assert contents(f"{tmp_path}/data/examples") == contents(f"{again.out}/examples")


def test_a_changed_slide_is_done_anew(tiny_prepare, tmp_path, tiny_slide):
    log = Report(str(tmp_path / "report.json"))
    mine = tmp_path / "slides" / "mine.tif"
    mine.parent.mkdir()
    mine.write_bytes(storage.read_bytes(tiny_slide))
    prepare(tiny_prepare(slides=str(mine)), log)
    pyramid.write_image(str(mine), np.full((800, 660, 3), (225, 150, 190), np.uint8), 0.5)
    done = prepare(tiny_prepare(slides=str(mine)), log)
    assert all(facts["made"] == facts["parts"] for facts in done.values())
    tables = [storage.read_table(p) for p in storage.glob(f"{tmp_path}/data/examples/*.parquet")]
    picture = images.from_bytes(pa.concat_tables(tables)["image"][0].as_py())
    assert (picture == (225, 150, 190)).all()
    assert torch.is_tensor(images.to_float(picture))


class Where:
    """An encoder whose embedding is where its tile lies, painted into the tile's colours."""

    card = replace(ssl.card("toy"), width=2)

    def __call__(self, tiles):
        return tiles[:, 0, 0, :2].astype(np.float16)


@pytest.mark.parametrize("border", ["drop", "pad"])
def test_every_grid_holds_exactly_the_tiles_under_its_example(
    tmp_path, tiny_prepare, monkeypatch, border
):
    """Scales 0 to 4 of a slide of 18 x 19 tiles (and a bit), painted (row + 1, column + 1)."""
    side, rows, columns = 16, 18, 19
    page = np.full((rows * side + 5, columns * side + 9, 3), 255, np.uint8)
    for r, c in np.ndindex(rows + 1, columns + 1):
        page[r * side : (r + 1) * side, c * side : (c + 1) * side] = (r + 1, c + 1, 7)
    pyramid.write_image(str(tmp_path / "painted.tif"), page, 0.5)
    monkeypatch.setattr(ssl, "load", lambda *_: Where())
    tile = {"patch_px": side, "scales": [0, 1, 2, 3, 4], "mask": "all", "tissue": [0.0]}
    tile |= {"crops": 6, "split": "patient", "val_fraction": 0.0, "border": border}
    config = tiny_prepare(slides=str(tmp_path / "painted.tif"), tile=tile)
    prepare(config, Report(str(tmp_path / "report.json")))
    found = tables.rows(config.out, "examples").to_pylist()
    assert {row["scale"] for row in found} == {0, 1, 2, 3, 4}
    for row in found:
        factor = 1 << row["scale"]
        r, c = (np.arange(row[name], row[name] + factor) for name in ("row", "column"))
        expected = np.stack(np.meshgrid(r + 1.0, c + 1.0, indexing="ij"), axis=-1)
        expected[(r > rows)[:, None] | (c > columns)] = 255  # beyond the slide it is white
        inside = (r[:, None] < rows) & (c < columns)
        if border == "drop":
            assert inside.all()
        if factor > 8:
            expected = expected.reshape(8, factor // 8, 8, factor // 8, 2).mean(axis=(1, 3))
        grid = np.array(row["grid"]).reshape(row["grid_rows"], row["grid_columns"], 2)
        assert np.abs(grid - expected).max() <= 0.25 * (factor > 8), (row["scale"], row["row"])
    regular = sum(-(-rows // f) * -(-columns // f) for f in (1, 2, 4, 8, 16))
    if border == "pad":
        assert len(found) >= regular
