"""What prepare tells, and what a failed or a second run may not do."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile

from raylarge import config, storage
from raylarge.data.prepare import Prepare, prepare
from raylarge.errors import UserError
from raylarge.report import Report

ROOT = Path(__file__).parents[1]
SMALL = {"patch_px": 64, "scales": [0, 1], "mask": "all", "val_fraction": 0.5}


@pytest.fixture
def run(tmp_path):
    """Runs `tile` on the slides of a folder."""

    def start(tile=None, **values):
        base = {"slides": f"{tmp_path}/*.tif", "out": f"{tmp_path}/data", "verbs": "tile"}
        built = config.build(Prepare, base, values, {"tile": {**SMALL, **(tile or {})}})
        return prepare(built, Report(f"{tmp_path}/data/report.json"))

    return start


def slide(path, resolved=True):
    pixels = np.random.default_rng(0).integers(90, 200, (256, 320, 3), np.uint8)
    more = {"resolution": (20000, 20000), "resolutionunit": "CENTIMETER"} if resolved else {}
    tifffile.imwrite(path, pixels, tile=(64, 64), **more)


def test_a_failed_run_does_not_open_the_folder_to_other_settings(run, tmp_path):
    slide(tmp_path / "a.tif")
    run()
    whole = storage.read_json(f"{tmp_path}/data/tile.json")
    (tmp_path / "a.tif").write_bytes(b"cut")
    with pytest.raises(UserError, match="is neither a slide"):
        run()
    assert not storage.exists(f"{tmp_path}/data/tile.json")
    with pytest.raises(UserError, match=r"was made with tile\.patch_px=64, not 32; choose another"):
        run({"patch_px": 32})
    slide(tmp_path / "a.tif")
    run()
    assert storage.read_json(f"{tmp_path}/data/tile.json") == whole
    assert not list((tmp_path / "data").glob("unfinished-*"))


def test_all_slides_without_a_pixel_size_are_said_at_once(run, tmp_path, capsys):
    slide(tmp_path / "a.tif")
    for name in ("b", "c", "d"):
        slide(tmp_path / f"{name}.tif", resolved=False)
    with pytest.raises(UserError, match=r"^3 of 4 slides cannot be read \(they are listed above\)"):
        run()
    lines = capsys.readouterr().out
    assert lines.count("does not say its resolution; set tile.mpp=") == 3
    assert "b.tif" not in lines
    with pytest.raises(UserError, match="3 of 4 slides"):
        run(names=True)
    lines = capsys.readouterr().out
    assert all(f"({name}.tif): the file does not say its resolution" in lines for name in "bcd")


def test_failures_are_listed_with_their_reasons_and_by_choice_their_files(run, tmp_path, capsys):
    slide(tmp_path / "a.tif")
    slide(tmp_path / "<b>.tif", resolved=False)
    (tmp_path / "c.tif").write_bytes(b"")
    run(on_error="skip")
    lines = capsys.readouterr().out
    assert "tile: 26 rows, 1 of 1 parts new, 2 failed: see failed.parquet" in lines
    assert "does not say its resolution" in lines
    assert "is empty" in lines
    assert "names=true shows the names of their files" in lines
    assert "b>.tif" not in lines
    page = (tmp_path / "data/qc/index.html").read_text()
    assert "c.tif" not in page
    run(on_error="skip", names=True)
    lines = capsys.readouterr().out
    assert "(<b>.tif): the file does not say its resolution" in lines
    assert "(c.tif): the file is empty" in lines
    page = (tmp_path / "data/qc/index.html").read_text()
    assert "<p>&lt;b&gt;.tif</p>" in page
    assert all(f"<p>{name}.tif</p>" in page for name in "ac")
    assert "This page names the files" in page
    assert "(c.tif)" not in str(storage.read_table(f"{tmp_path}/data/failed.parquet").to_pylist())
    with pytest.raises(UserError, match=r"^slide [0-9a-f]{16} \(c\.tif\): the file is empty"):
        run(names=True, slides=f"{tmp_path}/c.tif")


def test_what_the_tables_do_not_agree_in_is_said_and_reported(run, tmp_path, capsys):
    for name in "abc":
        slide(tmp_path / f"{name}.tif")
    table = tmp_path / "t.csv"
    table.write_text("slide,patient,grade\na,NA,1\nb,P,null\nghost,P,2\n")
    run({"table": str(table), "labels": ["grade"]})
    lines = capsys.readouterr().out
    assert "rows without a slide: 1 ('ghost')" in lines
    assert "slides without a row: 1 ('c.tif')" in lines
    assert "1 of 3 cells of 'grade' say null and count as empty" in lines
    report = storage.read_json(f"{tmp_path}/data/report.json")["stages"]["tile"]["user_tables"]
    assert report["table"]["rows_without_slide"] == report["table"]["slides_without_row"] == 1
    assert report["missing"] == {"patient": 1, "grade": 1}
    unlisted = report["table"]["unmatched_slides"]
    names = storage.read_json(f"{tmp_path}/data/names.json")
    assert [Path(names[one]).name for one in unlisted] == ["c.tif"]
    rows = {Path(names[s["slide_id"]]).stem: s for s in slides_of(tmp_path)}
    assert [rows[name]["labels"] for name in "abc"] == [{"grade": "1"}, {"grade": ""}, {}]


def slides_of(folder):
    return storage.read_json(f"{folder}/data/slides.json")["slides"]


def test_a_second_command_with_the_same_out_is_refused(run, tmp_path):
    slide(tmp_path / "a.tif")
    out = f"{tmp_path}/data"
    with storage.exclusive(out, "prepare"):
        words = ["preset=tiny", "verbs=tile", f"slides={tmp_path}/a.tif", f"out={out}"]
        done = subprocess.run(
            [sys.executable, "-m", "jobs.prepare", *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=200,
        )
        assert done.returncode == 2
        assert f"{out} is in use: prepare has been writing to it since" in done.stderr
        assert not storage.exists(f"{out}/report.json")
    run()
    assert not storage.exists(f"{out}/.lock")


def test_names_of_files_that_no_terminal_shows_are_prepared_like_others(run, tmp_path, capsys):
    for name in ("a\nb\x1b[2J", "gpj.\u202efit", "x" * 240):
        slide(tmp_path / f"{name}.tif", resolved=False)
    with pytest.raises(UserError, match="3 of 3 slides"):
        run(names=True)
    lines = capsys.readouterr().out
    assert str(tmp_path) not in lines
    assert r"(a\nb\x1b[2J.tif)" in lines
    assert r"(gpj.\u202efit.tif)" in lines
    run({"mpp": 0.5}, names=True)
    assert len(slides_of(tmp_path)) == 3
    artefacts = (tmp_path / "data").rglob("*.parquet")
    assert not [path for path in artefacts if b"fit" in path.read_bytes()]
