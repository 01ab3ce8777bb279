"""jobs/sample.py: files and marks, resumption after a kill, one sentence for every mistake."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from jobs import sample as job
from raylarge import images, schema, storage
from raylarge.errors import UserError
from raylarge.metrics.lines import window_lines
from raylarge.order import parse

ROOT = Path(__file__).parents[1]
EMBEDDED = {(row, column) for row in range(3, 9) for column in range(2, 7)} - {(3, 2)}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data folder with the EMBEDDINGS of one slide: each vector tells its row and column."""
    folder, parts = str(tmp_path_factory.mktemp("data")), []
    columns = max(column for _, column in EMBEDDED) + 1
    for number, rows in enumerate([range(6), range(6, 12)]):
        vectors = np.zeros((6, columns, 8), np.float16)
        valid = np.zeros((6, columns), bool)
        for row, column in (cell for cell in EMBEDDED if cell[0] in rows):
            vectors[row - rows[0], column] = (row, column, 1, 2, 3, 4, 5, 6)
            valid[row - rows[0], column] = True
        table = pa.table(
            {
                "slide_id": ["s-1"] * 6,
                "row": list(rows),
                "columns": [columns] * 6,
                "valid": list(valid),
                "embedding": list(vectors.reshape(6, -1)),
            }
        )
        parts.append({"part": f"embeddings/s-1-{number:04d}.parquet"})
        path = storage.join(folder, parts[-1]["part"])
        storage.write_table(path, schema.check(table, schema.EMBEDDINGS))
    storage.write_json(storage.join(folder, "embed.json"), {"verb": "embed", "parts": parts})
    return folder


def pixels(folder):
    return images.read_png(str(folder / "image.png"))[0]


def test_words_stand_as_they_are(tiny_bundle, tmp_path):
    few = [f"bundle={tiny_bundle}", "order.count=1", "order.sampler.steps=1"]
    few += ["order.condition.kind=null"]
    for seed in (1, 2):
        job.main([*few, f"order.seed={seed}", f"out={tmp_path}/img #{seed}"])
    for seed in (1, 2):
        order = json.loads((tmp_path / f"img #{seed}" / "order.json").read_text())
        assert (order["seed"], order["condition"]["kind"]) == (seed, "null")


def test_an_order_becomes_marked_files(words, law_order, law_image, tmp_path, capsys):
    job.main([*words, f"out={tmp_path}"])
    image, text = images.read_png(str(tmp_path / "image.png"))
    np.testing.assert_array_equal(image, law_image)
    report = json.loads((tmp_path / "report.json").read_text())
    order = parse(json.loads((tmp_path / "order.json").read_text()))
    assert order == parse(law_order)
    assert text["Synthetic"] == "true"
    assert text["Origin"] == "novel"
    assert text["Bundle"] == report["bundle"]
    assert parse(json.loads(text["Order"])) == order
    assert images.read_png(str(tmp_path / "guide.png"))[1] == text
    assert report["stages"]["sample"]["requests"] == 21
    assert {"start", "write"} < report["stages"].keys()
    assert 0 < report["cross_scale_error"] < 10
    assert report["seam_ratio"] > 0
    assert report["meaning"].keys() == {"cross_scale_error", "seam_ratio"}  # 2 x 3 windows
    assert {"raylarge", "torch"} < report["versions"].keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "guide.png", "image.png", "image.tif", "order.json", "report.json",
    ]  # fmt: skip
    assert "cross scale error" in capsys.readouterr().out

    before = (tmp_path / "image.png").stat().st_mtime_ns
    job.main([*words, f"out={tmp_path}"])
    assert "nothing is left to do" in capsys.readouterr().out
    assert (tmp_path / "image.png").stat().st_mtime_ns == before

    with pytest.raises(
        UserError, match=r"order\.seed=0, not 1.*choose another out=.*overwrite=true"
    ):
        job.main([*words, f"out={tmp_path}", "order.seed=1"])
    assert (tmp_path / "image.png").stat().st_mtime_ns == before
    job.main([*words, f"out={tmp_path}", "order.seed=1", "overwrite=true"])
    assert (pixels(tmp_path) != law_image).any()


def test_window_lines_stand_beside_the_seam_ratio(tiny_bundle, tmp_path, capsys):
    words = ["order.size=256x64", "order.sampler.steps=1", f"out={tmp_path}"]
    job.main([f"bundle={tiny_bundle}", *words])
    report = json.loads((tmp_path / "report.json").read_text())
    image = images.to_float(pixels(tmp_path))
    assert report["window_lines"] == pytest.approx(window_lines(image, 64), rel=1e-9)
    assert "above 3" in report["meaning"]["window_lines"]
    said = capsys.readouterr().out
    assert f"window lines: {report['window_lines']:.3f} (a grid of windows in rows" in said
    assert f"seam ratio: {report['seam_ratio']:.3f} (gradients across window borders" in said


def test_patches_become_a_mosaic(tiny_bundle, tmp_path):
    words = ["order.count=3", "order.scale=1", "order.sampler.steps=1", f"out={tmp_path}"]
    job.main([f"bundle={tiny_bundle}", *words])
    image = pixels(tmp_path)
    assert image.shape == (128, 128, 3)
    assert (image[64:, 64:] == 255).all()
    assert not (tmp_path / "guide.png").exists()


def test_a_reference_conditions_the_image(tiny_bundle, prepared, tmp_path, capsys):
    words = [f"bundle={tiny_bundle}", "order.size=128x192", "order.sampler.steps=1"]

    def grid(*more, at):
        out = tmp_path / at
        job.main([*words, f"out={out}", *more])
        assert images.read_png(str(out / "image.png"))[1]["Origin"] == "derived from a real image"
        return parse(json.loads((out / "order.json").read_text())).condition.grid()

    first = grid(f"reference={prepared}", at="first")
    says = capsys.readouterr().out
    assert "reference: slide s-1, at=3,3 (2 x 3 base tiles; its right neighbour is at=3,6)" in says
    kept = json.loads((tmp_path / "first" / "report.json").read_text())["reference"]
    assert kept == {"slide": "s-1", "row": 3, "column": 3, "rows": 2, "columns": 3}
    assert first.shape == (2, 3, 8)
    np.testing.assert_array_equal(first[0, 0], [3, 3, 1, 2, 3, 4, 5, 6])
    placed = grid(f"reference={prepared}:s-1", "at=6,4", at="placed")
    np.testing.assert_array_equal(placed[1, 2], [7, 6, 1, 2, 3, 4, 5, 6])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["bundle=nowhere"], "there is no bundle at"),
        (["bundle="], "bundle= is empty"),
        (["bundle=s3://"], "bundle=s3:// names no bucket"),
        (["out="], "out= is empty"),
        (["out=s3://"], "out=s3:// names no bucket"),
        (["order.size=100"], "multiples of the patch side 64"),
        (["order.sampler.stepz=3"], "did you mean 'order.sampler.step"),
        (["sampler.steps=3"], r"unknown key 'sampler.steps'; did you mean 'order.sampler.steps'\?"),
        (
            ["order.source.octaves=two"],
            "order.source.octaves=two does not fit; give a whole number",
        ),
        (["order.scale=-1"], "order.scale=-1: it must be from 0 to 30"),
        (["order.levels=[1e999]"], r"levels=\[1e999\] does not fit; give a list of scales"),
        (["order.seed=" + "9" * 400], "order.seed=9+… .400 characters. does not fit"),
        (
            ["order.sampler.guidance=1e308"],
            "order.sampler.guidance=1e.308: it must be from 0 to 100",
        ),
        (
            ["order.sampler.correction_lr=1e308"],
            "order.sampler.correction_lr=1e.308: it must be from 0 to 100",
        ),
        (["order.sampler=3"], "sampler=3 does not fit; give its keys one by one"),
        (["order.size=${{oc.env:HOME}}"], "give a number of pixels"),
        (["seed=3"], "unknown key 'seed'"),
        (["workers=-1"], "workers=-1: it must be at least 0"),
        (["reference={data}:other"], "has no slide 'other'; it has: s-1"),
        (["reference={data}/nothing"], "there are no embeddings yet; run python jobs/prepare.py"),
        (
            ["reference={data}", "order.size=512"],
            "nowhere has 8 x 8 embedded.*gives order.size=320; or",
        ),
        (["reference={data}", "at=3,2"], "no embeddings for all of the 2 x 3 base tiles"),
        (["reference={data}", "at=here"], "at=here does not fit; give a row and a column"),
        (["reference={data}", "at=1_0,3"], "at=1_0,3 does not fit; give a row and a column"),
        (["reference={data}", "at=3,5,7"], "at=3,5,7 does not fit; give a row and a column"),
        (["reference={data}", "order.condition.kind=cdm"], "leave out order.condition"),
        (["at=3,5"], "at= places a region: give reference="),
        (["negative=blur"], "negative= goes with text=: give text="),
        (["text=a", "reference={data}"], "text= and reference= are two conditions"),
        (["text=a", "order.condition.kind=cdm"], "text= is the condition .*condition.kind"),
        (["image=a.png", "order.algorithm=joint"], "superres, not joint"),
        (["order.size=0x200"], "size=0x200 does not fit; give a number of pixels"),
    ],
)
def test_a_mistake_is_one_sentence_and_starts_nothing(tiny_bundle, prepared, tmp_path, wrong, says):
    words = [f"bundle={tiny_bundle}", "order.size=128x192", f"out={tmp_path}", "workers=3"]
    with pytest.raises(UserError, match=says):
        job.main([*words, *[word.format(data=prepared) for word in wrong]])
    assert not list(tmp_path.iterdir())


def test_a_missing_bundle_ends_with_status_2_and_one_line_even_without_ray(tmp_path):
    code = "import runpy, sys; sys.modules['ray'] = None; sys.argv.remove('-c')"
    run = f"{code}; runpy.run_path('jobs/sample.py', run_name='__main__')"
    words = [f"bundle={tmp_path}/none", f"out={tmp_path}/o", "order.size=64"]
    done = subprocess.run(
        [sys.executable, "-c", run, "jobs/sample.py", *words],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "there is no bundle at" in done.stderr


@pytest.mark.ray
def test_law_4_actors_give_the_files_that_this_process_gives(
    ray_session, words, law_image, tmp_path
):
    job.main([*words, f"out={tmp_path}", "workers=2"])
    np.testing.assert_array_equal(pixels(tmp_path), law_image)
    assert json.loads((tmp_path / "report.json").read_text())["stages"]["sample"]["requests"] == 21


def test_an_image_is_made_larger_and_the_price_is_told(tiny_bundle, tmp_path, capsys):
    rng = np.random.default_rng(0)
    images.write_png(str(tmp_path / "small.png"), rng.integers(0, 255, (64, 96, 3), np.uint8), {})
    words = [f"bundle={tiny_bundle}", f"image={tmp_path / 'small.png'}", "order.source.octaves=1"]
    words += ["order.sampler.steps=1", "order.sampler.derivative=difference", "order.batch=4"]
    job.main([*words, f"out={tmp_path / 'priced'}", "dry_run=true"])
    said = capsys.readouterr().out
    assert "U-Net evaluations" in said
    assert "GPU-seconds at 200 TFLOP/s" in said
    (line,) = (one for one in said.splitlines() if "expected on this machine" in one)
    assert 0 < float(line.split()[-2]) < 600
    assert not (tmp_path / "priced").exists()
    job.main([*words, f"out={tmp_path / 'made'}"])
    image, text = images.read_png(str(tmp_path / "made" / "image.png"))
    assert image.shape == (128, 192, 3)
    assert text["Origin"] == "derived from a real image"
    assert json.loads(text["Order"])["source"]["image"] == ""
    report = json.loads((tmp_path / "made" / "report.json").read_text())
    assert report["evaluations"]["encode"] == 2 * 8
    assert report["phases_s"]["DenoiseWindows"] > 0
    assert report["flops"] > 0
    assert report["tflops_reached"] > 0
    assert report["peak_memory_bytes"] > 1 << 20


def test_a_pyramid_says_how_large_its_pixels_are(tiny_bundle, tmp_path):
    from raylarge.slides.reader import open_slide

    words = [f"bundle={tiny_bundle}", "order.size=128", "order.scale=1", "order.sampler.steps=1"]
    job.main([*words, "order.sampler.derivative=difference", f"out={tmp_path}"])
    with open_slide(str(tmp_path / "image.tif"), None, 1.0) as slide:
        assert slide.mpp == pytest.approx(1.0, rel=1e-3)
