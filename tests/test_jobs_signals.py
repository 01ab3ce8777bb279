"""SIGTERM and SIGHUP end the jobs that use Ray in order, and the same command goes on."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from jobs import prepare, train
from raylarge.slides import procedural

ROOT = Path(__file__).parents[1]
TILES = ["tile.patch_px=64", "tile.scales=[0,1,2]", "tile.tissue=[0.3,0.2]", "tile.block_tiles=30"]
SPLIT = ["tile.split=band", "tile.val_fraction=0.35", "embed.encoder=toy"]
VAE = [
    "model=vae",
    "vae.width=8",
    "vae.blocks=1",
    "batch=4",
    "super_block=1",
    "validate=0",
    "track=none",
]


def stopped(job, words, number, ready):
    """Start a job, send it a signal as soon as `ready()` holds, and return what it printed."""
    process = subprocess.Popen(
        [sys.executable, f"jobs/{job}.py", *words],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    offspring = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 128 + number, output + errors
    last = errors.strip().splitlines()[-1].strip()
    assert last == f"stopped by {number.name}; run the same command again to go on"
    for trace in ("Traceback", "Check failed", "** SIG", "core_worker"):
        assert trace not in output + errors
    assert len(offspring) > 2
    assert psutil.wait_procs(offspring, timeout=60)[1] == []
    return output


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_signal_stops_the_workers_of_prepare(tiny_slide, tmp_path):
    words = [f"slides={tiny_slide}", *TILES, *SPLIT]
    out = tmp_path / "data"
    more = [*words, f"out={out}"]
    stopped("prepare", [*more, "workers=2"], signal.SIGTERM, (out / "tile.json").exists)
    assert not (out / "shard.json").exists()
    assert not list(tmp_path.rglob(".lock"))
    prepare.main(more)
    prepare.main([*words, f"out={tmp_path}/whole"])
    digests = [json.loads((tmp_path / f / "shard.json").read_text()) for f in ("data", "whole")]
    assert digests[0]["digest"] == digests[1]["digest"]


@pytest.mark.ray
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)]
)
def test_a_signal_stops_the_workers_of_a_training(small_examples, tmp_path, number):
    words = [*VAE, f"data={small_examples}", f"out={tmp_path}", "checkpoint_every=1"]
    words += ["log_every=1"]
    commits = lambda: sorted(tmp_path.glob(".train/vae/step-*/checkpoint.json"))  # noqa: E731
    stopped("train", [*words, "workers=2", "steps=1000000"], number, commits)
    assert not list(tmp_path.rglob(".lock"))
    step = max(int(path.parent.name.split("-")[1]) for path in commits())
    train.main([*words, f"steps={step + 1}"])
    rows = (tmp_path / ".train/vae/loss.csv").read_text().splitlines()[1:]
    assert [int(row.split(",")[0]) for row in rows] == list(range(1, step + 2))
    assert json.loads((tmp_path / ".train/vae/facts.json").read_text())["step"] == step + 1


@pytest.mark.ray
@pytest.mark.timeout(600)
@pytest.mark.slow
def test_a_signal_stops_the_demo(tmp_path):
    slide, out = tmp_path / "slide.tiff", tmp_path / "demo"
    procedural.write(str(slide), (1280, 1280), seed=3)
    words = [f"slides={slide}", f"out={out}", "size=128", "minutes=10", "workers=2"]
    running = (out / "bundle" / ".train" / "vae" / "config.json").exists
    output = stopped("demo", words, signal.SIGTERM, running)
    assert "train vae ..." in output
    assert "prepare" in json.loads((out / "report.json").read_text())["stages"]
