"""Slides that cannot be read, in a run over many; and what nobody outside may learn."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile

from raylarge import pyramid, storage, tables
from raylarge.data.grid import about
from raylarge.data.prepare import prepare
from raylarge.errors import UserError
from raylarge.report import Report

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(tmp_path):
    return lambda config: prepare(config, Report(str(tmp_path / "report.json")))


def failed(root):
    return storage.read_table(f"{root}/failed.parquet").to_pylist()


def cut(source, target, keep):
    content = Path(source).read_bytes()
    Path(target).write_bytes(content[: int(len(content) * keep)])


def late(path):
    """A slide whose overview is whole and whose finest level is damaged somewhere."""
    import tifffile

    noise = np.random.default_rng(0).integers(0, 255, (2048, 2048, 3), np.uint8)
    pyramid.write_image(str(path), noise, 0.5)
    with tifffile.TiffFile(path) as file:
        page = file.pages.first
        at, size = page.dataoffsets[29], page.databytecounts[29]
    content = bytearray(path.read_bytes())
    content[at : at + size] = b"\xff" * size
    path.write_bytes(bytes(content))


@pytest.fixture
def bad_slides(tmp_path, shared_data):
    """Slides nobody can use, by why not."""
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "empty.svs").write_bytes(b"")
    (folder / "text.svs").write_text("a list of patients")
    cut(shared_data / "wsi/CMU-1-Small-Region.svs", folder / "half.svs", 0.5)
    (folder / "silent.svs").symlink_to(shared_data / "wsi/TCGA-CR-7395.svs")
    late(folder / "late.tif")
    return folder


REASONS = {
    "empty.svs": "is empty",
    "text.svs": "is neither a slide that OpenSlide knows",
    "half.svs": "damaged",
    "silent.svs": "does not say its resolution|dpi|um/px",
    "late.tif": "damaged",
}


def test_bad_slides_are_rows_and_the_good_ones_go_on(tiny_prepare, run, tiny_slide, bad_slides):
    slides = ",".join([tiny_slide, *(str(bad_slides / name) for name in REASONS)])
    config = tiny_prepare(slides=slides, on_error="skip")
    done = run(config)
    names = {
        key: Path(path).name for key, path in storage.read_json(f"{config.out}/names.json").items()
    }
    rows = failed(config.out)
    told = {names[row["slide_id"]]: row for row in rows}
    assert set(told) == set(REASONS)
    for name, row in told.items():
        assert row["verb"] == ("embed" if name == "late.tif" else "tile")
        assert re.search(REASONS[name], row["reason"]), row
        assert name not in row["reason"]
        assert str(bad_slides) not in row["reason"]
    assert done["tile"]["failed"] == 4
    alone = tiny_prepare(out=config.out + "-alone")
    run(alone)
    found, expected = (tables.rows(root, "examples") for root in (config.out, alone.out))
    assert found.equals(expected)  # nothing of the slide that failed half way
    again = run(config)
    assert [facts["made"] for facts in again.values()] == [0, 0, 0]
    assert failed(config.out) == rows


@pytest.fixture
def no_files(tmp_path):
    """What a pattern matches and is no file of a slide."""
    folder = tmp_path / "none"
    folder.mkdir()
    (folder / "dangling.tif").symlink_to("/not/mounted/b.tif")
    (folder / "loop.tif").symlink_to(folder / "loop.tif")
    (folder / "folder.tif").mkdir()
    os.mkfifo(folder / "pipe.tif")
    with socket.socket(socket.AF_UNIX) as one:
        before = os.getcwd()
        os.chdir(folder)  # such an address is short
        one.bind("socket.tif")
        os.chdir(before)
    return folder


NO_FILES = {
    "dangling.tif": "does not exist",
    "loop.tif": "does not exist",
    "folder.tif": "the folder holds 0 DICOM slides",
    "pipe.tif": "the path names a pipe, socket or device",
    "socket.tif": "the path names a pipe, socket or device",
}


def test_what_is_no_file_is_a_row_and_never_left_out(
    tiny_prepare, run, tiny_slide, no_files, capsys
):
    config = tiny_prepare(slides=f"{tiny_slide},{no_files}/*.tif", on_error="skip", verbs="tile")
    assert run(config)["tile"]["failed"] == len(NO_FILES)
    names = storage.read_json(f"{config.out}/names.json")
    reasons = {Path(names[row["slide_id"]]).name: row["reason"] for row in failed(config.out)}
    assert set(reasons) == set(NO_FILES)
    for name, words in NO_FILES.items():
        assert words in reasons[name]
    capsys.readouterr()
    with pytest.raises(UserError, match="5 of 5 slides cannot be read"):
        run(tiny_prepare(slides=f"{no_files}/*.tif", verbs="tile"))
    listed = capsys.readouterr().out
    assert all(words in listed for words in NO_FILES.values())


def test_a_slide_named_by_a_link_to_nothing_is_a_row(tiny_prepare, run, tiny_slide, no_files):
    slides = f"{tiny_slide},{no_files}/dangling.tif"
    run(config := tiny_prepare(slides=slides, on_error="skip", verbs="tile"))
    assert ["does not exist" in row["reason"] for row in failed(config.out)] == [True]


def test_choices_of_readers_are_said_stored_and_shown(tiny_prepare, run, tmp_path, capsys):
    rng = np.random.default_rng(0)
    image = rng.integers(90, 200, (300, 300, 3), np.uint8)
    with tifffile.TiffWriter(tmp_path / "two.ome.tif") as writer:
        for pixels in (image, 255 - image):
            facts = {"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5, "Name": "Anna.svs"}
            writer.write(pixels, photometric="rgb", tile=(256, 256), metadata=facts)
    slides, tile = str(tmp_path / "two.ome.tif"), {"mask": "all"}
    run(config := tiny_prepare(slides=slides, verbs="tile", tile=tile))
    words = "the file holds 2 scenes (0 of 300 x 300 px, 1 of 300 x 300 px): scene 0, the first"
    spoken = capsys.readouterr().out
    assert spoken.count(words) == 1
    facts = storage.read_json(f"{config.out}/slides.json")["slides"][0]
    assert facts["notes"][0].startswith(words)
    page = Path(config.out, "qc", "index.html").read_text()
    assert words in page
    assert "Anna" not in page + spoken + str(facts)
    sheet = Path(config.out, "qc", f"{facts['slide_id']}.png").read_bytes()
    again = tiny_prepare(
        slides=slides, verbs="tile", out=f"{config.out}-1", tile={**tile, "scene": "1"}
    )
    run(again)
    assert storage.read_json(f"{again.out}/slides.json")["slides"][0]["notes"] == [
        "scene 1 of 2 was read"
    ]
    assert Path(again.out, "qc", f"{facts['slide_id']}.png").read_bytes() != sheet
    with pytest.raises(UserError, match=r"out=.* was made with|was made with tile\.scene="):
        run(tiny_prepare(slides=slides, verbs="tile", out=again.out, tile=tile))


def test_a_mended_slide_joins_at_the_next_run(tiny_prepare, run, tiny_slide, tmp_path):
    other = tmp_path / "other.tif"
    other.write_bytes(b"")
    config = tiny_prepare(slides=f"{tiny_slide},{other}", on_error="skip")
    before = run(config)["shard"]["rows"]
    other.write_bytes(Path(tiny_slide).read_bytes())
    done = run(config)
    assert done["shard"]["rows"] == 2 * before or done["shard"]["rows"] > before
    assert failed(config.out) == []


def test_a_bad_slide_stops_the_run_where_that_is_wanted(tiny_prepare, run, tiny_slide, tmp_path):
    (tmp_path / "secret.svs").write_bytes(b"")
    slides = f"{tiny_slide},{tmp_path}/secret.svs"
    with pytest.raises(UserError, match=r"^slide [0-9a-f]{16}: the file is empty;.*names\.json"):
        run(tiny_prepare(slides=slides))
    with pytest.raises(UserError, match="on_error=maybe: it must be stop or skip"):
        run(tiny_prepare(slides=slides, on_error="maybe"))


def test_only_bad_slides_are_an_error_in_any_case(tiny_prepare, run, tmp_path):
    (tmp_path / "a.svs").write_bytes(b"")
    with pytest.raises(UserError, match=r"no tile of 1 slides is kept \(1 of them could not"):
        run(tiny_prepare(slides=f"{tmp_path}/a.svs", on_error="skip"))


def test_small_slides_and_slides_without_tissue_give_reasons_not_rows(
    tiny_prepare, run, tiny_slide, tmp_path
):
    for name, size, value in (("dot.png", 40, 120), ("glass.tif", 300, 243)):
        image = np.full((size, size, 3), value, np.uint8)
        if name.endswith("png"):
            from PIL import Image

            Image.fromarray(image).save(tmp_path / name)
        else:
            pyramid.write_image(str(tmp_path / name), image, 0.5)
    slides = f"{tiny_slide},{tmp_path}/dot.png,{tmp_path}/glass.tif"
    config = tiny_prepare(slides=slides, tile={"mpp": 0.5})
    run(config)
    names = storage.read_json(f"{config.out}/names.json")
    for slide_id, path in names.items():
        table = storage.read_table(f"{config.out}/tiles/{slide_id}.parquet")
        reasons = set(table["reason"].to_pylist())
        if path.endswith("dot.png"):
            assert reasons == {"outside"}
        elif path.endswith("glass.tif"):
            assert "" not in reasons
            assert any(reason.startswith("tissue 0 <") for reason in reasons)
    kept = set(tables.rows(config.out, "examples")["slide_id"].to_pylist())
    assert [Path(names[one]).name for one in kept] == ["tiny.tif"]


@pytest.mark.parametrize("bad", [False, True])
def test_no_name_is_in_any_output_but_the_private_one(tiny_slide, tmp_path, bad):
    folder, out = tmp_path / "slides", tmp_path / "data"
    folder.mkdir()
    secret = folder / "SMITH-JOHN-1952.tif"
    secret.write_bytes(Path(tiny_slide).read_bytes())
    if bad:
        (folder / "SMITH-JANE-1954.tif").write_bytes(b"II*\0")
    job = ["jobs/prepare.py", f"slides={folder}/*.tif", f"out={out}", "preset=tiny"]
    job += ["embed.encoder=toy", "tile.salt=mine", "on_error=skip"]
    done = subprocess.run(
        [sys.executable, *job],
        cwd=ROOT,
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert b"SMITH" not in done.stdout + done.stderr
    told = [p for p in out.rglob("*") if p.is_file() and b"SMITH" in p.read_bytes()]
    assert [p.name for p in told] == ["names.json"]
    assert not [p for p in out.rglob("*") if p.is_file() and b'"mine"' in p.read_bytes()]
    assert len(list((out / "qc").glob("*.png"))) == 1


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("/s/a.tif", "mask /m/m_a.png is no image", "mask ID is no image"),
        ("/s/a.tif", "slide /s/a.tif: data.parquet, /t/a.svs", "slide ID: data.parquet, /t/ID.svs"),
        ("/s/a.tif", "slide /s/a.tif and /s/ab/x, a", "slide ID and /s/ab/x, a"),
        (
            "http://h/a.tif?k=1",
            "slide http://h/a.tif?k=1 and http://u:p@h/b?k=2",
            "slide ID and http://h/b",
        ),
    ],
)
def test_a_slides_own_names_are_replaced_once_and_no_others(path, text, expected):
    unit = SimpleNamespace(slide_id="ID", path=path, mask="/m/m_a.png")
    with pytest.raises(UserError) as told, about(unit):
        raise UserError(text)
    assert str(told.value) == f"{expected} (names.json says which file ID is)"
