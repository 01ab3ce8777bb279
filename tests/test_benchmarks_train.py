"""benchmarks/train*.py: the pieces run, and all ways train alike; nothing here is timed."""

import json
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import train, train_figures, train_runs, train_tables
from benchmarks.train import TrainBench, TrainMeasure
from benchmarks.train_figures import Median
from benchmarks.train_runs import LOOPS, Timings, Way
from raylarge.errors import UserError
from raylarge.train import launch
from raylarge.train.ingest import Ingest
from raylarge.train.task import Recipe


@pytest.fixture
def measure(tmp_path, one_thread):
    return TrainMeasure(TrainBench(rounds=2, steps=6, network="toy"), tmp_path)


def test_a_table_has_the_rows_that_are_asked_for(tmp_path):
    train_tables.write(str(tmp_path), (3, 1), (1000, 300), (3, 8, 8), channels=5)
    rows = Ingest(str(tmp_path), {"latents-0": ("latent", "grid")}, Recipe())
    assert rows.facts.counts == {0: 6 * 3 * 64, 1: 5 * 64}  # whole mentions of the file
    batch = rows.batch(range(700))
    assert batch["latent"].shape == (700, 3, 8, 8)
    assert batch["grid"].shape == (700, 64, 5)
    cells = batch["grid_rows"] * batch["grid_columns"]
    assert ((batch["grid"] != 0).all(dim=2).sum(dim=1) == cells).all()
    assert set(cells.tolist()) == {1, 4}


def test_a_table_cannot_have_more_of_the_coarse(tmp_path):
    with pytest.raises(ValueError, match="a mention lists the first row groups"):
        train_tables.write(str(tmp_path), (1, 1), (64, 128), (3, 8, 8), channels=5)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_bare_loop_trains_as_the_twin_does(measure, loop, tmp_path):
    config = replace(measure.config, steps=12)
    path = str(tmp_path / "times.npy")
    bare = train_runs.run_way(Way("bare", config, loop), path)
    assert np.load(path).shape == (12, 2)
    twin = launch.train(config, train_runs.silent)
    assert bare["first_loss"] == pytest.approx(twin["first_loss"], rel=1e-6)
    assert bare["loss"] == pytest.approx(twin["loss"], rel=1e-5)
    assert bare["loss"] != bare["first_loss"]


@pytest.fixture
def in_process(monkeypatch):
    """Runs stay in this process, where torch is already imported."""
    monkeypatch.setattr(train_runs, "_isolated", lambda function, *values: function(*values))


def test_runs_are_timed_after_warming_up(measure, in_process):
    ways = [Way("bare", measure.config, LOOPS[0]), Way("twin", measure.config)]
    timings = train_runs.compare(ways, steps=6, rounds=2)
    assert timings.facts["twin"]["step"] == train_runs.WARMUP + 6 + 1
    assert list(timings.seconds) == ["bare", "twin"]
    for seconds in timings.seconds.values():
        assert seconds.shape == (2, 6, 2)
        assert (seconds > 0).all()


def test_an_error_of_a_run_is_raised(measure, tmp_path):
    ways = [Way("other", replace(measure.config, data=str(tmp_path / "nothing")))]
    with pytest.raises(UserError, match=r"jobs/prepare\.py"):
        train_runs.compare(ways, steps=6, rounds=1)


def test_differences_are_computed_within_rounds():
    noise = np.arange(9.0)[:, None, None]
    first = np.full((9, 4, 2), 0.1) + noise
    timings = Timings({"a": first, "b": first + np.array([0.002, 0.003])})
    wall, cpu = train_figures.over_first(timings, "b")
    assert tuple(wall) == pytest.approx((2.0, 2.0, 2.0))
    assert tuple(cpu.share) == pytest.approx((0.006, 0.006, 0.006))
    rows = train_figures.table([timings])
    assert rows[0][3:] == ["–"] * 6
    assert rows[1][3:5] == ["+2.00", "+2.00 to +2.00"]
    assert rows[1][-2:] == ["+0.4%", "+0.6%"]
    assert all(len(row) == len(train_figures.HEADER) for row in rows)


def test_an_interval_holds_the_median():
    median = Median.of(np.random.default_rng(1).normal(5.0, 1.0, 400))
    assert median.low < median.value < median.high
    assert median.low == pytest.approx(5.0, abs=0.3)
    assert 0.05 < median.high - median.low < 0.5


def test_a_checkpoint_costs_what_is_above_the_steps_before_it():
    seconds = np.full((5, 8, 2), 0.1)
    seconds[:, 3] += (0.05, 0.02)  # the step that is stopped
    seconds[:, 4] += (0.01, 0.03)  # while the thread writes
    stall, after, work = train_figures.checkpoint(seconds)
    assert [each.value for each in (stall, after, work)] == pytest.approx([50, 10, 50])


def test_resuming_and_rows_make_a_page(tmp_path, one_thread, capsys):
    page = tmp_path / "page.md"
    train.main(["quick=true", "only=resume,ingest", f"out={page}"])
    text = page.read_text()
    assert "## Resuming at step 1,000,000" in text
    assert "1,536 rows of 2 scales in 24 row groups" in text
    assert "| all 2 scales alike |" in text
    document = json.loads(page.with_suffix(".json").read_text())
    spent = document["samples"]["resume"][0]
    assert set(spent) == {"table", "state", "batch", "all"}
    assert min(seconds for pair in spent.values() for seconds in pair) > 0
    assert "samples per CPU second" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("only=colour", "overhead, loop, resume, ingest, two"),
        ("steps=7", "steps=7 must be even, and 6 or more"),
        ("network=huge", "tiny, toy"),
    ],
)
def test_unknown_values_are_refused(word, message, one_thread):
    with pytest.raises(UserError, match=message):
        train.main(["quick=true", word])


@pytest.mark.ray
@pytest.mark.slow
def test_a_worker_of_ray_is_compared_with_the_twin(measure, ray_session):
    section = train.overhead(replace(measure, bench=replace(measure.bench, zero="")))
    assert [row[0] for row in section.rows] == ["local twin", "Ray, torch"]
    assert list(measure.samples["Ray, torch"]) == ["local twin", "Ray, torch"]


@pytest.mark.slow
@pytest.mark.ray
def test_the_quick_run_is_whole(tmp_path, one_thread, ray_session):
    page = tmp_path / "page.md"
    train.main(["quick=true", "only=overhead,loop,two", f"out={page}"])
    text = page.read_text()
    assert "| Ray, DeepSpeed, ZeRO-1 |" in text
    assert "| bare, with its data |" in text
    assert "| Ray, torch, 2 workers |" in text
    assert "A checkpoint (about" in text
