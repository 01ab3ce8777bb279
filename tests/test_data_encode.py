import numpy as np
import pytest
import torch

from raylarge import images, schema, storage
from raylarge.data.prepare import prepare
from raylarge.errors import UserError
from raylarge.models.bundle import load_autoencoder
from raylarge.report import Report
from raylarge.train.ingest import Ingest
from raylarge.train.task import Recipe


@pytest.fixture
def run(tmp_path):
    return lambda config: prepare(config, Report(str(tmp_path / "report.json")))


def rows_of(folder):
    tables = [storage.read_table(path) for path in storage.glob(f"{folder}/*.parquet")]
    assert all(table.schema.metadata[b"raylarge"] == b"latents" for table in tables)
    assert all(table.schema.names == schema.LATENTS.names for table in tables)
    return [row for table in tables for row in table.to_pylist()]


class Doubling:
    """Stands in for an autoencoder: its latent is twice every fourth pixel."""

    digest = "feedfacefeedface"
    sizes: list = []  # noqa: RUF012

    def to(self, device):
        assert device == "cpu"
        return self

    def encode(self, x):
        self.sizes.append(len(x))
        return 2 * x[:, :, ::4, ::4]


def test_each_example_has_its_latent(tiny_prepare, run, monkeypatch):
    monkeypatch.setattr("raylarge.models.bundle.load_autoencoder", lambda path: Doubling())
    Doubling.sizes.clear()
    config = tiny_prepare(verbs="tile,embed,shard,encode", bundle="somewhere")
    done = run(config)["encode"]
    assert done["table"] == f"{config.out}/latents-feedfacefeedface"
    assert set(Doubling.sizes) == {8}
    found = rows_of(done["table"])
    parts = storage.glob(f"{config.out}/examples/*.parquet")
    examples = [row for path in parts for row in storage.read_table(path).to_pylist()]
    assert len(found) == len(examples) == done["rows"] > 30
    for latent, example in zip(found, examples, strict=True):
        x = images.to_float(images.from_bytes(example["image"]))
        expected = (2 * x[:, ::4, ::4]).numpy().astype(np.float16)
        assert (np.array(latent["latent"], np.float16).reshape(3, 16, 16) == expected).all()
        assert latent["grid"] == example["grid"]
        assert all(latent[k] == example[k] for k in ("slide_id", "split", "scale", "row", "column"))


def test_a_part_without_examples_is_encoded_and_trained_on(tiny_prepare, run, tiny_bundle):
    config = tiny_prepare(
        verbs="tile,embed,shard,encode",
        bundle=tiny_bundle,
        tile={"tissue": [0.99, 0.99], "crops": 0, "block_tiles": 12},
        shard={"buckets": 16},
    )
    table = run(config)["encode"]["table"]
    rows = [storage.read_table(path).num_rows for path in storage.glob(f"{table}/*.parquet")]
    assert 0 in rows
    assert sum(rows) > 0
    name = f"latents-{load_autoencoder(tiny_bundle).digest}"
    assert Ingest(config.out, {name: ("latent",)}, Recipe()).facts.latent == (3, 16, 16)


def test_a_bundles_autoencoder_names_the_table(tiny_prepare, run, tiny_bundle):
    config = tiny_prepare(verbs="tile,embed,shard,encode", bundle=tiny_bundle)
    done = run(config)["encode"]
    autoencoder = load_autoencoder(tiny_bundle)
    assert done["table"].endswith(f"latents-{autoencoder.digest}")
    manifest = storage.read_json(f"{config.out}/encode-{autoencoder.digest}.json")
    assert manifest["counts"] == storage.read_json(f"{config.out}/shard.json")["counts"]
    row = rows_of(done["table"])[0]
    part = storage.read_table(storage.glob(f"{config.out}/examples/*.parquet")[0])
    x = images.to_float(images.from_bytes(part["image"][0].as_py()))[None]
    with torch.inference_mode():
        expected = autoencoder.encode(x)[0].numpy()
    assert np.abs(np.array(row["latent"]).reshape(expected.shape) - expected).max() < 0.01
    assert run(config)["encode"]["made"] == 0


@pytest.mark.parametrize("value", [float("nan"), 1e5, float("-inf")])
def test_latents_that_float16_cannot_hold_are_refused(tiny_prepare, run, monkeypatch, value):
    autoencoder = Doubling()
    autoencoder.encode = lambda x: torch.where(x[:, :, ::4, ::4] > 0, value, 0.0)
    monkeypatch.setattr("raylarge.models.bundle.load_autoencoder", lambda path: autoencoder)
    config = tiny_prepare(verbs="tile,embed,shard,encode", bundle="somewhere")
    with pytest.raises(UserError, match=r"latents hold NaN or values beyond float16 among rows 0"):
        run(config)
    assert not storage.glob(f"{config.out}/latents-*/*.parquet")


def test_a_new_autoencoder_means_new_latents_never_new_examples(tiny_prepare, run, monkeypatch):
    autoencoder = Doubling()
    monkeypatch.setattr("raylarge.models.bundle.load_autoencoder", lambda path: autoencoder)
    config = tiny_prepare(verbs="tile,embed,shard,encode", bundle="somewhere")
    run(config)
    autoencoder.digest = "0123456789abcdef"
    done = run(config)
    assert [facts["made"] for facts in done.values()] == [0, 0, 0, done["encode"]["parts"]]
    assert len(storage.glob(f"{config.out}/latents-*")) == 2


def test_encode_needs_examples_and_an_autoencoder(tiny_prepare, run, tmp_path, tiny_bundle):
    with pytest.raises(UserError, match="encode needs bundle="):
        run(tiny_prepare(verbs="encode"))
    with pytest.raises(UserError, match=r"encode needs .*shard\.json; run verbs=shard"):
        run(tiny_prepare(verbs="encode", bundle=tiny_bundle))
    run(tiny_prepare())
    with pytest.raises(UserError, match="there is no bundle at"):
        run(tiny_prepare(verbs="encode", bundle=str(tmp_path / "nothing")))
    with pytest.raises(UserError, match=r"no verb 'paint'; choose among tile, embed"):
        run(tiny_prepare(verbs="paint"))
