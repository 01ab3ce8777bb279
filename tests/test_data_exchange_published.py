"""The published sets, written here exactly as their authors' code reads them, and read back."""

import io

import numpy as np
import pytest
from bundles import written
from PIL import Image

from raylarge import config, storage, tables
from raylarge.data.exchange import layouts, published
from raylarge.data.exchange.published import Published
from raylarge.data.shard import pooled
from raylarge.errors import UserError
from raylarge.train.ingest import Ingest
from raylarge.train.task import Recipe

WIDTH = 1024


def grid(i, scale):
    """A grid [side, side, 1024] in which every cell tells its row and column."""
    side = 1 << scale
    rng = np.random.default_rng([i, scale])
    x = rng.standard_normal((side, side, WIDTH)).astype(np.float16)
    x[..., 0] = np.arange(side)[:, None]
    x[..., 1] = np.arange(side)
    x[..., 2] = i % 1000
    return x


def latent(i, scale):
    return np.random.default_rng([i, scale, 1]).standard_normal((3, 64, 64)).astype(np.float16)


def jpeg(i):
    """Dark above, bright to the right: rows and columns cannot be mistaken."""
    x = np.zeros((256, 256, 3), np.uint8)
    x[128:] = 200
    x[:, 128:, 0] = 255
    x[:8, :8] = i
    sink = io.BytesIO()
    Image.fromarray(x).save(sink, "JPEG", quality=95)
    return sink.getvalue()


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)


def write_brca(root, mags, images=False):
    for mag, ids in mags.items():
        scale = layouts.LAYOUTS["brca"].mags.index(mag)
        for i in ids:
            folder = root / mag / str(i // 1_000_000)
            x = grid(i, scale).transpose(2, 0, 1).reshape(WIDTH, -1)
            put(folder / f"{i}_uni_grid.npy", x[:, 0] if i % 2 and scale == 0 else x)
            put(folder / f"{i}_vae.npy", latent(i, scale))
            if images:
                put(folder / f"{i}_img.npy", np.frombuffer(jpeg(i), np.uint8))


def write_naip(root, mags):
    for mag, ids in mags.items():
        scale = int(mag[0]) - 1
        for i in ids:
            put(root / mag / f"{i}_dino_grid.npy", grid(i, scale).reshape(-1, WIDTH))
            put(root / mag / f"{i}_vae.npy", latent(i, scale))
            put(root / mag / f"{i}.jpg", jpeg(i))


@pytest.fixture
def run(tmp_path):
    def call(name, **more):
        layers = {"format": name, "source": str(tmp_path / "set"), "out": str(tmp_path / "data")}
        return published.run(config.build(Published, layers, more))

    return call


def by_item(table, scale):
    rows = [row for row in table.to_pylist() if row["scale"] == scale]
    return {row["column"] >> scale: row for row in rows}


def grid_of(row):
    return np.array(row["grid"], np.float16).reshape(row["grid_rows"], row["grid_columns"], WIDTH)


def check_grids(rows, scale):
    """Every grid as it was drawn: rows are rows and columns columns, not the other way round."""
    for i, row in rows.items():
        expected = pooled(grid(i, scale))
        assert (grid_of(row) == expected).all()
        if scale:
            assert grid_of(row)[-1, 0, 0] > grid_of(row)[0, -1, 0]
            assert grid_of(row)[0, -1, 1] > grid_of(row)[-1, 0, 1]


def test_brca_is_read_with_channels_first(run, tmp_path):
    mags = {"20x": [0, 1, 2, 999_999, 1_000_000], "10x": [0, 1], "1_25x": [0]}
    write_brca(tmp_path / "set", mags)
    done = run("brca", autoencoder="vq-f4")
    assert set(done) == {"latents-vq-f4"}  # there are no images
    assert (done["latents-vq-f4"]["rows"], done["latents-vq-f4"]["rejected"]) == (8, 0)
    root = str(tmp_path / "data")
    table = tables.rows(root, "latents-vq-f4")
    assert table["flip"].to_pylist() == [0] * 8
    for mag, ids in mags.items():
        scale = layouts.LAYOUTS["brca"].mags.index(mag)
        rows = by_item(table, scale)
        assert sorted(rows) == ids
        check_grids(rows, scale)
        for i, row in rows.items():
            stored = np.array(row["latent"], np.float16).reshape(3, 64, 64)
            assert (stored == latent(i, scale)).all()
    assert grid_of(by_item(table, 4)[0]).shape == (8, 8, WIDTH)
    made = storage.read_json(f"{root}/encode-vq-f4.json")
    assert (made["patch_px"], made["encoder"]["name"]) == (256, "uni")
    assert made["config"]["tile"]["base_mpp"] == 0.5


def test_naip_is_read_with_channels_last_and_has_images(run, tmp_path):
    write_naip(tmp_path / "set", {"1x": [0, 1, 2], "2x": [0, 1], "4x": [0]})
    done = run("naip", autoencoder="vq-f4")
    assert set(done) == {"examples", "latents-vq-f4"}
    root = str(tmp_path / "data")
    examples, latents = tables.rows(root, "examples"), tables.rows(root, "latents-vq-f4")
    assert examples["key"].to_pylist() == latents["key"].to_pylist()
    for scale in (0, 1, 3):
        check_grids(by_item(examples, scale), scale)
        check_grids(by_item(latents, scale), scale)
    for i, row in by_item(examples, 1).items():
        assert row["image"] == jpeg(i)
        assert row["tissue"] is None
    made = storage.read_json(f"{root}/shard.json")
    assert made["encoder"]["name"] == "dinov2_vitl14_reg"
    assert made["config"]["tile"]["base_mpp"] == 1e6


def test_the_two_sets_are_not_taken_for_each_other(run, tmp_path):
    write_naip(tmp_path / "set", {"2x": [0]})
    (tmp_path / "set" / "20x" / "0").mkdir(parents=True)
    (tmp_path / "set" / "2x" / "0_dino_grid.npy").rename(
        tmp_path / "set" / "20x" / "0" / "0_uni_grid.npy"
    )
    put(tmp_path / "set" / "20x" / "0" / "0_vae.npy", latent(0, 0))
    with pytest.raises(
        UserError, match=r"shape \(4, 1024\), but its first axis should be the 1024"
    ):
        run("brca", autoencoder="vq-f4")
    square = np.arange(16.0).reshape(4, 4)
    assert (layouts.cells(square, 4, "first") == square.T).all()
    assert (layouts.cells(square, 4, "last") == square).all()


def test_images_of_brca_are_optional(run, tmp_path):
    write_brca(tmp_path / "set", {"20x": [0, 1], "10x": [0, 3]}, images=True)
    done = run("brca", tables="examples")
    assert set(done) == {"examples"}
    rows = tables.rows(str(tmp_path / "data"), "examples").to_pylist()
    assert [row["image"] for row in rows] == [jpeg(row["column"] >> row["scale"]) for row in rows]


@pytest.mark.parametrize(("name", "mag"), [("brca-demo", "10x"), ("naip-demo", "2x")])
def test_the_demo_sets_are_read(run, tmp_path, name, mag):
    for i in range(16):
        x = grid(i, 1).reshape(4, WIDTH)
        put(tmp_path / f"set/data/{mag}/{i}_ssl_feat.npy", x.T if name == "brca-demo" else x)
        put(tmp_path / f"set/data/{mag}/{i}.jpg", jpeg(i))
    assert run(name)["examples"]["rows"] == 16
    check_grids(by_item(tables.rows(str(tmp_path / "data"), "examples"), 1), 1)
    with pytest.raises(UserError, match=r"tables=latents: the set .*-demo has no latents"):
        run(name, tables="latents", autoencoder="vq-f4")


def test_a_block_of_items_is_a_slide_and_is_held_out_as_one(run, tmp_path):
    write_brca(tmp_path / "set", {"20x": range(60)})
    more = {"block_items": 3, "val_fraction": 0.3, "test_fraction": 0.2, "split": "fit"}
    run("brca", autoencoder="vq-f4", **more)
    rows = by_item(tables.rows(str(tmp_path / "data"), "latents-vq-f4"), 0)
    blocks = {}
    for i, row in rows.items():
        blocks.setdefault(i // 3, set()).add((row["slide_id"], row["patient_id"], row["split"]))
    assert all(len(told) == 1 for told in blocks.values())
    assert len({slide for told in blocks.values() for slide, _, _ in told}) == 20
    assert {split for told in blocks.values() for _, _, split in told} == {"fit", "val", "test"}


def test_parts_are_spread_and_any_number_of_them_gives_the_same_rows(run, tmp_path):
    ids = [i for i in range(40) if i not in (5, 17)]
    write_brca(tmp_path / "set", {"20x": ids})
    first = run("brca", autoencoder="one")["latents-one"]
    more = {"unit_items": 10, "group_rows": 4, "out": str(tmp_path / "other")}
    second = run("brca", autoencoder="one", **more)["latents-one"]
    assert (first["parts"], second["parts"], second["rows"]) == (1, 4, 38)
    tables_of = [tables.rows(str(tmp_path / n), "latents-one") for n in ("data", "other")]
    assert tables_of[0].equals(tables_of[1])
    made = storage.read_json(f"{tmp_path}/other/encode-one.json")
    for part in made["parts"]:
        assert sum(rows for _, _, rows in part["groups"]) == part["rows"]
        table = storage.read_table(f"{tmp_path}/other/{part['part']}")
        assert table["key"].to_pylist() == sorted(table["key"].to_pylist())
        assert max(table["column"].to_pylist()) - min(table["column"].to_pylist()) > 30


def test_a_rerun_makes_nothing_and_a_lost_part_comes_back(run, tmp_path):
    write_naip(tmp_path / "set", {"1x": range(6), "2x": range(3)})
    run("naip", autoencoder="a", unit_items=3)
    paths = [str(path) for path in sorted((tmp_path / "data").rglob("*")) if path.is_file()]
    before = {path: storage.read_bytes(path) for path in paths}
    assert [done["made"] for done in run("naip", autoencoder="a", unit_items=3).values()] == [0, 0]
    storage.remove(next(path for path in paths if "/latents-a/" in path))
    assert [done["made"] for done in run("naip", autoencoder="a", unit_items=3).values()] == [0, 1]
    assert {path: storage.read_bytes(path) for path in paths} == before
    with pytest.raises(UserError, match=r"published\.split=train, not val; choose another out="):
        run("naip", autoencoder="a", unit_items=3, split="val")


def test_items_that_do_not_fit_are_left_out_and_named(run, tmp_path):
    write_brca(tmp_path / "set", {"20x": range(6), "10x": [0, 1]})
    put(tmp_path / "set/20x/0/1_vae.npy", np.zeros((3, 64, 63), np.float16))
    (tmp_path / "set/20x/0/2_vae.npy").unlink()
    (tmp_path / "set/20x/0/3_vae.npy").write_bytes(b"cut")
    put(tmp_path / "set/20x/0/4_vae.npy", np.full((3, 64, 64), np.nan, np.float16))
    put(tmp_path / "set/20x/0/5_uni_grid.npy", np.full(WIDTH, np.inf, np.float16))
    put(tmp_path / "set/10x/0/1_uni_grid.npy", np.zeros((WIDTH, 3), np.float16))
    done = run("brca", autoencoder="a")["latents-a"]
    assert (done["rows"], done["rejected"]) == (2, 6)
    parts = storage.read_json(f"{tmp_path}/data/encode-a.json")["parts"]
    told = {tuple(one) for part in parts for one in part["rejected"]}
    assert (1, "a latent of shape (3, 64, 63), not (3, 64, 64)") in told
    assert (2, "no 2_vae.npy") in told
    assert (4, "a latent with NaN or values beyond float16") in told
    assert (5, "a grid with NaN or values beyond float16") in told
    assert (1, "a grid of 3 cells at scale 1") in told
    assert any(i == 3 and "3_vae.npy is damaged" in why for i, why in told)


def test_training_reads_both_tables(run, tmp_path):
    write_naip(tmp_path / "set", {"1x": range(4), "2x": range(4)})
    run("naip", autoencoder="a")
    for name, key, shape in (
        ("examples", "image", (4, 3, 256, 256)),
        ("latents-a", "latent", (4, 3, 64, 64)),
    ):
        ingest = Ingest(str(tmp_path / "data"), {name: (key, "grid")}, Recipe(batch=4))
        batch = ingest.batch(range(4))
        assert tuple(batch[key].shape) == shape
        assert tuple(batch["grid"].shape) == (4, 64, WIDTH)
        assert ingest.facts.encoder["name"] == "dinov2_vitl14_reg"


def test_a_bundle_names_the_latents_and_encodes_the_images(run, tmp_path):
    from raylarge.data import encode
    from raylarge.data.pipeline import ExecutorConfig
    from raylarge.models import bundle

    folder, _ = written(tmp_path / "bundle")
    digest = bundle.digest(folder, ("vae",))
    write_naip(tmp_path / "set", {"1x": [0, 1], "2x": [0]})
    run("naip", tables="examples")
    made = encode.run(
        str(tmp_path / "data"), folder, encode.EncodeConfig(batch=2), ExecutorConfig()
    )
    assert made["rows"] == 3
    ours = tables.rows(str(tmp_path / "data"), f"latents-{digest}")
    run("naip", tables="latents", bundle=folder, out=str(tmp_path / "theirs"))
    theirs = tables.rows(str(tmp_path / "theirs"), f"latents-{digest}")
    assert ours.drop_columns(["latent"]).equals(theirs.drop_columns(["latent"]))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({}, r"whose latents are these\? Give bundle="),
        ({"autoencoder": "a", "encoder": "uni2_h"}, r"should be the 1536 channels of"),
        ({"autoencoder": "a/b"}, r"autoencoder=a/b: it must be letters"),
        ({"tables": "latent"}, r"tables=latent: it must be examples, latents, or both"),
        ({"source": "/nowhere"}, r"no set brca at /nowhere: no file such as 20x/0/0_uni_grid"),
        ({"format": "crc"}, r"import=crc: it must be one of brca, naip"),
    ],
)
def test_what_cannot_be_is_refused(run, tmp_path, more, told):
    write_brca(tmp_path / "set", {"10x": [0]})
    with pytest.raises(UserError, match=told):
        run("brca", **more)


@pytest.mark.s3
def test_a_set_in_a_store_is_read(run, tmp_path, s3_bucket):
    write_brca(tmp_path / "set", {"20x": [0, 1], "10x": [0]})
    for path in (tmp_path / "set").rglob("*.npy"):
        name = str(path.relative_to(tmp_path))
        storage.write_bytes(f"{s3_bucket}/published/{name}", path.read_bytes())
    root = f"{s3_bucket}/published"
    run("brca", autoencoder="a", source=f"{root}/set", out=f"{root}/data")
    run("brca", autoencoder="a")
    here = tables.rows(str(tmp_path / "data"), "latents-a")
    assert tables.rows(f"{root}/data", "latents-a").equals(here)


@pytest.mark.ray
@pytest.mark.slow
def test_two_workers_make_the_same_bytes(run, tmp_path, ray_session):
    write_naip(tmp_path / "set", {"1x": range(6), "2x": range(3)})
    for workers, name in ((None, "one"), (2, "two")):
        run("naip", autoencoder="a", unit_items=3, workers=workers, out=str(tmp_path / name))
    one, two = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in found if path.is_file()}
        for name in ("one", "two")
        for found in [sorted((tmp_path / name).rglob("*"))]
    )
    assert one == two


def test_latents_are_not_overwritten_by_another_setting(run, tmp_path):
    write_brca(tmp_path / "set", {"20x": range(3)})
    run("brca", tables="latents", autoencoder="a")
    with pytest.raises(UserError, match=r"made with published\.group_rows=64, not 8"):
        run("brca", tables="latents", autoencoder="a", group_rows=8)
