"""The demo at its smallest: every stage real, then a second run that skips them all."""

import json
import subprocess
import sys

import numpy as np
import pytest

from jobs.demo_slides import separated
from jobs.demo_summary import captions, measures, summary
from raylarge import images, order
from raylarge.slides import procedural


def test_slides_are_separated_by_commas_or_spaces(tmp_path):
    spaced = tmp_path / "my slide.tif"
    spaced.touch()
    assert separated("a.svs,b.tif") == separated("a.svs b.tif") == "a.svs,b.tif"
    assert separated(" a.svs ,  b.tif,") == "a.svs,b.tif"
    assert separated(f"{spaced},b.tif") == f"{spaced},b.tif"
    assert separated(f"{tmp_path}/my*.tif b.tif").split(",") == [f"{tmp_path}/my*.tif", "b.tif"]
    assert separated("s3://b/a.svs s3://b/*.tif") == "s3://b/a.svs,s3://b/*.tif"


def test_the_closing_table_compares_with_no_condition():
    image = {"cross_scale_error": 0.2, "seam_ratio": 1.1}
    loss = {"3": {"true": 0.5766, "shuffled": 0.6573, "null": 0.5675}}
    text = summary({"images": {"reference": image, "uncorrected": image}, "loss": loss})
    assert "0.6573 (+14.0%)  0.5675 (-1.6%)" in text
    assert "scale 3: no condition at all does better than the true one" in text
    assert "window lines" not in text  # of small images there is no such figure
    figures = {"images": {"reference": image | {"window_lines": 1.5}, "uncorrected": image}}
    assert "above 3: a grid)  1.5" in summary(figures | {"loss": loss})
    assert (captions(2, 0.5), captions(0, None)) == ("scale 2, 2 um/px", "scale 0")


@pytest.mark.parametrize(("side", "lines"), [(3, False), (4, True)])
def test_lines_are_measured_where_there_are_windows_enough(side, lines):
    image = np.random.default_rng(0).integers(0, 255, (32 * side, 32 * side, 3), np.uint8)
    assert ("window_lines" in measures(image, image[:32, :32], 32)) == lines


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_the_thread_from_slide_to_served_images(tmp_path):
    slide, out = tmp_path / "slide.tiff", tmp_path / "demo"
    procedural.write(str(slide), (1280, 1280), seed=3)
    command = [sys.executable, "jobs/demo.py", f"slides={slide}", f"out={out}", "size=128"]
    command += ["minutes=0.1", "workers=1"]
    first = subprocess.run(command, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stdout + first.stderr
    facts = json.loads((out / "report.json").read_text())
    stages = ["slide", "prepare", "train vae", "encode", "train ldm", "train cdm", "patches"]
    assert {*stages, "serve", "check"} <= facts["stages"].keys()
    assert facts["stages"]["train ldm"]["steps"] > 0
    for name in ("reference", "novel", "uncorrected"):
        image, text = images.read_png(str(out / "images" / name / "image.png"))
        assert image.shape == (128, 128, 3)
        assert image.std() > 0
        assert text["Synthetic"] == "true"
        assert order.parse(json.loads(text["Order"])).seed == 7
    assert text["Origin"] == "derived from a real image"
    # An autoencoder trained for seconds cannot guide: the oracle law is tested elsewhere.
    errors = facts["stages"]["check"]["images"]
    corrected, plain = (errors[n]["cross_scale_error"] for n in ("reference", "uncorrected"))
    assert 0 < corrected != plain > 0
    assert {"true", "shuffled", "null"} <= facts["stages"]["check"]["loss"]["0"].keys()
    assert str(tmp_path) not in (out / "report.json").read_text()
    assert facts["seconds_total"] > 0
    assert facts["peak_memory_bytes"] > 100 << 20
    for words in ("no condition", "all stages together: ", "peak memory of this process"):
        assert words in first.stdout
    assert (out / "logs").is_dir()

    before = (out / "images" / "novel" / "image.png").stat().st_mtime_ns
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stdout + second.stderr
    assert second.stdout.count("done before") == len(stages) + 2
    assert (out / "images" / "novel" / "image.png").stat().st_mtime_ns == before
