"""benchmarks/train_*.py: rows are taken as they are, judges judge, and the command runs."""

from collections import Counter

import numpy as np
import pytest
import torch

from benchmarks import train_conditioning, train_rows, train_scales
from benchmarks.train_conditioning import Near, noises
from raylarge import config, storage, tables
from raylarge.data.prepare import Prepare, prepare
from raylarge.errors import UserError
from raylarge.metrics.frechet import frechet, moments
from raylarge.metrics.kernel import kernel_distance
from raylarge.models import bundle as bundles
from raylarge.models.light_autoencoder import LightAutoencoder
from raylarge.report import Report
from raylarge.train.ingest import Ingest, latents_table
from raylarge.train.task import Recipe


@pytest.fixture(scope="module")
def made(tiny_slide, tmp_path_factory):
    """Tables of a tiny slide, mirrored latents among them, and the bundle of their autoencoder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("conditioning")
    data, bundle = str(folder / "data"), str(folder / "bundle")
    bundles.save(bundle, {"vae": LightAutoencoder(width=16, blocks=1)}, {"patch_px": 32})
    tile = {"patch_px": 32, "scales": [0, 1, 2], "tissue": [0.3, 0.2], "block_tiles": 100}
    values = {
        "slides": tiny_slide,
        "out": data,
        "verbs": "tile,embed,shard,encode",
        "bundle": bundle,
        "tile": {**tile, "split": "band", "val_fraction": 0.45, "crops": 30},
        "embed": {"encoder": "toy"},
        "shard": {"buckets": 3, "group_rows": 7},
        "encode": {"flips": True},
    }
    prepare(config.build(Prepare, values), Report(str(folder / "report.json")))
    return data, bundle


def rows_of(root, name):
    found = tables.rows(root, name)
    return {row["key"]: row for row in found.to_pylist() if not row.get("flip")}


def test_rows_are_taken_as_they_are(made, tmp_path):
    """Unmirrored, so many of each split and scale, each latent with its own example."""
    data, bundle = made
    name = latents_table(data, bundle)
    counts = {"train": {0: 11, 2: 3}, "val": {1: 2}}
    train_rows.few(data, bundle, str(tmp_path), counts)
    for table in ("examples", name):
        whole, some = rows_of(data, table), rows_of(str(tmp_path), table)
        assert all(whole[key] == row for key, row in some.items())
        found = Counter((row["split"], row["scale"]) for row in some.values())
        assert found == {("train", 0): 11, ("train", 2): 3, ("val", 1): 2}
    assert tables.rows(str(tmp_path), name).num_rows == 16
    ingest = Ingest(str(tmp_path), {name: ("latent", "grid"), "examples": ("image",)}, Recipe())
    assert ingest.facts.counts == {0: 11, 2: 3}
    codec = bundles.load_autoencoder(bundle)
    batch = ingest.batch(range(8))
    torch.testing.assert_close(codec.encode(batch["image"]), batch["latent"], atol=0.01, rtol=0.01)


def test_rows_are_spread_over_the_tables(made, tmp_path):
    """As many of a row group as its share of the rows is, not a run of neighbours."""
    data, bundle = made
    train_rows.few(data, bundle, str(tmp_path), {"train": {0: 12}})
    some, taken = rows_of(str(tmp_path), "examples").keys(), []
    for part in tables.manifest(data, "examples")["parts"]:
        keys = storage.read_table(f"{data}/{part['part']}")["key"].to_pylist()
        for k, split, size in part["groups"]:
            here, keys = keys[:size], keys[size:]
            if (k, split) == (0, "train"):
                taken.append((size, len(some & set(here))))
    whole = sum(size for size, _ in taken)
    assert len(taken) > 5
    assert sum(found for _, found in taken) == 12
    assert all(found == pytest.approx(12 * size / whole, abs=1) for size, found in taken)


def test_too_few_rows_are_told(made, tmp_path):
    with pytest.raises(UserError, match="rows of train at scale 2"):
        train_rows.few(*made, str(tmp_path), {"train": {2: 10_000}})


def test_other_rows_want_another_folder(made, tmp_path):
    train_rows.few(*made, str(tmp_path), {"train": {0: 4}})
    train_rows.few(*made, str(tmp_path), {"train": {0: 4}})
    with pytest.raises(UserError, match="contains other rows"):
        train_rows.few(*made, str(tmp_path), {"train": {0: 5}})


def test_a_begun_bundle_has_the_autoencoder_alone(made, tiny_bundle, tmp_path):
    out = train_rows.with_autoencoder_of(tiny_bundle, str(tmp_path / "one"))
    assert bundles.digest(out, ("vae",)) == bundles.digest(tiny_bundle, ("vae",))
    assert not (tmp_path / "one" / "unet").exists()
    with pytest.raises(UserError, match="lacks unet"):
        bundles.load(out)


def test_tokens_are_near_in_the_space_of_real_ones():
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(5, 130))
    real, others = (rng.normal(size=(200, 5)) @ mixing + 3 for _ in range(2))
    near = Near(real, 4)
    assert near(real) == pytest.approx(0, abs=1e-6)
    assert near(others) < 0.1 * near(noises(real, 200, 0)[0])
    whole = Near(real, 130)
    direct = frechet(*moments(others), *moments(real))
    assert whole(others) == pytest.approx(direct, rel=1e-3)


def test_noise_is_matched_by_channel_and_by_value():
    rng = np.random.default_rng(0)
    cells = rng.normal(size=(500, 65, 2)) * [1, 3] + [5, -5]
    cells[:, 1] += 40
    real = cells.reshape(500, 130)
    plain, channel, value = noises(real, 4000, seed=1)
    assert abs(plain.mean()) < 0.01
    np.testing.assert_allclose(
        channel.reshape(-1, 65, 2).mean(axis=(0, 1)), cells.mean(axis=(0, 1)), atol=0.1
    )
    np.testing.assert_allclose(value.mean(axis=0), real.mean(axis=0), atol=0.3)
    np.testing.assert_allclose(value.std(axis=0), real.std(axis=0), rtol=0.1)


def test_an_interval_holds_the_distance_and_tells_sets_apart():
    def drawn(shift, seed):
        return torch.randn(80, 6, generator=torch.Generator().manual_seed(seed)) + shift

    real, alike, far = drawn(0, 0), drawn(0, 1), drawn(1, 2)
    near, wide, apart = train_scales.intervals(real, [alike, far], seed=0)
    assert wide[0] == pytest.approx(1000 * kernel_distance(far, real))
    assert apart[0] == pytest.approx(wide[0] - near[0])
    assert near[1] < 0 < near[2]
    assert 0 < apart[1] < apart[0] < apart[2]


@pytest.mark.slow
def test_the_command_trains_and_judges_all(made, tmp_path, one_thread, monkeypatch, capsys):
    data, bundle = made
    monkeypatch.setattr(train_conditioning, "OVERFIT", 3)
    monkeypatch.setattr(train_scales, "DRAWS", 20)
    words = [f"data={data}", f"bundle={bundle}", f"work={tmp_path}/work", f"out={tmp_path}/page.md"]
    words += ["overfit_steps=1", "steps=1", "cdm_steps=1", "batch=2", "rows=[8,6]", "drawn=8"]
    train_conditioning.main([*words, "held_out=4", "references=4", "sampler_steps=2"])
    text = (tmp_path / "page.md").read_text()
    for title in ("64 examples", "Tokens drawn", "One model for all", "Kinds of Summarizers"):
        assert title in text
    assert "| 1 | 6 |" in text  # scale and training rows
    assert "shuffled conditions raise the loss by" in text  # of networks that have learned nothing
    assert {path.name for path in (tmp_path / "work" / "scales").glob("*-0.png")} >= {
        "alone-0.png", "cnn-0.png", "together-0.png", "vit-0.png",
    }  # fmt: skip
    assert "written to" in capsys.readouterr().out


def test_what_is_missing_or_unknown_is_told():
    with pytest.raises(UserError, match="give data=DIR bundle=DIR"):
        train_conditioning.main([])
    with pytest.raises(UserError, match="overfit, tokens, scales, summarizers"):
        train_conditioning.main(["only=colour"])
