"""benchmarks/: they run, and the published loop computes our image."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import bundles, gpu, memory, quality, sample
from raylarge.errors import UserError
from raylarge.evaluate.references import ReferenceExample
from raylarge.models.bundle import load

ROOT = Path(__file__).parents[1]


def test_the_published_loop_computes_our_image(one_thread):
    assert sample.disagreement() < sample.AGREE


def test_the_autoencoder_without_weights_is_orthogonal():
    x, z = torch.randn(1, 3, 16, 16), torch.randn(1, 3, 4, 4)
    blocks = bundles.Blocks()
    torch.testing.assert_close(blocks.encode(blocks.decode(z)), z)
    torch.testing.assert_close((blocks.encode(x) * z).sum(), (x * blocks.decode(z)).sum())


@pytest.mark.slow
def test_memory_is_told_by_phase():
    """In a process of its own: here other tests have left memory that is taken again."""
    found = memory.measured("512", 1, 4)
    assert {"plan", "guide", "windows", "decode", "ledger", "write"} <= found["mib"].keys()
    assert max(found["mib"].values()) > 0


def test_sampling_writes_its_page(one_thread, tmp_path, capsys):
    page = tmp_path / "page.md"
    words = ["quick=true", "side=2", "shares=2,1", f"out={page}"]
    sample.main([*words, "only=speed,strides"])
    text = page.read_text()
    assert "published loop, one window per call" in text
    assert "| 32 | 49 |" in text
    assert "## What falls short" in text
    assert "times ours, median" in capsys.readouterr().out


@pytest.mark.slow
def test_choices_are_judged_by_pictures(tiny_bundle, one_thread):
    """Every way is carried out and has its figures; the features are means of colour here."""
    random = np.random.default_rng(0)

    def example(side):
        grid = random.normal(size=(side, side, 8)).astype(np.float16)
        return ReferenceExample(
            random.integers(0, 255, (64, 64, 3), np.uint8), grid, random.random()
        )

    judge = quality.ImageJudge(
        load(tiny_bundle),
        lambda pixels: pixels.reshape(len(pixels), -1)[:, :8].astype(np.float32) / 255,
        [example(1) for _ in range(12)],
        [example(2) for _ in range(3)],
        side=2,
        seeds=1,
        steps=1,
    )
    sections = [quality.conditions(judge, 0.1), quality.constraints(judge)]
    judge.steps = 5
    sections.append(quality.trading(judge))
    for section, ways in zip(sections, (5, 6, 6), strict=True):
        assert len(section.rows) == ways
        assert all(len(row) == len(section.header) for row in section.rows)
        assert len({tuple(row[2:]) for row in section.rows}) > ways - 3  # ways differ
    assert sections[1].rows[5][2] == "–"  # strided sampling has no guide


def test_pictures_are_judged_of_a_trained_bundle_alone():
    with pytest.raises(UserError, match="give bundle=DIR data=DIR"):
        sample.main(["quick=true", "only=trading"])


def test_a_part_that_nobody_knows_is_refused():
    with pytest.raises(UserError, match="speed, strides, memory, conditions"):
        sample.main(["quick=true", "only=colour"])


@pytest.mark.slow
def test_the_quick_run_is_whole(tmp_path):
    words = [sys.executable, "-m", "benchmarks.sample", "quick=true", f"out={tmp_path}/page.md"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Peak memory above an idle process" in (tmp_path / "page.md").read_text()


def test_the_gpu_benchmark_on_a_cpu_without_ray(tmp_path):
    # In a process of its own: other tests have imported Ray here.
    words = [sys.executable, "-m", "benchmarks.gpu", "device=cpu", "tiny=true"]
    words.append(f"out={tmp_path}/page.md")
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    text = (tmp_path / "page.md").read_text()
    assert "Joint images, recipe `paper`" in text
    assert "| 960 | 64 |" in text


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="there is no CUDA device here"):  # ends with status 2
        gpu.main([])
