import shutil

import numpy as np
import pytest
import test_models_text

from raylarge import config, images, schema, storage, tables
from raylarge.data import caption
from raylarge.data.caption import CaptionConfig
from raylarge.data.pipeline import ExecutorConfig
from raylarge.errors import UserError

blip_folder = test_models_text.blip_folder


@pytest.fixture
def data(small_examples, tmp_path):
    return shutil.copytree(small_examples, tmp_path / "data").as_posix()


class Seeing:
    """Stands in for a captioner: says the colour in the middle of an image."""

    sizes: list = []  # noqa: RUF012

    def caption(self, pixels):
        self.sizes.append(len(pixels))
        return [told(image) for image in pixels]


def told(image):
    return " ".join(map(str, image[32, 32]))


def parts_of(folder):
    return [storage.read_table(path) for path in storage.children(folder, "*.parquet")]


def test_each_example_has_a_sentence_about_its_own_image(data, monkeypatch):
    monkeypatch.setattr("raylarge.models.text.load_captioner", lambda *given: Seeing())
    Seeing.sizes.clear()
    done = caption.run(data, CaptionConfig(batch=5), ExecutorConfig())
    assert set(Seeing.sizes) == {5}
    examples, captions = parts_of(f"{data}/examples"), parts_of(done["table"])
    assert len(captions) == len(examples) > 1
    for one, other in zip(captions, examples, strict=True):
        assert one.schema.names == schema.CAPTIONS.names
        assert one.drop_columns("text") == other.select(one.drop_columns("text").column_names)
        pixels = [images.from_bytes(image.as_py()) for image in other["image"]]
        assert one["text"].to_pylist() == [told(image) for image in pixels]
        assert len(set(one["text"].to_pylist())) > 3
    name = done["table"].rsplit("/", 1)[1]
    made = tables.manifest(data, name)
    shard = storage.read_json(f"{data}/shard.json")
    assert [one["groups"] for one in made["parts"]] == [one["groups"] for one in shard["parts"]]
    assert made["counts"] == shard["counts"]
    assert tables.rows(data, name, split="val").num_rows > 0
    assert caption.run(data, CaptionConfig(batch=5), ExecutorConfig())["made"] == 0


def test_scales_that_are_not_wanted_have_no_captions(data, monkeypatch):
    monkeypatch.setattr("raylarge.models.text.load_captioner", lambda *given: Seeing())
    whole = caption.run(data, CaptionConfig(), ExecutorConfig())
    every = tables.rows(data, whole["table"].rsplit("/", 1)[1])
    some = caption.run(data, CaptionConfig(scales=[0, 2]), ExecutorConfig())
    assert some["table"] != whole["table"]
    assert some["made"] == some["parts"]
    assert tables.rows(data, whole["table"].rsplit("/", 1)[1]) == every
    assert caption.run(data, CaptionConfig(), ExecutorConfig())["made"] == 0
    assert (
        caption.run(data, CaptionConfig(scales=[2, 0, 2]), ExecutorConfig())["table"]
        == some["table"]
    )
    found = tables.rows(data, some["table"].rsplit("/", 1)[1])
    assert set(found["scale"].to_pylist()) == {0, 2}
    wanted = [row for row in every.to_pylist() if row["scale"] != 1]
    assert found.to_pylist() == wanted
    for path in storage.children(some["table"], "*.parquet"):
        facts = tables.manifest(data, some["table"].rsplit("/", 1)[1])["parts"]
        groups = next(one["groups"] for one in facts if path.endswith(one["part"]))
        at = 0
        for index, (scale, split, rows) in enumerate(groups):
            group = storage.read_rows(path, [index])
            assert group.num_rows == rows <= 7
            assert set(group["scale"].to_pylist()) == {scale}
            assert set(group["split"].to_pylist()) == {split}
            at += rows
        assert at == storage.read_table(path).num_rows


def test_blip_describes_the_examples(data, blip_folder, tmp_path):
    setting = CaptionConfig(weights=str(blip_folder), batch=4, scales=[2])
    done = caption.run(data, setting, ExecutorConfig())
    found = tables.rows(data, done["table"].rsplit("/", 1)[1])
    assert found.num_rows == done["rows"] > 0
    words = set(" ".join(found["text"].to_pylist()).split())
    assert words <= set(test_models_text.WORDS)
    moved = shutil.copytree(blip_folder, tmp_path / "elsewhere")
    again = caption.run(
        data, CaptionConfig(weights=str(moved), batch=4, scales=[2]), ExecutorConfig()
    )
    assert (again["table"], again["made"]) == (done["table"], 0)


def test_other_weights_are_another_table(blip_folder, tmp_path):
    folder = shutil.copytree(blip_folder, tmp_path / "other")
    before = caption.folder_digest(str(folder))
    assert before == caption.folder_digest(str(blip_folder)) != ""
    (folder / "notes.md").write_text("nothing that a captioner reads")
    assert caption.folder_digest(str(folder)) == before
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    assert caption.folder_digest(str(folder)) != before
    assert caption.folder_digest("") == ""


def test_captions_of_a_part_do_not_hang_on_the_others(data, monkeypatch):
    monkeypatch.setattr("raylarge.models.text.load_captioner", lambda *given: Seeing())
    done = caption.run(data, CaptionConfig(), ExecutorConfig())
    path = storage.children(done["table"], "*.parquet")[1]
    before = storage.read_bytes(path)
    storage.remove(path)
    assert caption.run(data, CaptionConfig(), ExecutorConfig())["made"] == 1
    assert storage.read_bytes(path) == before


def test_what_caption_refuses(data, blip_folder, tmp_path):
    with pytest.raises(UserError, match=r"caption needs .*shard\.json; run verbs=shard"):
        caption.run(str(tmp_path), CaptionConfig(), ExecutorConfig())
    with pytest.raises(UserError, match=r"caption\.scales=\[1, 5\]: choose among .*\[0, 1, 2\]"):
        caption.run(data, CaptionConfig(scales=[1, 5]), ExecutorConfig())
    with pytest.raises(UserError, match=r"caption\.scales=\[\]"):
        caption.run(data, CaptionConfig(scales=[]), ExecutorConfig())
    with pytest.raises(UserError, match=r"batch=0: it must be 1 or more"):
        caption.run(data, CaptionConfig(batch=0), ExecutorConfig())
    with pytest.raises(UserError, match=r"no captioner 'minilm'; choose one of: blip"):
        caption.run(data, CaptionConfig(model="minilm"), ExecutorConfig())
    with pytest.raises(UserError, match=r"there are no weights at .*nowhere"):
        caption.run(data, CaptionConfig(weights=str(tmp_path / "nowhere")), ExecutorConfig())
    assert not storage.children(data, "caption*")


def test_the_configuration_reads_a_list_of_scales():
    assert config.build(CaptionConfig, {"scales": [0, 2]}).scales == [0, 2]
    assert config.build(CaptionConfig).scales is None
    assert config.plain(CaptionConfig())["scales"] is None
    assert np.isclose(config.build(CaptionConfig, {"gpus": 0.5}).gpus, 0.5)
