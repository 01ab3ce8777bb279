"""benchmarks/: they run, and the published loop computes our image."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bundles, gpu, memory, sample
from raylarge.errors import UserError

ROOT = Path(__file__).parents[1]


def test_the_published_loop_computes_our_image(one_thread):
    assert sample.disagreement() < sample.AGREE


def test_the_autoencoder_without_weights_is_orthogonal():
    x, z = torch.randn(1, 3, 16, 16), torch.randn(1, 3, 4, 4)
    blocks = bundles.Blocks()
    torch.testing.assert_close(blocks.encode(blocks.decode(z)), z)
    torch.testing.assert_close((blocks.encode(x) * z).sum(), (x * blocks.decode(z)).sum())


def test_memory_is_told_by_phase(tmp_path):
    found = memory.carry_out("512", 1, 4, str(tmp_path))
    assert {"plan", "guide", "windows", "decode", "ledger", "write"} <= found["mib"].keys()
    assert max(found["mib"].values()) > 0
    assert (tmp_path / "image.png").exists()


def test_sampling_writes_its_page(one_thread, tmp_path, capsys):
    page = tmp_path / "page.md"
    words = ["quick=true", "side=2", "shares=2,1", f"out={page}"]
    sample.main([*words, "only=speed,strides,conditions"])
    text = page.read_text()
    assert "published loop, one window per call" in text
    assert "| 32 | 49 |" in text
    assert "## What falls short" in text
    assert "cross-scale error" in capsys.readouterr().out


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
