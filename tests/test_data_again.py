"""Runs over what already stands: other settings, other labels, interruptions in between."""

from pathlib import Path

import numpy as np
import pytest

from raylarge import images, storage, tables
from raylarge.data.embed import EmbedStage
from raylarge.data.parts import PartBuilder
from raylarge.data.pipeline import ExecutorConfig, _Runner, _runs
from raylarge.data.prepare import prepare
from raylarge.data.units import Unit
from raylarge.errors import UserError
from raylarge.report import Report


@pytest.fixture
def run(tmp_path):
    return lambda config: prepare(config, Report(str(tmp_path / "report.json")))


class Interrupted(Exception):
    pass


@pytest.fixture
def interrupted(monkeypatch):
    """Lets so many parts be made and then stops the run."""

    def after(count, work):
        left, call = [count], PartBuilder.__call__

        def counted(self, unit):
            if not left[0]:
                raise KeyboardInterrupt
            facts = call(self, unit)
            left[0] -= facts["made"]
            return facts

        with monkeypatch.context() as patch:
            patch.setattr(PartBuilder, "__call__", counted)
            with pytest.raises(KeyboardInterrupt):
                work()

    return after


def contents(root):
    found = {p.relative_to(root): p.read_bytes() for p in Path(root).rglob("*") if p.is_file()}
    return {name: found[name] for name in sorted(found) if name.name != "report.json"}


def table(tmp_path, grade):
    path = tmp_path / "slides.csv"
    path.write_text(f"slide,grade\ntiny,{grade}\n")
    return {"table": str(path), "labels": ["grade"]}


def test_labels_that_change_and_change_back_leave_no_trace(
    tiny_prepare, run, interrupted, tmp_path
):
    config = tiny_prepare(tile=table(tmp_path, 1))
    done = run(config)
    before = contents(config.out)
    assert dict(tables.rows(config.out, "examples")["labels"][0].as_py()) == {"grade": "1"}
    tiny_prepare(tile=table(tmp_path, 2))
    interrupted(7, lambda: run(config))  # the tiles, four blocks, and two buckets of three
    with pytest.raises(UserError, match=r"shard\.json is missing"):
        tables.rows(config.out, "examples")  # half of it is of another grade
    tiny_prepare(tile=table(tmp_path, 1))
    again = run(config)
    assert contents(config.out) == before
    assert again["embed"]["made"] == 0  # embeddings know no labels
    assert again["shard"]["made"] == 2 < done["shard"]["parts"]


def test_a_part_of_another_making_is_not_read(tiny_prepare, run, tmp_path):
    config = tiny_prepare()
    run(config)
    other = tiny_prepare(out=f"{tmp_path}/other", embed={"batch": 16})
    run(other)
    part = storage.read_json(f"{config.out}/shard.json")["parts"][0]["part"]
    storage.write_bytes(f"{config.out}/{part}", storage.read_bytes(f"{other.out}/{part}"))
    with pytest.raises(UserError, match="was made anew since its table was whole"):
        tables.rows(config.out, "examples")


def test_latents_with_flips_do_not_replace_those_without(tiny_prepare, run, tiny_bundle):
    config = tiny_prepare(verbs="tile,embed,shard,encode", bundle=tiny_bundle)
    run(config)
    before = contents(config.out)
    flips = tiny_prepare(verbs="encode", bundle=tiny_bundle, encode={"flips": True})
    with pytest.raises(UserError, match=r"encode\.flips=False, not True"):
        run(flips)
    assert contents(config.out) == before


def test_flips_turn_images_and_grids_alike(tiny_prepare, run, monkeypatch):
    class Same:
        """An autoencoder whose latent is every fourth pixel."""

        digest = "feedfacefeedface"

        def to(self, _):
            return self

        def encode(self, x):
            return x[:, :, ::4, ::4]

    monkeypatch.setattr("raylarge.models.bundle.load_autoencoder", lambda path: Same())
    config = tiny_prepare(
        verbs="tile,embed,shard,encode", bundle="somewhere", encode={"flips": True, "batch": 8}
    )
    done = run(config)["encode"]
    examples = tables.rows(config.out, "examples").to_pylist()
    rows = tables.rows(config.out, "latents-feedfacefeedface").to_pylist()
    assert done["rows"] == len(rows) == 4 * len(examples)
    for i, row in enumerate(rows):
        example, flip = examples[i // 4], i % 4
        assert (row["key"], row["flip"]) == (example["key"], flip)
        axes = [axis for axis, bit in ((1, 1), (0, 2)) if flip & bit]
        image = np.flip(images.from_bytes(example["image"]), axes)
        expected = images.to_float(np.ascontiguousarray(image))[:, ::4, ::4].numpy()
        assert (np.array(row["latent"], "f2").reshape(3, 16, 16) == expected.astype("f2")).all()
        side = example["grid_rows"]
        grid = np.flip(np.array(example["grid"]).reshape(side, side, -1), axes)
        assert (np.array(row["grid"]).reshape(side, side, -1) == grid).all()
    groups = storage.read_json(done["output"])["parts"][0]["groups"]
    assert all(count % 4 == 0 for _, _, count in groups)


def test_a_slide_whose_split_changes_is_covered_anew(tiny_prepare, run, tmp_path):
    """A band rejects what crosses its edge; a whole slide does not: more tiles are covered."""
    path = tmp_path / "slides.csv"
    path.write_text("slide,split\ntiny,band\n")
    tile = {"table": str(path), "split": "patient", "tissue": [0.0], "scales": [0, 2], "crops": 0}
    config = tiny_prepare(tile=tile)
    run(config)
    path.write_text("slide,split\ntiny,train\n")
    run(config)
    alone = tiny_prepare(tile=tile, out=f"{tmp_path}/alone")
    run(alone)
    assert contents(config.out) == contents(alone.out)
    grids = tables.rows(config.out, "examples", columns=["grid"])["grid"]
    assert all(np.abs(grid.values.to_numpy()).sum() > 0 for grid in grids)


def test_a_run_that_fails_leaves_the_names_of_the_others(tiny_prepare, run, tmp_path, tiny_slide):
    config = tiny_prepare(verbs="tile")
    run(config)
    before = storage.read_json(f"{config.out}/names.json")
    (tmp_path / "broken.svs").write_bytes(b"x")
    with pytest.raises(UserError):
        run(tiny_prepare(verbs="tile", slides=str(tmp_path / "broken.svs")))
    assert before.items() <= storage.read_json(f"{config.out}/names.json").items()
    assert run(tiny_prepare(verbs="embed"))["embed"]["made"] == 4
    storage.remove(f"{config.out}/names.json")
    with pytest.raises(UserError, match=r"names\.json does not say .* run verbs=tile with slides="):
        run(tiny_prepare(verbs="embed"))


def test_a_store_that_fails_is_no_bad_slide(tiny_prepare, run, monkeypatch):
    config = tiny_prepare(on_error="skip")
    run(tiny_prepare(verbs="tile,embed"))
    read = storage.read_table

    def fails(path, *more):
        if "embeddings/" in path:
            raise UserError(f"{path}: the store is away; try again.")
        return read(path, *more)

    monkeypatch.setattr(storage, "read_table", fails)
    with pytest.raises(UserError, match="the store is away"):
        run(config)
    assert not storage.exists(f"{config.out}/shard.json")


def test_only_slides_are_skipped():
    class Dying:
        def __call__(self, unit):
            from raylarge.errors import SlideError

            raise SlideError("slide x is damaged")

    from raylarge.data import pipeline

    slide, bucket = Unit(part="a", slide_id="x"), Unit(part="b")
    (facts,) = pipeline.run([slide], Dying, ExecutorConfig(skip=True), "some")
    assert facts == {"failed": "slide x is damaged"}
    with pytest.raises(UserError, match="slide x is damaged"):
        pipeline.run([bucket], Dying, ExecutorConfig(skip=True), "some")
    assert _Runner(Dying).answer(0, bucket)["failed"]


def test_blocks_of_a_slide_go_together_as_long_as_all_have_work():
    units = [Unit(slide_id=f"s{i // 40}", part=str(i)) for i in range(120)]
    for workers, longest in ((1, 8), (2, 7), (64, 1)):
        runs = _runs(units, workers)
        assert [index for one in runs for index, _ in one] == list(range(120))
        assert max(map(len, runs)) == longest
        assert all(len({unit.slide_id for _, unit in one}) == 1 for one in runs)
    assert [len(one) for one in _runs([Unit(part=str(i)) for i in range(50)], 1)] == [1] * 50


def test_values_beyond_half_precision_are_refused(tiny_prepare, run, monkeypatch):
    def huge(self, tiles):
        return np.full((len(tiles), 32), np.inf, np.float16)

    monkeypatch.setattr("raylarge.models.ssl.Encoder.__call__", huge)
    with pytest.raises(UserError, match=r"embed\.encoder=toy gives values beyond float16"):
        run(tiny_prepare(verbs="tile,embed"))
    assert EmbedStage.kind.field("embedding").type.value_type == "halffloat"


def test_a_padded_band_has_its_rows_at_the_slides_lower_edge(tiny_prepare, run):
    config = tiny_prepare(tile={"border": "pad", "val_fraction": 0.25, "tissue": [0.0]})
    counts = run(config)["tile"]["counts"]
    assert all(counts["0"][split] > 10 for split in ("train", "val"))


def test_the_salt_is_told_to_nobody_and_another_is_noticed(tiny_prepare, run):
    config = tiny_prepare(verbs="tile", tile={"salt": "mine"})
    run(config)
    made = "".join(storage.read_bytes(p).decode() for p in storage.children(config.out, "*.json"))
    assert "mine" not in made
    with pytest.raises(UserError, match=r"tile\.salt="):
        run(tiny_prepare(verbs="tile", tile={"salt": "yours"}))


@pytest.mark.s3
def test_a_store_that_fails_while_slides_are_listed_redoes_nothing(
    tiny_prepare, run, s3_bucket, tiny_slide, monkeypatch
):
    slide = f"{s3_bucket}/again/tiny.tif"
    storage.write_bytes(slide, Path(tiny_slide).read_bytes())
    config = tiny_prepare(slides=slide, verbs="tile", on_error="skip")
    run(config)
    before = contents(config.out)

    def away(path, *_):
        raise UserError(f"{path}: the store is away; try again.")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "read_range", away)
        with pytest.raises(UserError, match="the store is away"):
            run(config)
    assert contents(config.out) == before
    assert run(config)["tile"]["made"] == 0
