"""benchmarks/data*.py: the pieces run, and rivals see our pixels; nothing here is timed."""

import json

import numpy as np
import openslide
import pytest

from benchmarks import (
    data,
    data_makers,
    data_memory,
    data_plan,
    data_rivals,
    data_slides,
    data_speed,
)
from benchmarks.data_makers import Timing, steady
from benchmarks.data_speed import BATCH, DataMeasure, agreement
from raylarge.data.embed_config import EmbedConfig
from raylarge.errors import UserError
from raylarge.slides.reader import open_slide


@pytest.fixture(scope="module")
def measure(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    values = {"pairs": 1, "units": 1, "rows": 4, "block": 30, "minutes": 0.0}
    return DataMeasure(folder, **values, workers=2, cost_ms=0.1)


@pytest.fixture(scope="module")
def slide(measure):
    return measure.part(measure.twenty)


def job(measure, slide, cost_s=None):
    return measure.job(slide, EmbedConfig(encoder="toy", batch=BATCH), measure.block, cost_s)


def test_slides_are_aperio_s_with_levels(measure):
    for slides, mpp in ((measure.twenty, 0.5), (measure.forty, 0.25)):
        with openslide.OpenSlide(slides.paths[0]) as found:
            assert found.properties["openslide.vendor"] == "aperio"
            assert [side for side, _ in found.level_dimensions] == [3840, 960, 240]
            assert float(found.properties["openslide.mpp-x"]) == mpp
            assert "thumbnail" in found.associated_images
        with open_slide(slides.paths[0]) as ours:
            assert ours.mpp == mpp
        assert slides.grid == (int(7680 * mpp) // 256,) * 2


def test_the_picture_is_real_or_procedural(monkeypatch, tmp_path, shared_data):
    real, name = data_slides.picture()
    assert "real" in name
    assert real.shape == (data_slides.UNIT_PX, data_slides.UNIT_PX, 3)
    monkeypatch.setattr(data_slides, "SHARED", tmp_path)
    monkeypatch.setattr(data_slides, "UNIT_PX", 480)
    made, name = data_slides.picture()
    assert "procedural" in name
    assert made.shape == (480, 480, 3)
    assert made.std() > 5


def test_rivals_see_our_pixels(measure, slide, one_thread):
    assert "the same pixels, asserted" in agreement(slide)
    assert "differ by" in agreement(measure.forty)


def test_everybody_embeds_all_cells(measure, slide, one_thread):
    ours = job(measure, slide)
    assert slide.grid == (4, 15)
    assert data_makers.here(ours).tiles == slide.tiles == 60
    seen = []
    assert data_rivals.loop(slide, lambda images: seen.append(len(images)), 40).tiles == 60
    assert seen == [40, 20]
    for workers in (0, 2):
        assert data_rivals.clam(slide, "toy", 40, workers).tiles == 60
    assert data_rivals.clam(slide, None, 40, 0).tiles == 60


def test_copies_have_names_of_their_own(measure, slide, tmp_path):
    many = slide.copies(3, tmp_path)
    assert many.tiles == 3 * slide.tiles
    assert len(job(measure, many).units) == 3 * len(job(measure, slide).units)


def test_plain_processes_make_the_parts_of_this_process(measure, slide, one_thread):
    ours = job(measure, slide, 0.0)
    parts = measure.folder / ours.root / "embeddings"
    data_makers.here(ours)
    names = sorted(path.name for path in parts.iterdir())
    found = data_makers.plain(ours, 2)
    assert sorted(path.name for path in parts.iterdir()) == names
    assert found.tiles == 60


def test_an_encoder_that_sleeps_takes_its_time(measure, slide):
    assert data_makers.here(job(measure, slide, 0.002)).whole_s > 60 * 0.002
    assert not data_makers.Sleeper(0.0)(np.zeros((3, 8, 8, 3), np.uint8)).any()


def test_the_steady_rate_begins_when_all_have_finished_a_part():
    def part(pid, began, ended):
        return {"pid": pid, "began": began, "ended": ended, "tiles": 10}

    alone = [part(1, 0, 5), part(1, 5, 6), part(1, 6, 7)]
    assert steady(alone) == 10  # 20 tiles in 2 s: the first part does not count
    both = [*alone, part(2, 3, 6), part(2, 6, 7)]
    assert steady(both) == 20  # from 6 to 7 s
    assert steady([part(1, 0, 5)]) == 0
    assert Timing.of([{**alone[0], "cpu_s": 1.0}], -1, 9).steady == 2  # of all parts


SECTIONS = {"read": 24, "overhead": 3, "scaling": 7}


@pytest.mark.parametrize(
    "names", [["overhead"], pytest.param(list(SECTIONS), marks=pytest.mark.slow)]
)
def test_sections_have_a_row_for_everybody(measure, one_thread, monkeypatch, names):
    for name in ("on_ray", "plain"):  # who does the work is not what is looked at
        monkeypatch.setattr(data_makers, name, lambda job, workers: data_makers.here(job))
    monkeypatch.setattr(data_slides, "REAL", measure.folder / "absent.svs")
    sections = {name: getattr(data_speed, name)(measure) for name in names}
    assert {name: len(section.rows) for name, section in sections.items()} == {
        name: SECTIONS[name] for name in names
    }
    for section in sections.values():
        assert all(len(row) == len(section.header) for row in section.rows)
    assert set(measure.samples) >= set(names)


def test_flops_of_uni():
    assert data_plan.vit_flops() / 2e9 == pytest.approx(61.6, abs=0.1)


def test_the_slowest_resource_binds():
    costs = data_plan.Costs({1: 1.0, 2: 5.0}, {1: 20.0, 2: 25.0}, {1: 3.0, 2: 8.0}, 100, 20)
    rows = data_plan.rows_of(data_plan.Cluster(8), costs)
    assert len(rows) == 6
    by_stage = {row[1]: row for row in rows}
    assert by_stage["embed, 20x slides"][-1] == "GPUs"
    assert by_stage["shard, 20x, PNG"][-1] == "store"
    slow = data_plan.rows_of(data_plan.Cluster(8, cores_per_gpu=1), costs)
    assert slow[0][-1] == "cores"
    large = data_plan.rows_of(data_plan.Cluster(64), costs)
    assert [row[-1] for row in large] == [row[-1] for row in rows]


@pytest.mark.slow
def test_memory_is_told_by_verb(measure, tmp_path):
    small = measure.create_slide("memory", (1, 1), 0.5)
    found = data_memory.measured(small, tmp_path / "out", 0)
    assert set(found["mib"]) == {"driver"}
    assert set(found["mib"]["driver"]) == {"tile", "embed", "shard"}
    assert min(found["mib"]["driver"].values()) > 100
    assert found["examples_mb"] > 1


def test_a_part_that_nobody_knows_is_refused():
    with pytest.raises(UserError, match="read, overhead, scaling, memory, plan"):
        data.main(["quick=true", "only=colour"])


@pytest.mark.slow
@pytest.mark.ray
def test_the_quick_run_is_whole(tmp_path, capsys):
    data.main(["quick=true", f"out={tmp_path}/page.md"])
    text = (tmp_path / "page.md").read_text()
    for title in ("Reading and embedding", "One worker of Ray", "Several workers", "Peak memory"):
        assert f"## {title}" in text
    found = json.loads((tmp_path / "page.json").read_text())
    assert set(found["samples"]) == {"read", "overhead", "scaling", "memory", "plan"}
    assert len(found["tables"]) == 5
