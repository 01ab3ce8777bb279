"""The global order of samples: a pure function of seed and index, whatever the world size."""

import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
import toy

from raylarge import images, storage, tables
from raylarge.errors import UserError
from raylarge.train import ingest as ingests
from raylarge.train.ingest import Ingest, Label, check_batch, share
from raylarge.train.sequence import DEAL, Sequencer
from raylarge.train.task import Recipe

RECIPE = Recipe(batch=8, seed=5, super_block=2)
LATENTS = {"latents-0": ("latent", "grid")}
EXAMPLES = {"examples": ("image", "grid")}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("data"))
    toy.write_latents(folder)
    toy.write_examples(folder)
    return folder


@pytest.mark.parametrize("columns", [LATENTS, EXAMPLES])
@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_the_world_size_only_divides_the_work(data, columns, world_size):
    whole = Ingest(data, columns, RECIPE)
    workers = [Ingest(data, columns, RECIPE) for _ in range(world_size)]
    for step in (0, 7):
        shares = [share(step, 8, rank, world_size) for rank in range(world_size)]
        assert [sample for some in shares for sample in some] == list(range(8 * step, 8 * step + 8))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        slices = [worker.batch(some) for worker, some in zip(workers, shares, strict=True)]
        expected = whole.batch(range(8 * step, 8 * step + 8))
        assert slices[0].keys() == expected.keys()
        for name in expected:
            assert torch.equal(torch.cat([part[name] for part in slices]), expected[name])


def test_the_order_of_parts_does_not_matter(data, tmp_path):
    toy.write_latents(tmp_path)
    manifest = storage.read_json(f"{tmp_path}/encode-0.json")
    storage.write_json(f"{tmp_path}/encode-0.json", {**manifest, "parts": manifest["parts"][::-1]})
    one, other = (Ingest(str(folder), LATENTS, RECIPE) for folder in (data, tmp_path))
    assert one.digest == other.digest
    assert torch.equal(one.batch(range(9))["latent"], other.batch(range(9))["latent"])


def test_scales_are_drawn_alike():
    order = Sequencer({0: [64] * 100, 2: [7], 3: [64, 3]}, (), 1, 4)
    scales = Counter(order.place(sample).block.scale for sample in range(2 * DEAL))
    assert max(scales.values()) - min(scales.values()) <= 2
    runs = [order.place(sample).block.scale for sample in range(60)]
    assert len({tuple(runs[i : i + 3]) for i in range(0, 60, 3)}) > 6  # dealt, not counted out


def test_within_a_scale_every_row_comes_once_an_epoch():
    sizes = [5, 5, 3, 5, 1, 5, 5]
    order = Sequencer({1: sizes}, (), 3, super_block=2)
    every = {(group, row) for group, rows in enumerate(sizes) for row in range(rows)}
    epochs = []
    for epoch in range(3):
        places = [order.place(epoch * 29 + i) for i in range(29)]
        assert {place.block.epoch for place in places} == {epoch}
        rows = [(place.group, place.row) for place in places]
        assert set(rows) == every
        epochs.append(rows)
        for start, stop in ((0, 2), (2, 4), (4, 6), (6, 7)):  # at most two row groups at a time
            inside = [place.group for place in places if place.block.number == start // 2]
            assert len(set(inside)) == stop - start
    assert epochs[0] != epochs[1] != epochs[2]


def test_rows_are_shuffled_across_the_groups_of_a_super_block():
    order = Sequencer({0: [64] * 40}, (), 3, super_block=8)
    groups = [order.place(sample).group for sample in range(512)]
    assert len(set(groups)) == 8
    assert len(set(groups[:32])) >= 7
    following = order.after(order.place(0).block)
    assert set(order.groups(following)) == {order.place(sample).group for sample in range(512, 999)}


def test_a_far_sample_is_found_at_once(data):
    began = time.monotonic()
    batch = Ingest(data, LATENTS, RECIPE).batch(range(10**12, 10**12 + 8))
    assert time.monotonic() - began < 5
    assert batch["sample"][0] == 10**12


def test_scale_weights(data):
    order = Sequencer({0: [9], 1: [9], 2: [9]}, (1.0, 0.0, 3.0), 0, 4)
    scales = Counter(order.place(sample).block.scale for sample in range(DEAL))
    assert scales == {0: DEAL // 4, 2: 3 * DEAL // 4}
    for wrong in ((1.0,), (0.0, 0.0, 0.0), (1.0, -1.0, 1.0), (1.0, float("inf"), 1.0)):
        with pytest.raises(UserError, match="one weight"):
            Ingest(data, LATENTS, replace(RECIPE, scale_weights=wrong))


def test_a_batch_is_what_the_table_says(data):
    rows = tables.rows(data, "latents-0")
    latents = {tuple(row["latent"]): row for row in rows.to_pylist()}
    source = Ingest(data, LATENTS, RECIPE)
    batch = source.batch(range(40))
    assert source.facts.counts == {0: 24, 1: 12, 2: 6}
    assert (source.facts.channels, source.facts.latent) == (toy.CHANNELS, (3, 4, 4))
    for i in range(40):
        row = latents[tuple(batch["latent"][i].flatten().tolist())]
        assert row["scale"] == batch["scale"][i]
        cells = row["grid_rows"] * row["grid_columns"]
        assert (int(batch["grid_rows"][i]), int(batch["grid_columns"][i])) == (
            row["grid_rows"],
            row["grid_columns"],
        )
        assert batch["grid"][i, :cells].flatten().tolist() == row["grid"]
        assert batch["grid"][i, cells:].abs().max() == 0


def test_images_are_scaled(data):
    rows = tables.rows(data, "examples").to_pylist()
    known = {images.from_bytes(row["image"]).tobytes() for row in rows}
    batch = Ingest(data, {"examples": ("image",)}, RECIPE).batch(range(16))
    assert "grid" not in batch
    assert batch["image"].min() >= -1
    for image in batch["image"]:
        assert images.to_uint8(image[None])[0].tobytes() in known


def test_tables_that_go_together(data, tmp_path):
    """Latents with four flips of each example, beside the examples' images and vectors."""
    with pytest.raises(UserError, match="make both anew"):
        Ingest(data, {"latents-0": ("latent",), "examples": ("image",)}, RECIPE)
    flipped = toy.write_flipped(tmp_path)
    source = Ingest(str(tmp_path), {"latents-0": ("latent",), "examples": ("image",)}, RECIPE)
    batch = source.batch(range(48))
    seen = set()
    for latent, image in zip(batch["latent"], batch["image"], strict=True):
        key, flip = int(latent[0, 0, 0]), int(latent[1, 0, 0])
        picture = flipped[key][:: -1 if flip & 2 else 1, :: -1 if flip & 1 else 1]
        assert np.array_equal(images.to_uint8(image[None])[0], picture)
        seen.add(flip)
    assert seen == {0, 1, 2, 3}


def test_labels_become_classes(tmp_path):
    toy.write_examples(tmp_path, counts=(6,), labels=lambda i: [("grade", "ab"[i % 2])])
    label = Label("grade", ("a", "b"))
    source = Ingest(str(tmp_path), {"examples": ("image",)}, RECIPE, label=label)
    assert source.facts.classes == ("a", "b")
    assert set(source.batch(range(12))["label"].tolist()) == {0, 1}
    source = Ingest(str(tmp_path), {"examples": ("image",)}, RECIPE, label=Label("grade", ("a",)))
    with pytest.raises(UserError, match="grade='b', which is none of a"):
        source.batch(range(12))


def test_other_splits_and_scales_stay_out(tmp_path):
    toy.write_latents(tmp_path, counts=(4, 4), seed=1)
    toy.write_latents(tmp_path, counts=(3, 3), split="val", seed=2)
    train, held = (Ingest(str(tmp_path), LATENTS, RECIPE, split) for split in ("train", "val"))
    drawn = [
        {latent.numpy().tobytes() for latent in source.batch(range(60))["latent"]}
        for source in (train, held)
    ]
    assert [len(some) for some in drawn] == [8, 6]
    assert not drawn[0] & drawn[1]
    with pytest.raises(UserError, match="none of the 6 rows"):
        Ingest(str(tmp_path), LATENTS, RECIPE, "test")
    coarse = Ingest(str(tmp_path), LATENTS, RECIPE, scales=(1,))
    assert set(coarse.batch(range(20))["scale"].tolist()) == {1}
    with pytest.raises(UserError, match="scale 5 has no row of the split 'train'"):
        Ingest(str(tmp_path), LATENTS, RECIPE, scales=(1, 5))


def test_only_what_is_needed_is_held(data, monkeypatch):
    monkeypatch.setattr(ingests, "CACHE_BYTES", 0)
    source = Ingest(data, LATENTS, replace(RECIPE, super_block=1))
    for step in range(40):
        source.batch(share(step, 8, 0, 1))
        held = sum(group.rows for group in source._cache._found)
        assert held <= 3 * 4 * toy.GROUP  # of each scale the blocks in use and those that follow


def test_what_does_not_fit_is_refused(data, tmp_path):
    with pytest.raises(UserError, match=r"shard\.json is missing"):
        Ingest(str(tmp_path), EXAMPLES, RECIPE)
    toy.write_latents(tmp_path)
    part = f"{tmp_path}/latents-0/train-0.parquet"
    table = storage.read_table(part)
    sizes = [toy.GROUP] * 2 + [2, toy.GROUP, 1, 3]
    old = table.replace_schema_metadata({"raylarge": "latents", "version": "0"})
    storage.write_table(part, old, sizes)
    with pytest.raises(UserError, match="version 0"):
        Ingest(str(tmp_path), LATENTS, RECIPE)
    storage.write_table(part, table.drop_columns(["grid"]), sizes)
    with pytest.raises(UserError, match="has no column grid"):
        Ingest(str(tmp_path), LATENTS, RECIPE)
    odd = table.set_column(
        table.column_names.index("latent"),
        pa.field("latent", pa.list_(pa.float16())),
        pa.array([[0.0] * 47] * table.num_rows, pa.list_(pa.float16())),
    )
    storage.write_table(part, odd, sizes)
    with pytest.raises(UserError, match="not of one shape"):
        Ingest(str(tmp_path), LATENTS, RECIPE)


def test_every_worker_needs_a_sample():
    check_batch(Recipe(batch=3), world_size=3)
    with pytest.raises(UserError, match="batch=4 or more"):
        check_batch(Recipe(batch=3), world_size=4)
