"""benchmarks/train_memory.py: its tables are whole and its comparison points the right way."""

import pytest

from benchmarks import train_memory
from raylarge.errors import UserError
from raylarge.train.estimate.plan import PlanConfig

TINY = {
    "precision": "bf16",
    "checkpointing": True,
    "optimizer": "adamw8bit",
    "ldm": {
        "unet": {"channels": [32, 64], "attention": [False, True], "layers": 1, "groups": 8},
        "summarizer": {"kind": "vector", "width": 64},
    },
}


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(train_memory, "_KNOWN", {})


def cells(section, name):
    return [row[section.header.index(name)] for row in section.rows]


def test_patches_against_whole_images(monkeypatch):
    monkeypatch.setattr(train_memory, "overrides", lambda model, preset: TINY)
    section = train_memory.patches(PlanConfig())
    assert cells(section, "attention") == ["fused", "whole matrix"] * 2
    assert cells(section, "largest batch, quoted") == ["100", "100", "4", "4"]
    patch, patch_whole, image, image_whole = map(int, cells(section, "largest batch, 24 GB"))
    assert patch_whole <= patch
    assert 0 < image_whole < image < patch / 10
    hours = [float(cell) for cell in cells(section, "times the patches'")]
    assert hours[:2] == [1.0, 1.0]
    assert min(hours[2:]) > 1
    assert all(len(row) == len(section.header) for row in section.rows)
    assert f"gives {patch_whole} and {image_whole} on 24 GB" in section.notes[1]


def test_presets_have_their_rows(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(train_memory, "PUBLISHED", {"small": train_memory.SMALL})
    page = tmp_path / "page.md"
    train_memory.main(["only=presets", "card.utilisation=0.1", f"out={page}"])
    text = page.read_text()
    assert "| small | ldm | 41.6 M | 1 x 1 x 256 |" in text
    assert "| small | cdm | 22.0 M |" in text
    assert "At 10% of 989.4 TFLOP/s" in capsys.readouterr().out


def test_a_table_that_nobody_knows_is_refused():
    with pytest.raises(UserError, match="only=x is not of patches, stages, presets"):
        train_memory.main(["only=x"])
