"""Random tables of texts and vectors of examples: each at its own key, or a refusal."""

import csv
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mutations import TEXTS, Refused, outcome, pick

from raylarge.data.user_table import UserTable

MISSING = ["", "NA", "nan", "None", " ", "-", "#N/A"]
WORDS = [word for word in TEXTS if word not in ("null", "-", "") and "\udcff" not in word]


def keys_of(rng, count):
    keys = rng.integers(0, 1 << 64, count - 1, dtype=np.uint64, endpoint=False)
    return [*dict.fromkeys(keys.tolist()), (1 << 64) - 1]


def as_csv(rng, columns, lines):
    sink = io.StringIO(newline="")
    writer = csv.writer(sink, lineterminator=pick(rng, ["\n", "\r\n"]))
    writer.writerows([columns, *lines])
    return sink.getvalue()


def answer(path, column, keys, vectors=False):
    """What a table says of some examples; None where it says nothing."""
    user_table = UserTable(str(path), column, vectors)
    rows = user_table.find(pa.chunked_array([pa.array(keys, pa.uint64())]))
    read = (
        (lambda row: user_table.vectors(row)[0].tolist())
        if vectors
        else (lambda row: user_table.texts(row)[0])
    )
    return [read(rows[i : i + 1]) if row >= 0 else None for i, row in enumerate(rows)]


@pytest.mark.parametrize("seed", range(25))
def test_a_text_is_of_its_own_example(tmp_path, seed):
    rng = np.random.default_rng([61, seed])
    keys = keys_of(rng, int(rng.integers(3, 12)))
    texts = [pick(rng, [pick(rng, WORDS), pick(rng, WORDS), pick(rng, MISSING)]) for _ in keys]
    columns = rng.permutation(["key", "text", "more"]).tolist()
    cells = {"key": keys, "text": texts, "more": ["x"] * len(keys)}
    order = rng.permutation(len(keys))
    if rng.random() < 0.5:
        path = tmp_path / "t.csv"
        lines = [[cells[name][i] for name in columns] for i in order]
        path.write_bytes(as_csv(rng, columns, lines).encode(pick(rng, ["utf-8", "utf-8-sig"])))
    else:
        path = tmp_path / "t.parquet"
        table = pa.table({"key": pa.array(keys, pa.uint64()), "text": texts}).take(order)
        pq.write_table(table, path, row_group_size=int(rng.integers(1, 9)))
    expected = [None if text in MISSING else text for text in texts]
    assert outcome(lambda: answer(path, "text", [*keys, 5])) == [*expected, None]


@pytest.mark.parametrize("seed", range(20))
def test_a_vector_is_of_its_own_example(tmp_path, seed):
    rng = np.random.default_rng([62, seed])
    keys = keys_of(rng, int(rng.integers(3, 12)))
    vectors = rng.integers(-1000, 1000, (len(keys), 3)).tolist()
    item = pick(rng, [pa.float16(), pa.float32(), pa.float64(), pa.int16(), pa.int64()])
    kind = pick(rng, [pa.list_(item), pa.list_(item, 3), pa.large_list(item)])
    vectors = [one if rng.random() < 0.8 else None for one in vectors]
    cells = [np.array(v, item.to_pandas_dtype()) if v else None for v in vectors]
    table = pa.table({"v": pa.array(cells, kind), "key": pa.array(keys, pa.uint64())})
    order = rng.permutation(len(keys))
    pq.write_table(table.take(order), tmp_path / "v.parquet", row_group_size=4)
    assert outcome(lambda: answer(tmp_path / "v.parquet", "v", keys, vectors=True)) == vectors


FAULTS = [
    ("key,text,text\n1,a,b\n", "'text' twice"),
    ("key,key,text\n1,2,a\n", "'key' twice"),
    ("key,text\n1,a\n1,b\n", "2 rows or more for the example of key 1"),
    ('key,text\n1,"a\n2,b\n', "no CSV table"),
    ('key,text\n1,"a" b\n2,b\n', "no CSV table"),
    ("key,text\n1,a\n2\n", "no CSV table"),
    ("key,text\n1,a, b\n", "no CSV table"),
    ("key,text\n-1,a\n", "no CSV table"),
    ("key,text\n1.0,a\n", "no CSV table"),
    ("key,text\n1e3,a\n", "no CSV table"),
    ("key,text\n1_000,a\n", "no CSV table"),
    (f"key,text\n{1 << 64},a\n", "no CSV table"),
    ("key,text\n,a\n", "empty cells"),
    ("key;text\n1;a\n", "no column 'text'"),
    ("Key,text\n1,a\n", "which example"),
    ("slide_id,scale,row,text\ns,0,1,a\n", "which example"),
    ("slide_id,scale,row,column,text\ns,0,one,2,a\n", "no CSV table"),
    ("", "no CSV table"),
]


@pytest.mark.parametrize("fault", range(len(FAULTS)))
def test_a_table_of_texts_with_one_fault_is_refused_for_it(tmp_path, fault):
    content, words = FAULTS[fault]
    (tmp_path / "t.csv").write_text(content)
    assert outcome(lambda: answer(tmp_path / "t.csv", "text", [1, 2])) == Refused("t.csv", words)


VECTORS = [
    ([[1.0, 2.0], [3.0]], "lengths [1, 2]"),
    ([[1.0, np.nan], [3.0, 4.0]], "1 vectors have values that are not finite"),
    ([[1.0, np.inf], [3.0, -np.inf]], "vectors have values that are not finite"),
    ([[1.0, None], [3.0, 4.0]], "1 vectors have values that are not finite"),
    ([[1e39, 0.0], [3.0, 4.0]], "1 vectors have values that are not finite"),
    ([["a"], ["b"]], "no numbers"),
    ([[[1.0]], [[2.0]]], "no numbers"),
    ([1.0, 2.0], "no vectors"),
    (["[1, 2]", "[3, 4]"], "no vectors"),
]


@pytest.mark.parametrize("fault", range(len(VECTORS)))
def test_vectors_with_one_fault_are_refused_for_it(tmp_path, fault):
    cells, words = VECTORS[fault]
    table = pa.table({"key": pa.array([1, 2], pa.uint64()), "v": cells})
    pq.write_table(table, tmp_path / "v.parquet")
    refused = Refused("v.parquet", words)
    assert outcome(lambda: answer(tmp_path / "v.parquet", "v", [1, 2], vectors=True)) == refused


def test_a_column_twice_in_parquet_is_refused(tmp_path):
    arrays = [pa.array([1, 2], pa.uint64()), pa.array(["a", "b"]), pa.array(["x", "y"])]
    table = pa.Table.from_arrays(arrays, ["key", "text", "text"])
    pq.write_table(table, tmp_path / "t.parquet")
    assert outcome(lambda: answer(tmp_path / "t.parquet", "text", [1])) == Refused("'text' twice")
