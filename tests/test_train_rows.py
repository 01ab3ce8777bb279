"""Tables that a training reads: damaged, of other kinds or of another shape is a sentence."""

import numpy as np
import pyarrow as pa
import pytest
import toy

from raylarge import images, schema, storage, tables
from raylarge.errors import UserError
from raylarge.models import bundle as bundles
from raylarge.train import registry
from raylarge.train.ingest import Ingest
from raylarge.train.launch import Train
from raylarge.train.task import Recipe

LATENTS, EXAMPLES = {"latents-0": ("latent", "grid")}, {"examples": ("image", "grid")}
RECIPE = Recipe(batch=4, super_block=2)


def swapped(name, kind, make):
    """A column in the place of another."""

    def change(table):
        values = pa.array([make(value) for value in table[name].to_pylist()], kind)
        return table.set_column(table.column_names.index(name), pa.field(name, kind), values)

    return change


def no_image(_):
    return b"no image"


def cut(content):
    return content[: len(content) // 2]


def larger(_):
    return images.png_bytes(np.zeros((9, 8, 3), np.uint8))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (swapped("image", pa.int64(), lambda _: 3), r"examples/train-0\.parquet does not fit"),
        (swapped("image", pa.null(), lambda _: None), "has rows without image"),
        (swapped("image", pa.binary(), no_image), "the image of row .* is damaged"),
        (swapped("image", pa.binary(), cut), "the image of row .* is damaged"),
        (swapped("image", pa.binary(), larger), "8x9 pixels, not 8x8"),
        (swapped("grid", pa.string(), lambda _: "a"), "does not fit"),
        (swapped("grid_rows", pa.string(), lambda _: "a"), "does not fit"),
        (swapped("grid_rows", pa.int32(), lambda _: 3), "not as large as they say"),
        (swapped("grid_columns", pa.int32(), lambda _: 0), "not as large as they say"),
        (swapped("grid", pa.list_(pa.float16()), lambda _: []), "not as large as they say"),
        (lambda table: table.slice(0, 3), "rows, not the"),
    ],
)
def test_damaged_rows_are_a_sentence(tmp_path, change, said):
    toy.write_examples(tmp_path)
    part = f"{tmp_path}/examples/train-0.parquet"
    changed = change(storage.read_table(part)).replace_schema_metadata(schema.EXAMPLES.metadata)
    storage.write_table(part, changed, [2, 1] if len(changed) == 3 else [3, 2])
    manifest = storage.read_json(f"{tmp_path}/shard.json")
    manifest["parts"][0]["groups"] = [[0, "train", 3], [1, "train", 2]]
    storage.write_json(f"{tmp_path}/shard.json", manifest)
    with pytest.raises(UserError, match=said):
        Ingest(str(tmp_path), EXAMPLES, RECIPE).batch(range(64))


def test_parts_of_another_latent_or_encoder_do_not_mix(tmp_path):
    toy.write_latents(tmp_path)
    path = f"{tmp_path}/encode-0.json"
    manifest = storage.read_json(path)
    manifest["parts"][1]["shape"] = [12, 2, 2]
    storage.write_json(path, manifest)
    with pytest.raises(UserError, match="latents of several shapes"):
        Ingest(str(tmp_path), LATENTS, RECIPE)


def test_latents_that_the_autoencoder_does_not_make_are_refused(tiny_bundle, tmp_path):
    toy.write_latents(tmp_path, name=f"latents-{bundles.digest(tiny_bundle, ('vae',))}")
    config = Train(model="ldm", data=str(tmp_path), out=tiny_bundle)
    with pytest.raises(UserError, match=r"of shape \(3, 4, 4\), the autoencoder .* makes \(3, 2"):
        registry.build(config.run, registry.source(config.run).facts)


def lacking(*keys):
    def change(made):
        inner = made
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]
        return made

    return change


def put(value, *keys):
    def change(made):
        inner = made
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        return made

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda made: [], "does not list the parts"),
        (lambda made: None, "does not list the parts"),
        (lambda made: made | {"parts": None}, "does not list the parts"),
        (lacking("parts", 0, "part"), "does not list the parts"),
        (lacking("digest"), "lacks digest"),
        (lacking("patch_px"), "lacks patch_px"),
        (lambda made: made | {"patch_px": "x"}, "lacks patch_px"),
        (lambda made: made | {"encoder": None}, "lacks encoder"),
        (lacking("parts", 0, "groups"), "lacks groups of latents-0/train-0.parquet"),
        (lacking("parts", 0, "groups", 0, 2), "lacks groups"),
        (put(3, "parts", 0, "groups", 0), "lacks groups"),
        (put("0", "parts", 0, "groups", 0, 0), "lacks groups"),
        (put("x", "parts", 0, "groups", 0, 2), "lacks groups"),
    ],
)
def test_a_manifest_that_is_not_whole_is_a_sentence(tmp_path, change, said):
    toy.write_latents(tmp_path)
    path = f"{tmp_path}/encode-0.json"
    storage.write_json(path, change(storage.read_json(path)))
    with pytest.raises(UserError, match=said):
        Ingest(str(tmp_path), LATENTS, RECIPE)


def test_a_row_group_of_no_rows_is_passed_over(tmp_path):
    toy.write_latents(tmp_path)
    path = f"{tmp_path}/encode-0.json"
    manifest = storage.read_json(path)
    manifest["parts"][0]["groups"].append([2, "train", 0])
    storage.write_json(path, manifest)
    ingest = Ingest(str(tmp_path), LATENTS, RECIPE)
    assert ingest.facts.counts == {0: 24, 1: 12, 2: 6}
    assert len(ingest.batch(range(200))["sample"]) == 200


def test_tables_read_whole_have_kinds_too(tmp_path):
    toy.write_latents(tmp_path)
    part = f"{tmp_path}/latents-0/train-0.parquet"
    table = swapped("latent", pa.string(), lambda _: "a")(storage.read_table(part))
    storage.write_table(part, table.replace_schema_metadata(schema.LATENTS.metadata))
    with pytest.raises(UserError, match=r"train-0\.parquet does not fit"):
        tables.rows(str(tmp_path), "latents-0")
