"""Random tables of slides, split files and texts, written in many ways, and with one fault each.

The right answer is the plain truth that a table was written from.
"""

import csv
import io
import unicodedata

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mutations import Refused, outcome, pick

from raylarge.data import slide_index, split_table
from raylarge.data.tile_candidates import TileConfig

STEMS = [
    "S-1",
    "S-1.5",
    "s-2",
    "S 3",
    "é4",
    "a,b",
    'q"q',
    "x;y",
    "07",
    "1e5",
    "NAN-1",
    "#8",
    "ß",
    "가",
]
ENDINGS = [".svs", ".tif", ".ome.tif", ".SVS"]
MISSING = ["NA", "nan", "NULL", "None", "n/a", "#N/A", "-", "", " ", "null", "[Not Available]"]


def truth(rng):
    """Some slides with patients, splits, resolutions and a label: by path."""
    count = int(rng.integers(3, 9))
    stems = rng.permutation(STEMS)[:count].tolist()
    rows = {}
    for i, stem in enumerate(stems):
        rows[f"/slides/{stem}{pick(rng, ENDINGS)}"] = {
            "patient": f"P{i // 2}",
            "split": ["train", "val", "test"][i // 2 % 3],
            "mpp": pick(rng, ["0.25", "0.5", "2.5e-1", ""]),
            "grade": pick(rng, ["high", "low, or not", "é", "", "007"]),
        }
    return rows


def called(rng, path):
    """A slide's file name as a table may have it: with or without its endings, NFC or NFD."""
    name = path.rsplit("/", 1)[-1]
    options = [name, name, name.rsplit(".", 1)[0]]
    return unicodedata.normalize(pick(rng, ["NFC", "NFD"]), pick(rng, options))


def table_of(rng, rows):
    """Header and lines for the truth; words for missing values in its empty cells."""
    columns = ["slide", "patient", "split", "mpp", "grade", "comment"]
    columns = rng.permutation(columns).tolist()
    lines = []
    for path, row in rows.items():
        cells = {**row, "slide": called(rng, path), "comment": pick(rng, ["", "x", "a\nb", "'"])}
        cells = {k: v or pick(rng, MISSING) for k, v in cells.items()}
        lines.append([cells[name] for name in columns])
    order = rng.permutation(len(lines))
    return columns, [lines[i] for i in order]


def write(rng, folder, columns, lines):
    """The table as CSV of many kinds, or as parquet; its path."""
    if rng.random() < 0.25:
        table = pa.table(
            {name: pa.array(cells) for name, cells in zip(columns, np.array(lines).T, strict=True)}
        )
        if rng.random() < 0.5:
            table = pa.table({c: table[c].dictionary_encode() for c in columns})
        path = folder / pick(rng, ["t.parquet", "parquet without ending"])
        pq.write_table(table, path)
        return str(path)
    sink = io.StringIO(newline="")
    quoting = pick(rng, [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
    writer = csv.writer(
        sink, delimiter=pick(rng, [",", ";", "\t"]), quoting=quoting,
        lineterminator=pick(rng, ["\n", "\r\n"]),
    )  # fmt: skip
    writer.writerows([columns, *lines, *pick(rng, [[], [[]], [[""] * len(columns)]])])
    text = sink.getvalue()
    codec = pick(rng, ["utf-8", "utf-8-sig", "utf-16"])
    path = folder / pick(rng, ["t.csv", "T (1).tsv", "t"])
    path.write_bytes(text.encode(codec))
    return str(path)


def seen(index):
    """What an index says of each slide, by path."""
    return {
        entry.path: {
            "patient": entry.patient,
            "split": entry.split,
            "mpp": entry.mpp,
            "grade": entry.labels.get("grade", ""),
        }
        for entry in index.entries
    }


def expected_of(rows):
    return {
        path: {**row, "mpp": float(row["mpp"]) if row["mpp"] else None}
        for path, row in rows.items()
    }


@pytest.mark.parametrize("seed", range(40))
def test_a_table_says_the_same_however_it_is_written(tmp_path, seed):
    rng = np.random.default_rng([11, seed])
    rows = truth(rng)
    path = write(rng, tmp_path, *table_of(rng, rows))
    config = TileConfig(table=path, labels=["grade"])
    assert outcome(lambda: seen(slide_index.index(list(rows), config))) == expected_of(rows)


def double_header(rng, columns, lines, paths):
    name = pick(rng, columns)
    return [*columns, name], [[*line, "x"] for line in lines], Refused("twice", f"'{name}'")


def row_lost(rng, columns, lines, paths):
    return columns, lines[1:], Refused("1 of", "no split", "tile.unlisted=")


def case_changed(rng, columns, lines, paths):
    at = columns.index("slide")
    lines = [list(line) for line in lines]
    old = lines[0][at]
    lines[0][at] = old.swapcase()
    if lines[0][at] == old or lines[0][at].casefold() != old.casefold():
        lines[0][at] = old + "~"
    return columns, lines, Refused("no split")


def split_unknown(rng, columns, lines, paths):
    lines = [list(line) for line in lines]
    word = pick(rng, ["Train", "validation", "training", "0", "true", "tr\u0430in", "train,val"])
    lines[-1][columns.index("split")] = word
    return columns, lines, Refused(f"'{word}'", "no split")


def split_lost(rng, columns, lines, paths):
    lines = [list(line) for line in lines]
    lines[0][columns.index("split")] = pick(rng, MISSING)
    return columns, lines, Refused("1 of", "no split")


def rows_differ(rng, columns, lines, paths):
    other = list(lines[0])
    other[columns.index("patient")] = "another"
    return columns, [*lines, other], Refused("two rows", "differ", "another")


def mpp_odd(rng, columns, lines, paths):
    lines = [list(line) for line in lines]
    word = pick(
        rng, ["0,25", "0", "-0.5", "1e999", "inf", "0.25um", "1_0", "0x1", "٠٫٢٥", "1e-400"]
    )
    lines[0][columns.index("mpp")] = word
    return columns, lines, Refused(f"mpp={word}")


def no_slide_column(rng, columns, lines, paths):
    names = [
        pick(rng, ["Slide", "slides", "slide_id", "file"]) if c == "slide" else c for c in columns
    ]
    return names, lines, Refused("no column 'slide'")


def no_label_column(rng, columns, lines, paths):
    return [f"{c}s" if c == "grade" else c for c in columns], lines, Refused("no column 'grade'")


def other_slides(rng, columns, lines, paths):
    at = columns.index("slide")
    lines = [[*line[:at], f"other-{i}.svs", *line[at + 1 :]] for i, line in enumerate(lines)]
    return columns, lines, Refused("names none of the slides")


def patient_twice(rng, columns, lines, paths):
    """All slides are of one patient, in more than one split."""
    at, split = columns.index("patient"), columns.index("split")
    lines = [[*line[:at], "P", *line[at + 1 :]] for line in lines]
    lines[0][split], lines[1][split] = "train", "test"
    return columns, lines, Refused("one patient")


FAULTS = [
    *(double_header, row_lost, case_changed, split_unknown, split_lost, rows_differ, mpp_odd),
    *(no_slide_column, no_label_column, other_slides, patient_twice),
]


@pytest.mark.parametrize("seed", range(55))
def test_a_table_with_one_fault_is_refused_for_it(tmp_path, seed):
    rng = np.random.default_rng([12, seed])
    rows = truth(rng)
    fault = FAULTS[seed % len(FAULTS)]
    columns, lines, refused = fault(rng, *table_of(rng, rows), list(rows))
    if fault is double_header:  # parquet readers and writers refuse that themselves
        path = str(tmp_path / "t.csv")
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([columns, *lines])
    else:
        path = write(rng, tmp_path, columns, lines)
    config = TileConfig(table=path, labels=["grade"])
    assert outcome(lambda: seen(slide_index.index(list(rows), config))) == refused


@pytest.mark.parametrize("seed", range(15))
def test_a_csv_that_is_broken_is_refused(tmp_path, seed):
    rng = np.random.default_rng([13, seed])
    rows = truth(rng)
    columns, _ = table_of(rng, rows)
    content, words = pick(
        rng,
        [
            (",".join(columns) + "\n" + '"a.svs",' * 9, "cells"),
            ('slide,split\n"a.svs,train\nb.svs,val\n', "no CSV"),
            ("slide,split\na\0b.svs,train\n", "no CSV"),
            ("", "empty"),
            (" \n\n", "no column"),
            ("slide,split\né.svs,train\n".encode("latin-1"), "no CSV"),
            (b"PAR1 and no more", "no CSV or parquet"),
            (b"\xff\xfes\x00l", "table"),
            ("\x89PNG\r\n\x1a\n", ""),
            ("slide,split\n", "names none"),
        ],
    )
    path = tmp_path / "t.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    config = TileConfig(table=str(path))
    assert outcome(lambda: seen(slide_index.index(list(rows), config))) == Refused(words)


def split_file(rng, split):
    """A file of splits in one of the forms: HIPT's, CLAM's two, or rows."""
    groups = {s: [n for n in split if split[n] == s] for s in ("train", "val", "test")}
    form = int(rng.integers(4))
    if form in (0, 1):
        height = max(map(len, groups.values()))
        padded = {s: [*names, *[""] * (height - len(names))] for s, names in groups.items()}
        columns = rng.permutation(["train", "val", "test"]).tolist()
        lines = [[padded[s][i] for s in columns] for i in range(height)]
        if form == 1:
            columns, lines = ["", *columns], [[str(i), *line] for i, line in enumerate(lines)]
        return columns, lines
    if form == 2:
        words = pick(rng, [("True", "False"), ("1", "0"), ("TRUE", "FALSE")])
        columns = ["train", "val", "test"]
        lines = [[n, *(words[split[n] != s] for s in columns)] for n in split]
        return ["", *columns], lines
    return [pick(rng, ["slide", "slide_id", ""]), "split"], [[n, s] for n, s in split.items()]


@pytest.mark.parametrize("seed", range(40))
def test_a_split_file_says_the_same_in_every_form(tmp_path, seed):
    rng = np.random.default_rng([14, seed])
    rows = truth(rng)
    names = {path: called(rng, path) for path in rows}
    columns, lines = split_file(rng, {names[path]: row["split"] for path, row in rows.items()})
    path = write(rng, tmp_path, columns, lines)
    fault = pick(rng, ["", "", "", "lost", "other"])
    slides = [*rows, "/slides/another.svs"] if fault == "lost" else list(rows)
    if fault == "other":
        slides = [path.replace("/slides/", "/slides/x") for path in rows]
    splits = {path: row["split"] for path, row in rows.items()}
    expected = {
        "": splits,
        "lost": Refused("1 of", "no split", "another.svs"),
        "other": Refused("names none of the slides"),
    }[fault]
    assert (
        outcome(
            lambda: {
                e.path: e.split for e in slide_index.index(slides, TileConfig(split=path)).entries
            }
        )
        == expected
    )


@pytest.mark.parametrize("seed", range(20))
def test_a_split_file_that_contradicts_itself_is_refused(tmp_path, seed):
    rng = np.random.default_rng([15, seed])
    rows = truth(rng)
    names = [called(rng, path) for path in rows]
    lines = [[name, pick(rng, ["train", "val", "test"])] for name in names]
    other = {"train": "val", "val": "test", "test": "train"}[lines[0][1]]
    fault, refused = pick(
        rng,
        [
            ([names[0], other], Refused("keep one")),
            ([names[0], "Val"], Refused("'Val'", "no split")),
            (["x.svs", "held out"], Refused("'held out'", "no split")),
        ],
    )
    columns, lines = ["slide", "split"], [*lines, fault]
    path = write(rng, tmp_path, columns, lines)
    assert outcome(lambda: len(split_table.read(path)[0].match(list(rows)))) == refused


@pytest.mark.parametrize("longer", ["S-1.5.svs", "S-1.svs.tif", "S-1.x.y.tif"])
@pytest.mark.parametrize("nearer", ["S-1.svs", "S-1"])
def test_a_row_is_not_of_a_slide_with_a_longer_name(tmp_path, longer, nearer):
    (tmp_path / "t.csv").write_text("slide,split\nS-1,test\n")
    config = TileConfig(table=str(tmp_path / "t.csv"))
    refused = Refused("1 of 2", "no split", f"'{longer}'")
    assert outcome(lambda: slide_index.index([nearer, longer], config)) == refused


@pytest.mark.parametrize(
    ("slides", "row"), [(["S-1.svs", "S-1.tif"], "S-1"), (["a.1.svs", "a.2.ome.tif"], "a")]
)
def test_a_row_of_several_slides_is_said(tmp_path, slides, row):
    (tmp_path / "t.csv").write_text(f"slide,split\n{row},test\n")
    index = slide_index.index(slides, TileConfig(table=str(tmp_path / "t.csv")))
    assert [entry.split for entry in index.entries] == ["test", "test"]
    listed = ", ".join(f"'{one}'" for one in slides)
    assert index.lines == [
        f"tile.table={tmp_path}/t.csv: row '{row}' stands for 2 slides: {listed}"
    ]
