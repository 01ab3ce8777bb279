"""The global order of samples: a pure function of seed and index, whatever the world size."""

import numpy as np
import pyarrow as pa
import pytest
import torch
import toy

from raylarge import images, storage
from raylarge.errors import UserError
from raylarge.train.ingest import Ingest, check_batch
from raylarge.train.task import Recipe

RECIPE = Recipe(batch=8, seed=5)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("data"))
    toy.write_latents(folder)
    toy.write_examples(folder)
    return folder


@pytest.mark.parametrize("table", ["latents-0", "examples"])
def test_the_world_size_only_divides_the_work(data, table):
    whole = Ingest(data, table, RECIPE)
    for world_size in (2, 4):
        ingests = [Ingest(data, table, RECIPE) for _ in range(world_size)]
        for step in (0, 7):
            slices = [ingest.batch(step, r, world_size) for r, ingest in enumerate(ingests)]
            expected = whole.batch(step)
            assert slices[0].keys() == expected.keys()
            for name in expected:
                assert torch.equal(torch.cat([part[name] for part in slices]), expected[name])


def test_samples_are_numbered_through_all_steps(data):
    ingest = Ingest(data, "latents-0", RECIPE)
    numbers = torch.cat([ingest.batch(step)["sample"] for step in range(3)])
    assert torch.equal(numbers, torch.arange(24))


def test_the_order_of_parts_does_not_matter(data, tmp_path):
    toy.write_latents(tmp_path)
    manifest = storage.read_json(f"{tmp_path}/encode-0.json")
    storage.write_json(f"{tmp_path}/encode-0.json", {**manifest, "parts": manifest["parts"][::-1]})
    one, other = (Ingest(str(folder), "latents-0", RECIPE) for folder in (data, tmp_path))
    assert one.digest == other.digest
    assert torch.equal(one.batch(3)["latent"], other.batch(3)["latent"])


def test_scales_are_drawn_alike_and_rows_within_them_too(data):
    ingest = Ingest(data, "latents-0", RECIPE)
    rows = np.array([ingest.index(sample) for sample in range(6000)])
    scales = np.bincount(ingest.scale[rows], minlength=3)
    assert np.abs(scales / 6000 - 1 / 3).max() < 0.03
    coarse = np.bincount(rows[ingest.scale[rows] == 2] - 36, minlength=6)
    assert coarse.min() > 0.75 * scales[2] / 6


def test_scale_weights(data):
    ingest = Ingest(data, "latents-0", Recipe(scale_weights=(1.0, 0.0, 3.0)))
    scales = np.bincount([ingest.scale[ingest.index(i)] for i in range(4000)], minlength=3)
    assert scales[1] == 0
    assert abs(scales[2] / 4000 - 0.75) < 0.03
    with pytest.raises(UserError, match="one weight"):
        Ingest(data, "latents-0", Recipe(scale_weights=(1.0,)))


def test_grids_are_padded_and_images_scaled(data):
    ingest = Ingest(data, "examples", RECIPE)
    batch = ingest.batch(0)
    assert ingest.facts.image == (3, 8, 8)
    assert ingest.facts.counts == {0: 6, 1: 4}
    assert batch["grid"].shape == (8, 64, ingest.facts.channels)
    for i in range(8):
        cells = int(batch["grid_rows"][i] * batch["grid_columns"][i])
        assert batch["grid"][i, :cells].abs().min() > 0
        assert batch["grid"][i, cells:].abs().max() == 0
    row = ingest.index(0)
    expected = images.to_float(images.from_bytes(ingest.png[row].as_py()))
    assert torch.equal(batch["image"][0], expected)


def test_other_splits_stay_out(tmp_path):
    toy.write_latents(tmp_path, counts=(4, 4), seed=1)
    toy.write_latents(tmp_path, counts=(3, 3), split="val", seed=2)
    train, held = (Ingest(str(tmp_path), "latents-0", RECIPE, split) for split in ("train", "val"))
    assert (len(train.scale), len(held.scale)) == (8, 6)
    assert not {x.tobytes() for x in train.latent} & {x.tobytes() for x in held.latent}
    with pytest.raises(UserError, match="none of the 6 rows"):
        Ingest(str(tmp_path), "latents-0", RECIPE, "test")


def test_what_does_not_fit_is_refused(data, tmp_path):
    with pytest.raises(UserError, match=r"shard\.json is missing"):
        Ingest(str(tmp_path), "examples", RECIPE)
    toy.write_latents(tmp_path)
    part = f"{tmp_path}/latents-0/train-0.parquet"
    table = storage.read_table(part)
    old = table.replace_schema_metadata({"raylarge": "latents", "version": "0"})
    storage.write_table(part, old)
    with pytest.raises(UserError, match="version 0"):
        Ingest(str(tmp_path), "latents-0", RECIPE)
    storage.write_table(part, table.drop_columns(["grid"]))
    with pytest.raises(UserError, match="has no column grid"):
        Ingest(str(tmp_path), "latents-0", RECIPE)
    odd = table.set_column(
        table.column_names.index("latent"),
        pa.field("latent", pa.list_(pa.float16())),
        pa.array([[0.0] * 47] * table.num_rows, pa.list_(pa.float16())),
    )
    storage.write_table(part, odd)
    with pytest.raises(UserError, match="no squares"):
        Ingest(str(tmp_path), "latents-0", RECIPE)


def test_the_batch_must_divide():
    check_batch(Recipe(batch=12, accumulation=2), world_size=3)
    with pytest.raises(UserError, match="batch=12 does"):
        check_batch(Recipe(batch=10, accumulation=2), world_size=3)
