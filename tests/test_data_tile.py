import json
import re
import shutil

import numpy as np
import pytest

from raylarge import images, pyramid, schema, storage, tables
from raylarge.data import slide_index, tile, tile_table
from raylarge.data.pipeline import ExecutorConfig
from raylarge.data.prepare import find_slides, prepare
from raylarge.data.tile_candidates import TileConfig, candidates
from raylarge.data.tile_table import slides_of
from raylarge.data.views import view_of, with_views
from raylarge.errors import UserError
from raylarge.models import ssl
from raylarge.report import Report
from raylarge.slides.reader import open_slide
from raylarge.slides.tissue import tissue_fraction, tissue_mask


@pytest.fixture
def run(tmp_path):
    return lambda config: prepare(config, Report(str(tmp_path / "report.json")))


@pytest.fixture(scope="module")
def tiles(tiny_slide, tmp_path_factory):
    """The TILES of the tiny slide (12 x 10 tiles), split by a band of four rows."""
    root = str(tmp_path_factory.mktemp("tiles"))
    config = TileConfig(64, [0, 1, 2], [0.3, 0.2], crops=8, split="band", val_fraction=0.35)
    tile.run(root, [tiny_slide], config, ExecutorConfig())
    return storage.read_table(storage.glob(f"{root}/tiles/*.parquet")[0])


def test_every_candidate_is_a_row_with_its_reason(tiles):
    assert tiles.schema.metadata[b"version"] == schema.VERSION.encode()
    assert tiles.schema.names == schema.TILES.names
    rows = tiles.to_pylist()
    assert all(row["kept"] == (row["reason"] == "") for row in rows)
    reasons = {row["reason"].split(" ")[0] for row in rows}
    assert reasons == {"", "outside", "crosses", "tissue"}
    keys = [(row["scale"], row["row"], row["column"]) for row in rows]
    assert len(set(keys)) == len(keys)
    assert keys == sorted(keys)
    base = [row for row in rows if row["scale"] == 0]
    assert len(base) == 13 * 11  # 800 x 660 px: the last row and column hang over
    outside = {(row["row"], row["column"]) for row in base if row["reason"] == "outside"}
    assert outside == {(r, c) for r in range(13) for c in range(11) if r == 12 or c == 10}


def test_the_rule_holds_on_every_row(tiles, tiny_slide):
    with open_slide(tiny_slide) as slide:
        mask = tissue_mask(slide.thumbnail(8))
    share = tissue_fraction(mask, 8.0, (12, 10))
    seen = set()
    for row in tiles.to_pylist():
        f, r, c = 1 << row["scale"], row["row"], row["column"]
        if r + f > 12 or c + f > 10:
            expected = "outside"
        elif r < 8 < r + f:
            expected = "crosses the split"
        else:
            tissue = share[r : r + f, c : c + f].mean()
            least = 0.2 if row["scale"] else 0.3
            assert row["tissue"] == pytest.approx(tissue, abs=1e-5)
            expected = "" if tissue >= least else f"tissue {row['tissue']:.3g} < {least:g}"
            assert row["split"] == ("train" if r + f <= 8 else "val")
        assert row["reason"] == expected
        seen.add((row["scale"], row["kept"], row["split"]))
    assert {(k, True, split) for k in (0, 1, 2) for split in ("train", "val")} <= seen


def test_crops_are_random_aligned_and_repeatable():
    grid_only = candidates((800, 660), 1, TileConfig(64), "0" * 16)
    config = TileConfig(64, crops=9)
    cells = candidates((800, 660), 1, config, "0" * 16)
    even = {(r, c) for r in range(0, 14, 2) for c in range(0, 12, 2)}
    assert {tuple(c) for c in grid_only} == even
    fresh = {tuple(c) for c in cells} - even
    assert len(fresh) == 9
    assert all(r + 2 <= 12 and c + 2 <= 10 for r, c in fresh)
    assert any(r % 2 or c % 2 for r, c in fresh)
    assert (candidates((800, 660), 1, config, "0" * 16) == cells).all()
    assert len(candidates((800, 660), 0, config, "0" * 16)) == 13 * 11  # the base has none
    others = [
        candidates((800, 660), 1, TileConfig(64, crops=9, seed=1), "0" * 16),
        candidates((800, 660), 1, config, "1" * 16),
    ]
    assert all({tuple(c) for c in other} != {tuple(c) for c in cells} for other in others)


def test_more_crops_than_places_are_all_places():
    cells = candidates((256, 256), 1, TileConfig(64, crops=1000), "0" * 16)
    assert {tuple(c) for c in cells} == {(r, c) for r in range(3) for c in range(3)}
    assert len(candidates((100, 100), 2, TileConfig(64, crops=5), "0" * 16)) == 1


def test_patients_are_held_out_whole(tiny_slide, tmp_path):
    content = storage.read_bytes(tiny_slide)
    names = [f"P{patient:02d}-{part}.tif" for patient in range(8) for part in "ab"]
    for name in names:
        (tmp_path / name).write_bytes(content)
    config = TileConfig(64, [0], [0.3], val_fraction=0.4, patient=r"^(P\d\d)-")
    root = str(tmp_path / "data")
    tile.run(root, find_slides(f"{tmp_path}/*.tif"), config, ExecutorConfig())
    slides = slides_of(root)
    assert len({slide.slide_id for slide in slides}) == 16
    splits = {}
    for slide in slides:
        splits.setdefault(slide.patient_id, set()).add(slide.split)
    assert len(splits) == 8
    assert all(len(found) == 1 for found in splits.values())
    assert set.union(*splits.values()) == {"train", "val"}
    tables = b"".join(storage.read_bytes(path) for path in storage.glob(f"{root}/tiles/*"))
    assert b"P03" not in tables  # no file names in tables
    with pytest.raises(UserError, match=r"tile\.patient=\(Q\) finds no patient in 'P00-a\.tif'"):
        tile.run(
            root + "2",
            find_slides(f"{tmp_path}/*.tif"),
            TileConfig(64, patient="(Q)"),
            ExecutorConfig(),
        )


def test_no_tissue_names_the_slide_and_the_cure(tmp_path, tiny_prepare, run):
    pyramid.write_image(str(tmp_path / "glass.tif"), np.full((400, 400, 3), 243, np.uint8), 0.5)
    glass = str(tmp_path / "glass.tif")
    with pytest.raises(UserError, match=r"no tile of 1 slides is kept.*lower tile\.tissue="):
        run(tiny_prepare(slides=glass, verbs="tile"))
    assert not (tmp_path / "data" / "tile.json").exists()
    done = run(tiny_prepare(slides=glass, verbs="tile", tile={"tissue": [0.0]}))  # the cure cures
    assert done["tile"]["counts"]["0"] == {"train": 24, "val": 12}


def test_slides_are_found_or_missed_loudly(tiny_slide, tmp_path, tiny_prepare, run):
    folder = tiny_slide.rsplit("/", 1)[0]
    assert find_slides(f"{folder}/*.tif, {tiny_slide}") == [tiny_slide]
    with pytest.raises(UserError, match=r"no slide fits .*\*\.svs; check the path"):
        find_slides(f"{tiny_slide},{folder}/*.svs")
    with pytest.raises(UserError, match=r"is a folder; name the slides in it: slides='.*/\*\.svs'"):
        find_slides(folder)
    with pytest.raises(UserError, match=r"verbs=, names no verb; choose among tile, embed"):
        run(tiny_prepare(slides=tiny_slide, verbs=","))
    with pytest.raises(UserError, match=r"which slides\? Give slides="):
        run(tiny_prepare(slides="", verbs="tile"))
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "tiny.tif").write_bytes(b"II*\0")
    with pytest.raises(UserError, match=r"have one file name.*rename one"):
        run(tiny_prepare(slides=f"{tiny_slide},{tmp_path}/deep/tiny.tif", verbs="tile"))


def test_a_broken_slide_stops_the_run_by_its_pseudonym(shared_data, tiny_prepare, run):
    broken = str(shared_data / "wsi/broken.svs")
    with pytest.raises(
        UserError, match=r"^slide [0-9a-f]{16}: the file is neither .*leave it out"
    ) as told:
        run(tiny_prepare(slides=broken, verbs="tile"))
    slide_id = re.search(r"[0-9a-f]{16}", str(told.value))[0]
    assert "broken" not in str(told.value)
    names = storage.read_json(f"{tiny_prepare().out}/names.json")
    assert names == {slide_id: broken}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bands", [1, 2]),
        ("bands", [0]),
        ("value_range", [3]),
        ("value_range", [1, 1]),
        ("patch_px", 2),
        ("scales", []),
        ("split", "half"),
        ("val_fraction", 1.0),
        ("tissue", []),
    ],
)
def test_senseless_values_name_their_key(tiny_prepare, run, key, value):
    with pytest.raises(UserError, match=rf"tile\.{key}=.*must be"):
        run(tiny_prepare(verbs="tile", tile={key: value}))


def test_the_manifest_counts_what_the_table_holds(tiny_prepare, tmp_path, run):
    facts = run(tiny_prepare(verbs="tile"))["tile"]
    manifest = json.loads((tmp_path / "data" / "tile.json").read_text())
    table = storage.read_table(str(tmp_path / "data" / manifest["parts"][0]["part"]))
    kept = table.filter(table["kept"]).to_pylist()
    assert len(kept) > 30
    for scale, counts in manifest["counts"].items():
        for split, count in counts.items():
            found = [r for r in kept if r["scale"] == int(scale) and r["split"] == split]
            assert count == len(found)
    assert sum(sum(c.values()) for c in manifest["counts"].values()) == len(kept)
    assert manifest["counts"] == facts["counts"]
    assert manifest["config"]["tile"]["patch_px"] == 64
    assert manifest["rows"] == table.num_rows


def test_views_are_training_rows_of_the_same_patient(tiny_prepare, run):
    config = tiny_prepare(verbs="tile,embed,shard", tile={"views": 4})
    run(config)
    root = config.out
    slides = slides_of(root)
    assert [slide.view for slide in sorted(slides, key=lambda slide: slide.view)] == [0, 1, 2, 3]
    assert len({slide.patient_id for slide in slides}) == 1
    assert len({slide.path for slide in slides}) == 1
    rows = tables.rows(root, "examples", columns=["slide_id", "split", "scale", "row", "column"])
    by_view = {slide.slide_id: slide.view for slide in slides}
    splits = {(by_view[row["slide_id"]] > 0, row["split"]) for row in rows.to_pylist()}
    assert splits == {(False, "train"), (False, "val"), (True, "train")}


def test_views_show_no_held_out_pixel_and_embed_their_own(tiny_prepare, run):
    config = tiny_prepare(verbs="tile,embed,shard", tile={"views": 8})
    run(config)
    encoder = ssl.load("toy")
    rows = tables.rows(config.out, "examples").to_pylist()
    for slide in slides_of(config.out):
        view = view_of(slide, config.tile)
        with open_slide(slide.path) as whole:
            edge_px = 64 * (12 - 4)  # four of twelve rows are held out
            pixels = whole.read(0, 0, *whole.size_px)
            top, left = view.shift_px
            seen = view.turned(pixels[top:, left:])
            for row in (one for one in rows if one["slide_id"] == slide.slide_id):
                r, c, side = row["row"] * 64, row["column"] * 64, 64 << row["scale"]
                y, _, height, _ = view.source((r, c, side, side), whole.size_px)
                assert (y + height <= edge_px) == (row["split"] == "train")
                if row["scale"] == 0:
                    tile_px = seen[r : r + 64, c : c + 64]
                    np.testing.assert_array_equal(images.from_bytes(row["image"]), tile_px)
                    batch = np.stack([tile_px] * 8)
                    np.testing.assert_array_equal(encoder(batch)[0], np.float16(row["grid"]))


def test_held_out_patients_have_one_view(tiny_slide, tmp_path):
    slides = [shutil.copy(tiny_slide, tmp_path / f"{name}.tif") for name in "abcdef"]
    config = TileConfig(split="patient", val_fraction=0.5, views=3)
    entries = with_views(slide_index.index(list(map(str, slides)), config).entries, config)
    views = {
        split: {one.view for one in entries if one.split == split} for split in ("train", "val")
    }
    assert views == {"train": {0, 1, 2}, "val": {0}}


def test_one_view_leaves_earlier_tables_valid():
    assert "views" not in tile_table.section(TileConfig())
    assert tile_table.section(TileConfig(views=2))["views"] == 2
