"""A user's own table, larger than a worker's memory or with holes."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
import test_data_text_embed
from test_data_text_embed import examples_of, matrix, vectors_of

from raylarge import storage
from raylarge.data import text_embed, user_table_rows
from raylarge.data.pipeline import ExecutorConfig
from raylarge.data.text_embed import TextEmbedConfig
from raylarge.data.user_table import UserTable
from raylarge.errors import UserError

data = test_data_text_embed.data
own_texts = test_data_text_embed.own_texts


def own_vectors(data, path, rows_per_group, order=None, width=4):
    """A vector for every example, in some order, in row groups of some rows; and the vectors."""
    examples = examples_of(data)
    drawn = np.random.default_rng(0).standard_normal((examples.num_rows, width)).astype("f4")
    own = examples.select(["key"]).append_column("v", pa.array(list(drawn)))
    own = own if order is None else own.take(order)
    whole, rest = divmod(own.num_rows, rows_per_group)
    storage.write_table(str(path), own, [rows_per_group] * whole + [rest] * (rest > 0))
    return drawn


def test_a_large_table_is_read_by_row_groups(data, tmp_path, monkeypatch):
    drawn = own_vectors(data, tmp_path / "v.parquet", 10)
    examples = examples_of(data)
    user_table = UserTable(str(tmp_path / "v.parquet"), "v", vectors=True)
    size = max(user_table._row_groups.sizes)
    monkeypatch.setattr(user_table_rows, "COLUMN_BYTES", size)
    groups, read = [], storage.read_rows

    def counted(path, wanted, columns=None):
        if "v" in (columns or ()):
            groups.extend(wanted)
        return read(path, wanted, columns)

    monkeypatch.setattr(storage, "read_rows", counted)
    user_table = UserTable(str(tmp_path / "v.parquet"), "v", vectors=True)
    assert groups == []  # the footer says that no vector is empty
    rows = user_table.find(examples["key"].slice(12, 15))
    assert (user_table.vectors(rows[::-1]) == drawn[12:27][::-1]).all()
    assert set(groups) <= {0, 1, 2} | {int(user_table._rows[0]) // 10}
    assert len(user_table._cache) == 1
    done = text_embed.run(
        data, TextEmbedConfig(vectors=f"{tmp_path}/v.parquet:v"), ExecutorConfig()
    )
    assert (matrix(vectors_of(data, done)[0]) == drawn).all()


def test_tables_that_no_worker_can_hold_are_refused(data, own_texts, tmp_path, monkeypatch):
    count = examples_of(data).num_rows
    own_vectors(data, tmp_path / "one.parquet", count)
    mixed = np.random.default_rng(1).permutation(count)
    own_vectors(data, tmp_path / "mixed.parquet", 2, mixed)
    monkeypatch.setattr(user_table_rows, "COLUMN_BYTES", 1000)
    monkeypatch.setattr("raylarge.data.user_table._READ_TWICE", 0)
    for wish, told in (
        ({"vectors": f"{tmp_path}/one.parquet:v"}, r"a row group with 0\.0 GB of v; write it with"),
        ({"vectors": f"{tmp_path}/mixed.parquet:v"}, r"would be read \d+ times, for its rows lie"),
        ({"texts": own_texts}, r"texts\.csv has 0\.0 GB; save it as \.parquet"),
    ):
        with pytest.raises(UserError, match=told):
            text_embed.run(data, TextEmbedConfig(**wish), ExecutorConfig())
    assert not storage.children(data, "text_embed*")


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.list_(pa.float32(), 2)])
def test_empty_vectors_say_nothing(data, tmp_path, kind):
    examples = examples_of(data)
    cells = [[float(i), 1.0] for i in range(examples.num_rows)]
    cells[3] = None
    if kind == pa.list_(pa.float32()):
        cells[5] = []
    own = examples.select(["key"]).append_column("v", pa.array(cells, kind))
    storage.write_table(str(tmp_path / "v.parquet"), own, [4] * 2 + [own.num_rows - 8])
    lost = sum(not cell for cell in cells)
    wish = TextEmbedConfig(vectors=f"{tmp_path}/v.parquet:v")
    with pytest.raises(UserError, match=rf"has no vector for {lost} of"):
        text_embed.run(data, wish, ExecutorConfig())
    done = text_embed.run(data, replace(wish, missing="drop"), ExecutorConfig())
    assert done["missing"] == lost
    assert matrix(vectors_of(data, done)[0]).tolist() == [cell for cell in cells if cell]


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_words_for_no_value_are_no_texts_and_are_counted(data, tmp_path, ending, capsys):
    examples = examples_of(data)
    texts = [f"tissue {i}" for i in range(examples.num_rows)]
    texts[3:8] = ["NA", " n/a", None, "None", "-"]
    own = examples.select(["key"]).append_column("text", pa.array(texts))
    path = tmp_path / f"texts.{ending}"
    if ending == "csv":
        pa.csv.write_csv(own, path)
    else:
        storage.write_table(str(path), own, [own.num_rows])
    done = text_embed.run(data, TextEmbedConfig(texts=str(path), missing="drop"), ExecutorConfig())
    assert done["missing"] == 5
    count = examples.num_rows
    line = rf"texts.{ending}: 4 of {count} cells of 'text' say -, NA, None, n/a and count as empty"
    assert line in capsys.readouterr().out
    found = vectors_of(data, done)[0]["key"].to_pylist()
    assert found == [*examples["key"].to_pylist()[:3], *examples["key"].to_pylist()[8:]]


def test_a_doubled_column_of_texts_is_refused(data, tmp_path):
    (tmp_path / "t.csv").write_text("key,text,text\n1,a,b\n")
    with pytest.raises(UserError, match=r"t\.csv has the column 'text' twice; keep one"):
        text_embed.run(data, TextEmbedConfig(texts=f"{tmp_path}/t.csv"), ExecutorConfig())


def test_a_table_that_was_matched_is_not_matched_again(data, tmp_path, monkeypatch):
    own_vectors(data, tmp_path / "v.parquet", 10)
    wish = TextEmbedConfig(vectors=f"{tmp_path}/v.parquet:v")
    done = text_embed.run(data, wish, ExecutorConfig())
    monkeypatch.setattr(text_embed, "UserTable", None)
    again = text_embed.run(data, wish, ExecutorConfig())
    dropping = text_embed.run(data, replace(wish, missing="drop"), ExecutorConfig())
    assert again["made"] == dropping["made"] == again["missing"] == 0
    assert again["table"] == dropping["table"] == done["table"]
