import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raylarge.data import text_table, user_table_rows
from raylarge.errors import UserError

WANTED = [{"slide": "a", "patient": "p 1", "mpp": "0.25"}, {"slide": "b", "patient": "", "mpp": ""}]


def read(tmp_path, content, name="t.csv"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return text_table.read(str(path))


@pytest.mark.parametrize(
    "content",
    [
        "slide,patient,mpp\na,p 1,0.25\nb,,\n",
        "\ufeffslide,patient,mpp\r\na,p 1,0.25\r\nb,,\r\n",
        "slide;patient;mpp\na;p 1;0.25\nb;;\n",
        "slide\tpatient\tmpp\na\tp 1\t0.25\nb\t\t",
        'sep=;\nslide;"patient";mpp\n"a";"p 1";"0.25"\nb;;\n',
        " slide , patient,mpp \na , p 1 ,0.25\n\n,,\nb, ,\u00a0\n",
        'slide, "patient", mpp\na, "p 1", 0.25\nb, NA, null\n',
        "slide,patient,mpp\na,p 1,0.25\nb,N/A,NaN\n".encode("utf-16"),
        "slide,patient,mpp\na,p 1,0.25\nb,-,nan\nNone,,\n",
    ],
)
def test_a_table_is_the_same_in_all_its_spellings(tmp_path, content):
    table = read(tmp_path, content)
    assert table.columns == ("slide", "patient", "mpp")
    assert [row for row in table.rows if row["slide"]] == WANTED


def test_quotes_keep_separators_and_line_breaks_and_text_is_composed(tmp_path):
    table = read(tmp_path, 'slide,note\n"a,b","1\n2 ""x"""\nMu\u0308ller,\n')
    assert table.rows == [
        {"slide": "a,b", "note": '1\n2 "x"'},
        {"slide": "M\u00fcller", "note": ""},
    ]


@pytest.mark.parametrize("word", ["NA", "n/a", "NaN", "null", "None", "-", "#N/A", "<NA>", "NAN"])
def test_words_for_no_value_are_empty_and_counted(tmp_path, word):
    table = read(tmp_path, f"slide,grade\na,{word}\nb,high\nc,\n")
    assert [row["grade"] for row in table.rows] == ["", "high", ""]
    assert table.missing == {"grade": {word: 1}}
    line = table.missing_words(["slide", "grade"])
    assert line == [f"{table.path}: 1 of 3 cells of 'grade' say {word} and count as empty"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("slide,grade,grade\na,1,2\n", "has the column 'grade' twice"),
        ("slide,grade, grade \na,1,2\n", "has the column 'grade' twice"),
        ("slide,grade\na,1\nb,2,3\n", "line 3: 3 cells under 2 columns"),
        ("slide,grade\na\n", "line 2: 1 cells under 2 columns"),
        ('slide,grade\n"a,1\n', "no CSV table"),
        ('slide,grade\n"a"x,1\n', "no CSV table"),
        ("", "is empty"),
        ("\n\n", "is empty"),
        (b"slide\nM\xfcller\n", "byte 7 is not UTF-8; save it as CSV in UTF-8"),
        (b"PK\x03\x04\x00\x00", "no CSV or parquet table"),
        (b"PAR1 cut short", "no CSV or parquet table"),
    ],
)
def test_what_is_no_table_is_a_sentence(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, content)


def parquet(tmp_path, table):
    path = str(tmp_path / "t.parquet")
    pq.write_table(table, path)
    return path


def test_parquet_says_the_same_as_csv(tmp_path):
    table = pa.table(
        {
            "slide": ["a", "b ", None],
            "patient": pa.array([12.0, float("nan"), None]),
            "count": pa.array([3, None, 4]),
            "mpp": pa.array([0.2525, None, 0.1], pa.float32()),
            "bad": [True, False, None],
            "site": pa.array(["x", "NA", None]).dictionary_encode(),
            "raw": [b"y", None, b"z"],
        }
    )
    found = text_table.read(parquet(tmp_path, table))
    assert [list(row.values()) for row in found.rows] == [
        ["a", "12", "3", "0.2525", "true", "x", "y"],
        ["b", "", "", "", "false", "", ""],
        ["", "", "4", "0.1", "", "", "z"],
    ]
    assert found.missing == {"site": {"NA": 1}}
    with pytest.raises(UserError, match="column 'v' holds list"):
        text_table.read(parquet(tmp_path, pa.table({"v": [[1.0]]})))
    twice = pa.table([pa.array(["a"]), pa.array(["b"])], names=["slide", "slide"])
    with pytest.raises(UserError, match="has the column 'slide' twice"):
        text_table.read(parquet(tmp_path, twice))


THREADS = """
import os, sys
from raylarge.data import slide_index, text_table
before = len(os.listdir("/proc/self/task"))
for path in sys.argv[1:]:
    text_table.read(path)
print(len(os.listdir("/proc/self/task")) - before)
"""


def test_no_thread_is_left_that_aborts_the_process_at_its_end(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("slide,grade\na,1\n")
    other = parquet(tmp_path, pa.table({"slide": ["a"]}))
    command = [sys.executable, "-c", THREADS, str(path), other]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


def test_a_large_csv_is_read_from_memory_that_is_no_object_of_python():
    content = bytes(range(256))
    before = sys.getrefcount(content)
    buffer = user_table_rows._arrow_buffer(content)
    assert sys.getrefcount(content) == before
    assert buffer.to_pybytes() == content
    assert user_table_rows._arrow_buffer(b"").size == 0
