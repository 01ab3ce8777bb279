"""Hostile file names of slides: each is found, masked, labelled and reported as itself.

Every slide has a colour and a mask of its own, so a mix-up shows.
"""

import csv
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tifffile
from mutations import NAMES, Refused, outcome, painted
from PIL import Image

from raylarge import config, tables
from raylarge.data import slide_index
from raylarge.data.prepare import Prepare, find_slides, prepare
from raylarge.report import Report

SIDE, ROWS, COLUMNS = 32, 3, 5
EDGES = " \ufeff\u200b"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a slide of each name, a mask of a cell of its own, and a table of them."""
    folder = tmp_path_factory.mktemp("names")
    for name in ("slides", "masks"):
        (folder / name).mkdir()
    lines = []
    for i, name in enumerate(NAMES):
        pixels = painted(np.random.default_rng([51, i]), ROWS * SIDE, COLUMNS * SIDE)
        save(pixels, folder / "slides" / name)
        save(one_cell(i).astype(np.uint8), folder / "masks" / (stem(name) + ".png"))
        if name.isprintable() or name.encode(errors="replace").decode() == name:
            lines.append([name, f"label {i}", 0.5])
    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([["slide", "grade", "mpp"], *lines])
    return folder


@pytest.fixture(scope="module")
def data(folder):
    tile = {
        "patch_px": SIDE,
        "scales": [0],
        "mask": f"{folder}/masks/{{name}}.png",
        "mpp": 0.5,
        "table": f"{folder}/table.csv",
        "labels": ["grade"],
    }
    values = {"slides": f"{folder}/slides/*", "out": f"{folder}/data", "verbs": "tile"}
    log = Report(f"{folder}/data/report.json")
    prepare(config.build(Prepare, {**values, "names": True, "tile": tile}), log)
    return folder / "data"


def save(pixels, path):
    with path.open("wb") as file:
        Image.fromarray(pixels).save(file, "PNG")


def stem(name):
    return name.rsplit(".", 1)[0]


def one_cell(i):
    page = np.zeros((ROWS, COLUMNS), bool)
    page[(i // COLUMNS) % ROWS, i % COLUMNS] = True
    return page


def slides_of(folder):
    """The entry of `slides.json` by file name; `names.json` says which it is."""
    names = json.loads((folder / "names.json").read_text())
    slides = json.loads((folder / "slides.json").read_text())["slides"]
    return {Path(names[one["slide_id"]]).name: one for one in slides}


def test_a_pattern_finds_all_of_them(folder):
    paths = sorted(f"{folder}/slides/{name}" for name in NAMES)
    assert outcome(lambda: find_slides(f"{folder}/slides/*")) == paths


@pytest.mark.parametrize("name", NAMES)
def test_a_slide_is_found_by_its_own_name_alone(folder, name):
    expected = [f"{folder}/slides/{name}"]
    if "," in name:
        expected = Refused("no slide fits")
    assert outcome(lambda: find_slides(f"{folder}/slides/{name}")) == expected


@pytest.mark.parametrize("index", range(len(NAMES)))
def test_a_slide_has_its_own_mask_label_and_pseudonym(data, index):
    name = NAMES[index]
    slide = slides_of(data)[name]
    assert slide["slide_id"] == slide_index.pseudonym("raylarge", name)
    rows = tables.rows(str(data), "tiles").to_pylist()
    kept = [
        (t["row"], t["column"]) for t in rows if t["kept"] and t["slide_id"] == slide["slide_id"]
    ]
    assert kept == [tuple(cell) for cell in np.argwhere(one_cell(index)).tolist()]
    in_table = name.strip(EDGES) == name and name.encode(errors="replace").decode() == name
    assert slide["labels"] == ({"grade": f"label {index}"} if in_table else {})
    assert (data / "qc" / f"{slide['slide_id']}.png").exists()


def test_what_the_folder_says_can_be_read_by_anybody(data):
    assert len(slides_of(data)) == len(NAMES)
    for path in data.rglob("*"):
        if path.suffix in (".json", ".html"):
            text = path.read_bytes().decode()  # UTF-8
            json.loads(text, parse_constant=pytest.fail) if path.suffix == ".json" else None
    page = (data / "qc" / "index.html").read_text()
    assert "<b>&amp;" not in page
    assert "&lt;b&gt;&amp;amp;&lt;b&gt;" in page
    assert not {c for c in page if not c.isprintable()} - {"\n", "\u200d"}


@pytest.mark.parametrize("name", [name for name in NAMES if len(name) < 200])
def test_a_damaged_slide_is_named_in_one_sentence(tmp_path, name):
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides" / name).write_bytes(b"\x89PNG\r\n\x1a\n no more")
    values = {"slides": f"{tmp_path}/slides/*", "out": f"{tmp_path}/data", "verbs": "tile"}
    settings = config.build(Prepare, {**values, "names": True, "tile": {"mpp": 0.5}})
    log = Report(f"{tmp_path}/data/report.json")
    shown = "".join(
        c if c.isprintable() or c == "\u200d" else c.encode("unicode_escape").decode()
        for c in unicodedata.normalize("NFC", name)
    )
    assert outcome(lambda: prepare(settings, log)) == Refused(shown)


def test_two_names_that_differ_in_an_accent_alone_are_refused(tmp_path):
    for form in ("NFC", "NFD"):
        (tmp_path / unicodedata.normalize(form, "é.png")).touch()
    values = {"slides": f"{tmp_path}/*.png", "out": f"{tmp_path}/data", "verbs": "tile"}
    log = Report(f"{tmp_path}/data/report.json")
    assert outcome(lambda: prepare(config.build(Prepare, values), log)) == Refused("one file name")


def test_two_slides_of_one_stem_do_not_share_a_mask(tmp_path):
    for name in ("a.png", "a.PNG", "m_a.png"):
        save(painted(np.random.default_rng(52), 96, 160), tmp_path / name)
    tile = {"patch_px": 32, "scales": [0], "mask": f"{tmp_path}/m_{{name}}.png", "mpp": 0.5}
    slides = f"{tmp_path}/a.png,{tmp_path}/a.PNG"
    values = {"slides": slides, "out": f"{tmp_path}/data", "verbs": "tile", "tile": tile}
    log = Report(f"{tmp_path}/data/report.json")
    assert outcome(lambda: prepare(config.build(Prepare, values), log)) == Refused(
        "tile.mask", "m_a.png"
    )


def test_slides_that_can_be_read_are_not_listed_among_those_that_cannot(tmp_path, capsys):
    """They are opened with the same options: floating point needs `tile.value_range`."""
    (tmp_path / "slides").mkdir()
    shares = np.random.default_rng(53).random((64, 64)).astype(np.float32)
    tifffile.imwrite(tmp_path / "slides" / "fine.tif", shares)
    for name in ("bad1.tif", "bad2.tif"):
        (tmp_path / "slides" / name).write_bytes(b"II*\0 no more")
    tile = {"patch_px": 32, "scales": [0], "mpp": 0.5, "value_range": [0, 1], "mask": "all"}
    values = {"slides": f"{tmp_path}/slides/*", "out": f"{tmp_path}/data", "verbs": "tile"}
    settings = config.build(Prepare, {**values, "names": True, "tile": tile})
    log = Report(f"{tmp_path}/data/report.json")
    assert outcome(lambda: prepare(settings, log)) == Refused("2 of 3 slides cannot be read")
    listed = capsys.readouterr().out
    assert "bad1.tif" in listed
    assert "bad2.tif" in listed
    assert "fine.tif" not in listed
