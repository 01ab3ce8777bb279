"""benchmarks/train*.py: the pieces run, and all ways train alike; nothing here is timed."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import train, train_figures, train_tables, train_turns
from benchmarks.train import Bench, Measure
from benchmarks.train_figures import Middle
from benchmarks.train_turns import LOOPS, Found, Way
from raylarge.errors import UserError
from raylarge.train import launch
from raylarge.train.ingest import Ingest
from raylarge.train.task import Recipe


@pytest.fixture
def measure(tmp_path, one_thread):
    return Measure(Bench(pairs=2, steps=6, network="toy"), tmp_path)


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


class Open:
    """A gate that lets all pass; a turn begins with every sixth step."""

    def before(self, step):
        return step % 6 == 0

    def restart(self):
        pass


@pytest.mark.parametrize("loop", LOOPS)
def test_a_bare_loop_trains_as_the_twin_does(measure, loop):
    config = replace(measure.config, steps=12)
    bare = train_turns.bare(Way("bare", config, loop), Open(), turn=6)
    twin = launch.train(config, train_turns.silent)
    assert bare["first_loss"] == pytest.approx(twin["first_loss"], rel=1e-6)
    assert bare["loss"] == pytest.approx(twin["loss"], rel=1e-5)
    assert bare["loss"] != bare["first_loss"]


@pytest.fixture
def threads(monkeypatch):
    """Contenders are threads of this process, which start at once."""
    monkeypatch.setattr(train_turns, "_pool", ThreadPoolExecutor)
    monkeypatch.setattr(train_turns, "_apart", lambda *job: train_turns.contend(*job[:3]))


def test_turns_are_taken_one_at_a_time(measure, threads):
    ways = [Way("bare", measure.config, LOOPS[0]), Way("twin", measure.config)]
    found = train_turns.conduct(ways, turn=6, turns=2)
    assert found.facts["twin"]["step"] == 3 + 3 * 6 + 1
    assert list(found.seconds) == ["bare", "twin"]
    for seconds in found.seconds.values():
        assert seconds.shape == (2, 6, 2)
        assert (seconds > 0).all()


def test_who_waits_for_a_turn_ends_when_another_fails(measure, threads, tmp_path):
    ways = [Way("one", measure.config)]
    ways += [Way("other", replace(measure.config, data=str(tmp_path / "nothing")))]
    with pytest.raises(UserError, match=r"jobs/prepare\.py"):
        train_turns.conduct(ways, turn=6, turns=1)  # and does not wait for ever


def test_differences_are_taken_within_turns():
    noise = np.arange(9.0)[:, None, None]
    first = np.full((9, 4, 2), 0.1) + noise
    found = Found({"a": first, "b": first + np.array([0.002, 0.003])})
    wall, cpu = train_figures.over_first(found, "b")
    assert tuple(wall) == pytest.approx((2.0, 2.0, 2.0))
    assert tuple(cpu.share) == pytest.approx((0.006, 0.006, 0.006))
    rows = train_figures.table([found])
    assert rows[0][3:] == ["–"] * 6
    assert rows[1][3:5] == ["+2.00", "+2.00 to +2.00"]
    assert rows[1][-2:] == ["+0.4%", "+0.6%"]
    assert all(len(row) == len(train_figures.HEADER) for row in rows)


def test_an_interval_holds_the_median():
    found = Middle.of(np.random.default_rng(1).normal(5.0, 1.0, 400))
    assert found.low < found.value < found.high
    assert found.low == pytest.approx(5.0, abs=0.3)
    assert 0.05 < found.high - found.low < 0.5


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
    assert "## Going on at step 1,000,000" in text
    assert "1,536 rows of 2 scales in 24 row groups" in text
    assert "| all 2 scales alike |" in text
    found = json.loads(page.with_suffix(".json").read_text())
    spent = found["samples"]["resume"][0]
    assert set(spent) == {"table", "state", "batch", "all"}
    assert min(seconds for pair in spent.values() for seconds in pair) > 0
    assert "samples per CPU second" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("only=colour", "overhead, loop, resume, ingest, two"),
        ("steps=7", "steps=7 must be even, and 6 or more"),
        ("network=huge", "tiny, toy"),
    ],
)
def test_what_nobody_knows_is_refused(word, said, one_thread):
    with pytest.raises(UserError, match=said):
        train.main(["quick=true", word])


@pytest.mark.ray
@pytest.mark.slow
def test_a_worker_of_ray_takes_turns_with_the_twin(measure, ray_session):
    section = train.overhead(replace(measure, bench=replace(measure.bench, zero="")))
    assert [row[0] for row in section.rows] == ["local twin", "Ray, torch"]
    assert "ray::" in section.notes[-1]
    assert list(measure.samples["Ray, torch"]) == ["local twin", "Ray, torch"]


@pytest.mark.slow
@pytest.mark.ray
def test_the_quick_run_is_whole(tmp_path, one_thread, ray_session):
    page = tmp_path / "page.md"
    train.main(["quick=true", "only=overhead,loop,two", f"out={page}"])
    text = page.read_text()
    assert "| Ray, DeepSpeed, ZeRO-1 |" in text
    assert "| bare, making its batches |" in text
    assert "| Ray, torch, 2 workers |" in text
    assert "A checkpoint (about" in text
