import shutil
import sys

import numpy as np
import pyarrow as pa
import pytest
import torch
from bundles import written

from raylarge import config, schema, storage, tables
from raylarge.data import features, row_selection
from raylarge.data.exchange import h5_features
from raylarge.data.features import FeatureConfig
from raylarge.data.pipeline import ExecutorConfig
from raylarge.data.prepare import Prepare, prepare
from raylarge.diffusion import noise
from raylarge.errors import UserError
from raylarge.models import bundle as bundles
from raylarge.models.summarizer import Summarizer
from raylarge.report import Report


@pytest.fixture(scope="module")
def bundle(tiny_bundle, tmp_path_factory):
    """The tiny bundle with a Summarizer for the toy encoder's 32 channels."""
    folder = str(tmp_path_factory.mktemp("fitting") / "bundle")
    shutil.copytree(tiny_bundle, folder)
    torch.manual_seed(0)
    summarizer = Summarizer(channels=32, width=64, layers=1, heads=4, scales=4)
    bundles.save(folder, {"summarizer": summarizer}, {})
    return folder


@pytest.fixture(scope="module")
def made(tiny_slide, bundle, tmp_path_factory):
    """A folder with latents of scales 0 to 2, flipped ones among them."""
    root = str(tmp_path_factory.mktemp("features") / "data")
    tile = {"patch_px": 64, "scales": [0, 1, 2], "tissue": [0.5, 0.2], "block_tiles": 30}
    split = {"split": "band", "val_fraction": 0.35}
    values = {"slides": tiny_slide, "out": root, "tile": {**tile, **split}, "bundle": bundle}
    more = {"embed": {"encoder": "toy"}, "shard": {"buckets": 3, "group_rows": 7}}
    verbs = {"verbs": "tile,embed,shard,encode", "encode": {"batch": 8, "flips": True}}
    prepare(config.build(Prepare, {**values, **more, **verbs}), Report(root + "/report.json"))
    return root


@pytest.fixture
def data(made, tmp_path):
    return shutil.copytree(made, tmp_path / "data").as_posix()


@pytest.fixture(scope="module")
def loaded(bundle):
    return bundles.load(bundle)


def upright(root, scales=(0, 1, 2)):
    """The latents that are not flipped, part by part, in their order."""
    (folder,) = storage.children(root, "latents-*")
    rows = [
        row
        for path in storage.children(folder, "*")
        for row in storage.read_table(path).to_pylist()
    ]
    return [row for row in rows if row["flip"] == 0 and row["scale"] in scales]


def found_in(root, done):
    """The features by their manifest, part by part, and the manifest."""
    made = tables.manifest(root, done["table"].rsplit("/", 1)[1])
    parts = [storage.read_table(f"{root}/{one['part']}") for one in made["parts"]]
    for one, part in zip(made["parts"], parts, strict=True):
        assert part.schema.names == schema.FEATURES.names
        pairs = zip(part["scale"].to_pylist(), part["split"].to_pylist(), strict=True)
        assert list(pairs) == [(k, split) for k, split, rows in one["groups"] for _ in range(rows)]
    return pa.concat_tables(parts), made


def matrix(table):
    return np.array(table["feature"].to_pylist(), np.float32)


def direct(loaded, row, t=100, seed=0, own=True):
    """One example's features of all blocks, by a forward pass of its own."""
    z = torch.tensor(row["latent"]).reshape(1, 3, 16, 16)
    abar = loaded.schedule.abar[t].float()
    eps = noise.normal((3, 16, 16), seed, "features", [(row["key"] >> 32, row["key"] % (1 << 32))])
    grid = torch.tensor(row["grid"]).reshape(1, row["grid_rows"], row["grid_columns"], -1)
    with torch.inference_mode():
        tokens = loaded.summarizer(grid.movedim(-1, 1), torch.tensor([row["scale"]]))
        tokens = tokens if own else loaded.summarizer.null(1)
        x_t = abar.sqrt() * z + (1 - abar).sqrt() * eps
        _, blocks = loaded.unet.features(x_t, t, tokens)
    return [block[0].mean(dim=(1, 2)).numpy() for block in blocks]


def test_features_are_the_networks_own(data, bundle, loaded):
    done = features.run(data, bundle, FeatureConfig(batch=5), ExecutorConfig())
    found, made = found_in(data, done)
    rows = upright(data)
    assert found["key"].to_pylist() == [row["key"] for row in rows]
    for name in ("slide_id", "patient_id", "split", "scale", "row", "column"):
        assert found[name].to_pylist() == [row[name] for row in rows]
    shard = storage.read_json(f"{data}/shard.json")
    assert [one["groups"] for one in made["parts"]] == [one["groups"] for one in shard["parts"]]
    wanted = np.stack([direct(loaded, row)[1 + 3] for row in rows])
    assert found["feature"].type == pa.list_(pa.float16())
    assert np.abs(matrix(found) - wanted).max() < 2e-3 * np.abs(wanted).max()
    assert matrix(found).std(axis=0).max() > 0.01
    assert features.run(data, bundle, FeatureConfig(batch=5), ExecutorConfig())["made"] == 0


def test_blocks_scales_time_and_condition_are_the_users_choice(data, bundle, loaded):
    rows = upright(data, [1, 2])
    wish = FeatureConfig(blocks=[-1, 0, 2], scales=[1, 2], t=400, seed=7, condition="null")
    found, made = found_in(data, features.run(data, bundle, wish, ExecutorConfig()))
    assert found["key"].to_pylist() == [row["key"] for row in rows]
    assert set(made["counts"]) == {"1", "2"}
    every = [direct(loaded, row, 400, 7, own=False) for row in rows]
    wanted = np.stack([np.concatenate([one[0], one[1], one[3]]) for one in every])
    assert np.abs(matrix(found) - wanted).max() < 2e-3 * np.abs(wanted).max()
    names = {features.run(data, bundle, FeatureConfig(), ExecutorConfig())["table"]}
    for other in ({"t": 5}, {"blocks": [2]}, {"seed": 1}, {"condition": "null"}):
        names.add(features.run(data, bundle, FeatureConfig(**other), ExecutorConfig())["table"])
    assert len(names) == 5
    some = features.run(data, bundle, FeatureConfig(scales=[2]), ExecutorConfig())
    assert some["table"] not in names
    assert some["rows"] == len(upright(data, [2]))
    assert features.run(data, bundle, FeatureConfig(), ExecutorConfig())["made"] == 0


def test_the_condition_and_the_noise_are_each_examples_own(data, bundle):
    values = {}
    for wish in ({}, {"condition": "null"}, {"seed": 1}):
        done = features.run(data, bundle, FeatureConfig(**wish), ExecutorConfig())
        values[str(wish)] = matrix(found_in(data, done)[0])
    first, *others = values.values()
    assert all((np.abs(first - other).max(axis=1) > 1e-3).all() for other in others)


def test_another_unet_means_other_features(data, bundle, tmp_path):
    before = features.run(data, bundle, FeatureConfig(), ExecutorConfig())["table"]
    folder = shutil.copytree(bundle, tmp_path / "bundle").as_posix()
    assert features.run(data, folder, FeatureConfig(), ExecutorConfig())["made"] == 0
    other = bundles.load(folder)
    with torch.no_grad():
        other.unet.conv_in.weight.add_(0.1)
    bundles.save(folder, {"unet": other.unet}, {})
    assert features.run(data, folder, FeatureConfig(), ExecutorConfig())["table"] != before
    bundles.save(folder, {"cdm": other.cdm}, {"cdm": "trained anew"})  # no part of any feature
    assert features.run(data, folder, FeatureConfig(), ExecutorConfig())["made"] == 0
    make_stage = features.FeatureStage(
        data, folder, bundles.digest(folder, features._PARTS), FeatureConfig()
    )
    assert make_stage.kind is schema.FEATURES
    with pytest.raises(UserError, match=r"changed while features were taken"):
        features.FeatureStage(data, folder, "another", FeatureConfig())


def test_batches_have_one_size_and_a_part_does_not_hang_on_the_others(data, bundle, monkeypatch):
    sizes = []
    pooled = features.pooled_features

    def seen(loaded, x_0, key, condition, setting):
        sizes.append(len(x_0))
        return pooled(loaded, x_0, key, condition, setting)

    monkeypatch.setattr(features, "pooled_features", seen)
    done = features.run(data, bundle, FeatureConfig(batch=8), ExecutorConfig())
    assert set(sizes) == {8}
    assert done["rows"] % 8
    path = storage.children(done["table"], "*.parquet")[-1]
    before = storage.read_bytes(path)
    storage.remove(path)
    assert features.run(data, bundle, FeatureConfig(batch=8), ExecutorConfig())["made"] == 1
    assert storage.read_bytes(path) == before


@pytest.mark.ray
def test_law_5_workers_make_the_same_features(ray_session, data, bundle):
    wish = FeatureConfig(batch=8, blocks=[-1, 3])
    done = features.run(data, bundle, wish, ExecutorConfig())
    paths = [*storage.children(done["table"], "*"), done["output"]]
    here = {path: storage.read_bytes(path) for path in paths}
    for path in paths:
        storage.remove(path)
    again = features.run(
        data, bundle, FeatureConfig(batch=8, blocks=[-1, 3], actors=2), ExecutorConfig()
    )
    assert again["made"] == done["parts"] > 1
    assert {path: storage.read_bytes(path) for path in paths} == here


def test_half_precision_comes_near(data, bundle):
    one, half = (
        matrix(
            found_in(
                data, features.run(data, bundle, FeatureConfig(dtype=dtype), ExecutorConfig())
            )[0]
        )
        for dtype in ("float32", "bfloat16")
    )
    assert 0 < np.abs(one - half).max() < 0.1 * np.abs(one).max()


def test_any_conditioner_will_do(data, tmp_path):
    """Graikos et al.'s one token, on a folder whose bundle has another latent side."""
    folder, _ = written(tmp_path / "bundle", "light", "vector")
    with pytest.raises(
        UserError, match=r"there are no latents-.* yet; run .* verbs=encode bundle="
    ):
        features.run(data, folder, FeatureConfig(), ExecutorConfig())
    vae = bundles.digest(folder, ("vae",))
    shutil.copytree(storage.children(data, "latents-*")[0], f"{data}/latents-{vae}")
    made = storage.read_json(storage.children(data, "encode-*.json")[0])
    storage.write_json(f"{data}/encode-{vae}.json", made)
    with pytest.raises(UserError, match=r"latents have 768 values, those of the bundle are \(3, 8"):
        features.run(data, folder, FeatureConfig(), ExecutorConfig())


def test_what_features_refuses(data, bundle, tmp_path):
    for wish, told in (
        ({"blocks": []}, r"features\.blocks=\[\]: it must be a list of -1 and above"),
        ({"blocks": [-2]}, r"features\.blocks=\[-2\]"),
        ({"blocks": [0, 4]}, r"has output blocks 0 to 3, and -1 for the middle"),
        ({"t": 1000}, r"features\.t=1000: .* has timesteps 0 to 999"),
        ({"t": -1}, r"features\.t=-1"),
        ({"condition": "text"}, r"features\.condition=text: it must be own or null"),
        ({"dtype": "int8"}, r"features\.dtype=int8: it must be one of float32"),
        ({"scales": [3]}, r"features\.scales=\[3\]: choose among .*\[0, 1, 2\]"),
        ({"batch": 0}, r"batch=0: it must be 1 or more"),
    ):
        with pytest.raises(UserError, match=told):
            features.run(data, bundle, FeatureConfig(**wish), ExecutorConfig())
    with pytest.raises(UserError, match="there is no bundle at"):
        features.run(data, str(tmp_path / "nothing"), FeatureConfig(), ExecutorConfig())
    assert not storage.children(data, "features*")


def test_scales_that_the_summarizer_does_not_know(data, bundle, tmp_path):
    folder = shutil.copytree(bundle, tmp_path / "bundle").as_posix()
    few = Summarizer(channels=32, width=64, layers=1, heads=4, scales=2)
    bundles.save(folder, {"summarizer": few}, {})
    with pytest.raises(UserError, match=r"scales 0 to 1, and there are latents of scale 2"):
        features.run(data, folder, FeatureConfig(), ExecutorConfig())
    assert features.run(data, folder, FeatureConfig(scales=[0, 1]), ExecutorConfig())["rows"] > 0
    assert features.run(data, folder, FeatureConfig(condition="null"), ExecutorConfig())["counts"][
        "2"
    ]


def exported(data, table, out, scale=0):
    return h5_features.run(h5_features.Features(data, table, out, scale))


def test_each_slide_has_an_h5_file(data, bundle, tiny_slide, tmp_path):
    h5py = pytest.importorskip("h5py")
    done = features.run(data, bundle, FeatureConfig(), ExecutorConfig())
    name = done["table"].rsplit("/", 1)[1]
    told = exported(data, name, str(tmp_path / "h5"), scale=1)
    (path,) = (tmp_path / "h5").iterdir()
    slide_id = next(iter(storage.read_json(f"{data}/names.json")))
    assert path.name == f"{slide_id}.h5"
    table = tables.rows(data, name)
    rows = [row for row in table.to_pylist() if row["scale"] == 1]
    assert told == {"slides": 1, "rows": len(rows), "output": str(tmp_path / "h5")}
    with h5py.File(path) as file:
        assert file["features"].dtype == np.float32
        assert file["coords"].dtype == np.int64
        assert (file["features"][:] == np.array([row["feature"] for row in rows], "f4")).all()
        assert file["coords"][:].tolist() == [[64 * r["column"], 64 * r["row"]] for r in rows]
        known = dict(file["coords"].attrs)
        assert (known["patch_size"], known["patch_size_level0"]) == (64, 128)
        assert (known["name"], known["mpp"]) == (slide_id, 1.0)
        assert file["features"].attrs["blocks"].tolist() == [3]
    before = path.read_bytes()
    exported(data, name, str(tmp_path / "h5"), scale=1)
    assert path.read_bytes() == before
    with pytest.raises(UserError, match=r"no features of scale 5; its scales: 0, 1, 2"):
        exported(data, name, str(tmp_path / "h5"), scale=5)


def test_h5_coordinates_are_the_files_own_pixels(data, bundle, tiny_slide, tmp_path):
    h5py = pytest.importorskip("h5py")
    name = features.run(data, bundle, FeatureConfig(scales=[0]), ExecutorConfig())["table"].rsplit(
        "/", 1
    )[1]
    slides = storage.read_json(f"{data}/slides.json")
    slides["slides"][0]["mpp"] = 0.25  # as if it were a 40x scan
    other = {**slides["slides"][0], "slide_id": "unseen"}
    storage.write_json(f"{data}/slides.json", {"slides": [other, *slides["slides"]]})
    exported(data, name, str(tmp_path / "h5"))
    (path,) = (tmp_path / "h5").iterdir()
    first = next(row for row in tables.rows(data, name).to_pylist() if row["scale"] == 0)
    with h5py.File(path) as file:
        assert file["coords"][0].tolist() == [128 * first["column"], 128 * first["row"]]
        assert file["coords"].attrs["patch_size_level0"] == 128


def test_parts_are_read_one_by_one_and_one_scale_of_them(data, bundle, monkeypatch, tmp_path):
    pytest.importorskip("h5py")
    name = features.run(data, bundle, FeatureConfig(), ExecutorConfig())["table"].rsplit("/", 1)[1]
    made, read, seen = tables.manifest(data, name), row_selection.read, []

    def one(root, unit, columns, scales):
        table, groups = read(root, unit, columns, scales)
        seen.append((unit.source, {scale for scale, _, _ in groups}))
        return table, groups

    monkeypatch.setattr(h5_features.row_selection, "read", one)
    monkeypatch.setattr(tables, "rows", None)
    exported(data, name, str(tmp_path / "h5"), scale=1)
    mine = [part["part"] for part in made["parts"] if "1" in part["counts"]]
    assert seen == [(part, {1}) for part in mine]
    assert len(mine) > 1


def test_without_h5py_the_cure_is_named(data, bundle, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match=r"raylarge\[h5\]"):
        exported(data, "features-any", str(tmp_path))
