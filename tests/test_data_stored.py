"""A data folder of an earlier version: its parts stay whole, and none is made again."""

import shutil
from pathlib import Path

import pytest

from raylarge import config, storage, tables
from raylarge.data.prepare import Prepare, prepare
from raylarge.data.units import SlideFacts
from raylarge.report import Report

STORED = Path(__file__).parent / "data" / "prepared"
TILE = {
    "patch_px": 16,
    "scales": [0, 1],
    "tissue": [0.3, 0.2],
    "crops": 4,
    "split": "band",
    "val_fraction": 0.35,
    "block_tiles": 30,
}


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(STORED, tmp_path / "stored")


def test_parts_of_an_earlier_version_are_not_made_again(folder):
    """The folder was written by commit 9ce0d49, with dicts for units and facts."""
    before = {path: path.read_bytes() for path in folder.rglob("*.parquet")}
    values = {
        "slides": f"{folder}/tiny.tif",
        "out": f"{folder}/data",
        "verbs": "tile,embed,shard,text_embed",
        "tile": TILE,
        "embed": {"encoder": "toy", "batch": 8},
        "shard": {"buckets": 2, "group_rows": 7},
        "text_embed": {"image": True, "model": "toy"},
    }
    done = prepare(config.build(Prepare, values), Report(f"{folder}/report.json"))
    assert [facts["made"] for facts in done.values()] == [0, 0, 0, 0]
    assert done["shard"]["blocks_made"] == 0
    assert [facts["rows"] for facts in done.values()] == [119, 10, 75, 75]
    assert {path: path.read_bytes() for path in folder.rglob("*.parquet")} == before
    assert tables.rows(f"{folder}/data", "examples").num_rows == 75


def test_stored_slides_keep_their_keys(folder):
    (stored,) = storage.read_json(f"{folder}/data/slides.json")["slides"]
    slide = SlideFacts.from_json(stored, "a.tif")
    assert (slide.tiling_digest, slide.coverage_digest) == (stored["cells"], stored["covers"])
    assert slide.as_json() == stored
    older = {key: value for key, value in stored.items() if key not in ("view", "notes")}
    assert (SlideFacts.from_json(older).view, SlideFacts.from_json(older).notes) == (0, ())
