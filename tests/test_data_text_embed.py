import shutil

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest

from raylarge import images, schema, storage, tables
from raylarge.data import caption, text_embed
from raylarge.data.caption import CaptionConfig
from raylarge.data.pipeline import ExecutorConfig
from raylarge.data.text_embed import TextEmbedConfig
from raylarge.errors import UserError
from raylarge.models import ssl, text

PLACE = ["slide_id", "scale", "row", "column"]


@pytest.fixture
def data(small_examples, tmp_path):
    return shutil.copytree(small_examples, tmp_path / "data").as_posix()


def examples_of(root):
    return pa.concat_tables(
        storage.read_table(path) for path in storage.children(f"{root}/examples", "*.parquet")
    )


def vectors_of(root, done):
    """The table by its manifest, part by part, and the facts of the manifest."""
    made = tables.manifest(root, done["table"].rsplit("/", 1)[1])
    parts = [storage.read_table(f"{root}/{one['part']}") for one in made["parts"]]
    assert all(part.schema.names == schema.VECTORS.names for part in parts)
    for one, part in zip(made["parts"], parts, strict=True):
        pairs = zip(part["scale"].to_pylist(), part["split"].to_pylist(), strict=True)
        told = [(k, split) for k, split, rows in one["groups"] for _ in range(rows)]
        assert list(pairs) == told
    return pa.concat_tables(parts), made


def matrix(table):
    return np.array(table["vector"].to_pylist(), np.float32)


def wishes(table):
    """A text per row that tells where it lies."""
    rows = table.select(PLACE).to_pylist()
    return [f"tissue at {row['row']} {row['column']}, scale {row['scale']}" for row in rows]


@pytest.fixture
def own_texts(data, tmp_path):
    """A CSV of texts by key, in another order than the examples."""
    table = examples_of(data)
    own = pa.table({"key": table["key"], "note": wishes(table), "text": wishes(table)})
    pa.csv.write_csv(own.sort_by("note"), tmp_path / "texts.csv")
    return str(tmp_path / "texts.csv")


class Seeing:
    """Stands in for a captioner."""

    def caption(self, pixels):
        return [f"a colour of {image[32, 32]}" for image in pixels]


def direct(texts, batch):
    """What the encoder says in padded batches, each of its own."""
    encoder, found = text.load(), []
    for start in range(0, len(texts), batch):
        some = texts[start : start + batch]
        found.append(encoder(some + [some[-1]] * (batch - len(some)))[: len(some)])
    return np.concatenate(found)


def test_captions_become_vectors_in_their_order(data, monkeypatch):
    monkeypatch.setattr("raylarge.models.text.load_captioner", lambda *given: Seeing())
    captioned = caption.run(data, CaptionConfig(scales=[1, 2]), ExecutorConfig())
    done = text_embed.run(data, TextEmbedConfig(batch=5), ExecutorConfig())
    found, made = vectors_of(data, done)
    assert done["width"] == 384
    assert found["vector"].type == pa.list_(pa.float32())
    captions = [storage.read_table(p) for p in storage.children(captioned["table"], "*.parquet")]
    assert found["key"].to_pylist() == [k for part in captions for k in part["key"].to_pylist()]
    wanted = [direct(part["text"].to_pylist(), 5) for part in captions]
    assert np.allclose(matrix(found), np.concatenate(wanted), atol=1e-6)
    assert matrix(found).std(axis=0).max() > 0.01
    assert set(made["counts"]) == {"1", "2"}
    assert text_embed.run(data, TextEmbedConfig(batch=5), ExecutorConfig())["made"] == 0


def test_several_tables_of_captions_are_told_apart(data, monkeypatch):
    with pytest.raises(UserError, match=r"has 0 tables of captions; run verbs=caption first"):
        text_embed.run(data, TextEmbedConfig(), ExecutorConfig())
    monkeypatch.setattr("raylarge.models.text.load_captioner", lambda *given: Seeing())
    one = caption.run(data, CaptionConfig(scales=[2]), ExecutorConfig())["table"].rsplit("/", 1)[1]
    monkeypatch.setattr("raylarge.data.caption.folder_digest", lambda folder: "others")
    other = caption.run(data, CaptionConfig(scales=[1]), ExecutorConfig())["table"].rsplit("/", 1)[
        1
    ]
    with pytest.raises(UserError, match=r"has 2 tables of captions; choose one: .*=captions-"):
        text_embed.run(data, TextEmbedConfig(), ExecutorConfig())
    found = {
        name: text_embed.run(data, TextEmbedConfig(captions=given), ExecutorConfig())
        for name, given in ((one, one), (other, other.removeprefix("captions-")))
    }
    assert set(vectors_of(data, found[one])[0]["scale"].to_pylist()) == {2}
    assert set(vectors_of(data, found[other])[0]["scale"].to_pylist()) == {1}
    with pytest.raises(UserError, match=r"caption-nothing\.json is missing, so there are no capt"):
        text_embed.run(data, TextEmbedConfig(captions="nothing"), ExecutorConfig())


def test_own_texts_are_matched_by_key(data, own_texts):
    done = text_embed.run(data, TextEmbedConfig(texts=own_texts, batch=8), ExecutorConfig())
    found, made = vectors_of(data, done)
    examples = examples_of(data)
    assert found["key"] == examples["key"]
    assert made["rows"] == done["rows"] == examples.num_rows
    assert done["missing"] == 0
    wanted = text.load()(wishes(examples))
    assert np.allclose(matrix(found), wanted, atol=1e-4)
    assert found["split"] == examples["split"]


def test_own_texts_are_matched_by_place(data, own_texts, tmp_path):
    examples = examples_of(data)
    own = examples.select(PLACE).append_column("text", pa.array(wishes(examples)))
    own = own.take(np.random.default_rng(0).permutation(own.num_rows))
    for name, write in (("place.parquet", storage.write_table), ("place.csv", csv)):
        write(str(tmp_path / name), own)
        done = text_embed.run(
            data, TextEmbedConfig(texts=str(tmp_path / name), batch=8), ExecutorConfig()
        )
        by_key = text_embed.run(data, TextEmbedConfig(texts=own_texts, batch=8), ExecutorConfig())
        assert vectors_of(data, done)[0] == vectors_of(data, by_key)[0]


def csv(path, table):
    pa.csv.write_csv(table, path)


def test_examples_without_a_text_are_counted_and_refused_or_left_out(data, tmp_path):
    examples = examples_of(data)
    texts = wishes(examples)
    lost = [i for i in range(len(texts)) if i % 3 == 0 or examples["scale"][i].as_py() == 1]
    for n, i in enumerate(lost):
        texts[i] = (None, "", "  ")[n % 3]
    own = pa.table({"key": examples["key"], "text": texts}).slice(1)
    path = str(tmp_path / "some.parquet")
    storage.write_table(path, own)
    told = (
        rf"has no text for {len(lost)} of {len(texts)} examples \(such as key {examples['key'][0]}"
    )
    with pytest.raises(UserError, match=told):
        text_embed.run(data, TextEmbedConfig(texts=path), ExecutorConfig())
    assert not storage.children(data, "*vectors*")
    assert not storage.children(data, "text_embed*")
    done = text_embed.run(data, TextEmbedConfig(texts=path, missing="drop"), ExecutorConfig())
    found, made = vectors_of(data, done)
    assert done["missing"] == len(lost)
    with pytest.raises(UserError, match=told):
        text_embed.run(data, TextEmbedConfig(texts=path), ExecutorConfig())
    assert (
        text_embed.run(data, TextEmbedConfig(texts=path, missing="drop"), ExecutorConfig())["made"]
        == 0
    )
    assert vectors_of(data, done)[0] == found
    kept = [i for i in range(len(texts)) if i not in lost]
    assert found["key"].to_pylist() == examples["key"].take(kept).to_pylist()
    assert "1" not in made["counts"]
    wanted = text.load()([texts[i] for i in kept])
    assert np.allclose(matrix(found), wanted, atol=1e-4)
    storage.write_table(path, pa.table({"key": pa.array([1], pa.uint64()), "text": ["x"]}))
    with pytest.raises(UserError, match=rf"for {len(texts)} of {len(texts)} .*; add them\.$"):
        text_embed.run(data, TextEmbedConfig(texts=path, missing="drop"), ExecutorConfig())


def test_images_become_vectors_of_a_tile_encoder(data):
    done = text_embed.run(data, TextEmbedConfig(image=True, model="toy", batch=6), ExecutorConfig())
    found, _ = vectors_of(data, done)
    examples = examples_of(data)
    assert found["key"] == examples["key"]
    pixels = np.stack([images.from_bytes(image.as_py()) for image in examples["image"]])
    wanted = ssl.load("toy")(pixels)
    assert np.allclose(matrix(found), wanted, atol=1e-2)
    assert done["width"] == wanted.shape[1]
    base = [i for i, scale in enumerate(examples["scale"].to_pylist()) if scale == 0]
    grids = np.array(examples["grid"].take(base).to_pylist(), np.float32)
    assert np.allclose(matrix(found)[base], grids, atol=1e-2)  # as `embed` saw the same tile
    with pytest.raises(UserError, match="there is no encoder 'minilm'"):
        text_embed.run(data, TextEmbedConfig(image=True), ExecutorConfig())


@pytest.mark.parametrize("kind", [pa.list_(pa.float64()), pa.list_(pa.float16(), 5)])
def test_own_vectors_are_taken_as_they_are(data, tmp_path, kind):
    examples = examples_of(data)
    drawn = np.random.default_rng(0).standard_normal((examples.num_rows, 5)).astype(np.float16)
    own = examples.select(["key"]).append_column("mine", pa.array(drawn.tolist(), kind))
    storage.write_table(str(tmp_path / "own.parquet"), own.take(np.arange(own.num_rows)[::-1]))
    wish = TextEmbedConfig(vectors=f"{tmp_path}/own.parquet:mine")
    done = text_embed.run(data, wish, ExecutorConfig())
    found, _ = vectors_of(data, done)
    assert found["key"] == examples["key"]
    assert (matrix(found) == drawn.astype(np.float32)).all()
    assert done["width"] == 5
    storage.write_table(str(tmp_path / "own.parquet"), own.slice(4))
    with pytest.raises(UserError, match=r"own\.parquet has no vector for 4 of"):
        text_embed.run(data, wish, ExecutorConfig())
    dropped = text_embed.run(
        data, TextEmbedConfig(vectors=wish.vectors, missing="drop"), ExecutorConfig()
    )
    assert dropped["table"] != done["table"]
    assert (matrix(vectors_of(data, dropped)[0]) == drawn[4:].astype(np.float32)).all()


def test_a_part_of_the_rows_leaves_its_own_groups(data, tmp_path):
    """A part of which the user's table knows nothing is an empty part, not a missing one."""
    paths = storage.children(f"{data}/examples", "*.parquet")
    own = storage.read_table(paths[0], ["key"])
    own = own.append_column("v", pa.array([[float(i)] for i in range(own.num_rows)]))
    storage.write_table(str(tmp_path / "v.parquet"), own)
    wish = TextEmbedConfig(vectors=f"{tmp_path}/v.parquet:v", missing="drop")
    done = text_embed.run(data, wish, ExecutorConfig())
    found, made = vectors_of(data, done)
    assert [one["rows"] for one in made["parts"]] == [own.num_rows, *[0] * (len(paths) - 1)]
    assert matrix(found)[:, 0].tolist() == list(range(own.num_rows))
    assert done["width"] == 1


def test_tables_that_do_not_fit_are_refused(data, tmp_path):
    keys = examples_of(data)["key"].to_pylist()
    key = pa.array(keys[:2], pa.uint64())

    def refused(columns, told, column="v", name="t.parquet"):
        path = str(tmp_path / name)
        (storage.write_table if name.endswith(".parquet") else csv)(path, pa.table(columns))
        wish = {"texts": path} if column == "text" else {"vectors": f"{path}:{column}"}
        with pytest.raises(UserError, match=told):
            text_embed.run(data, TextEmbedConfig(**wish, missing="drop"), ExecutorConfig())

    refused({"key": key, "w": [[1.0]] * 2}, r"no column 'v', but key, w\.")
    refused({"slide_id": ["a"], "v": [[1.0]]}, r"give it a column key, or columns slide_id, scale")
    refused({"key": key, "v": [[1.0], [1.0, 2.0]]}, r"vectors of lengths \[1, 2\]")
    refused({"key": key, "v": [[1.0], [float("nan")]]}, r"1 vectors have values that are not fin")
    refused({"key": key, "v": [1.0, 2.0]}, r"holds double, no vectors")
    refused({"key": key, "v": [["a"], ["b"]]}, r"column 'v' holds no numbers")
    refused({"key": [keys[0]] * 2, "v": [[1.0]] * 2}, rf"2 rows or more for the .* key {keys[0]}")
    refused({"key": [-1, 2], "v": [[1.0]] * 2}, r"key do not fit")
    refused({"key": pa.array([None, 3], pa.uint64()), "v": [[1.0]] * 2}, r"empty cells among key")
    refused({"key": key, "words": ["a", "b"]}, r"no column 'text', but key, words", "text", "t.csv")
    refused({"key": key, "text": [[1], [2]]}, r"column 'text' holds no texts", "text")
    refused({"key": ["x", "y"], "text": ["a", "b"]}, r"no CSV table that fits", "text", "t.csv")
    refused({"key": key, "v": ["a", "b"]}, r"vectors come from a \.parquet table", "v", "t.csv")


def test_what_text_embed_refuses(data, tmp_path):
    for wish, told in (
        ({"texts": "a.csv", "image": True}, "takes one of texts and image"),
        ({"captions": "a", "vectors": "b.parquet:c"}, "takes one of captions and vectors"),
        ({"missing": "ignore"}, r"text_embed\.missing=ignore: it must be refuse or drop"),
        ({"batch": 0}, r"batch=0: it must be 1 or more"),
        ({"vectors": "a.parquet"}, r"names no column; give vectors=table\.parquet:column"),
        ({"vectors": "s3://b/a.parquet"}, r"names no column"),
        ({"texts": str(tmp_path / "no.csv")}, r"no\.csv does not exist; check the path"),
    ):
        with pytest.raises(UserError, match=told):
            text_embed.run(data, TextEmbedConfig(**wish), ExecutorConfig())
    with pytest.raises(UserError, match=r"text_embed needs .*shard\.json"):
        text_embed.run(str(tmp_path), TextEmbedConfig(image=True, model="toy"), ExecutorConfig())


def test_other_texts_are_other_vectors(data, own_texts):
    one = text_embed.run(data, TextEmbedConfig(texts=own_texts), ExecutorConfig())
    content = storage.read_bytes(own_texts)
    storage.write_bytes(own_texts, content.replace(b"tissue", b"glands"))
    other = text_embed.run(data, TextEmbedConfig(texts=own_texts), ExecutorConfig())
    assert one["table"] != other["table"]
    assert len(storage.children(data, "vectors-*")) == 2
