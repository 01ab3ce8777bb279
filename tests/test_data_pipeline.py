import os
import signal
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch

from raylarge import storage
from raylarge.config import plain
from raylarge.data import pipeline
from raylarge.data.pipeline import ExecutorConfig
from raylarge.data.prepare import prepare
from raylarge.data.units import Unit
from raylarge.errors import UserError
from raylarge.report import Report

ROOT = Path(__file__).parents[1]
VERBS = "tile,embed,shard,encode"
QUIETLY = {
    "cwd": ROOT,
    "env": {**os.environ, "PYTHONPATH": str(ROOT)},
    "capture_output": True,
    "text": True,
    "check": False,
}


class Square:
    """Squares numbers; knows some numbers it cannot stand."""

    def __init__(self, scratch=""):
        self.scratch = scratch

    def __call__(self, unit):
        number = int(unit.part)
        if number == -1:
            raise UserError("number=-1: numbers are above 0.")
        if number == -2:
            raise ZeroDivisionError("two below nothing")
        if number == 5 and self.scratch and not Path(self.scratch, "died").exists():
            Path(self.scratch, "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if number == -3:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"square": number**2, "threads": torch.get_num_threads(), "process": os.getpid()}


@pytest.fixture
def ray_here(ray_session):
    """Ray workers that know this module's classes: they travel by value."""
    module = sys.modules[__name__]
    ray_session.cloudpickle.register_pickle_by_value(module)
    yield ray_session
    ray_session.cloudpickle.unregister_pickle_by_value(module)


def units(*numbers):
    return [Unit(part=str(number)) for number in numbers]


def contents(root):
    """Everything that the verbs wrote, without the report, whose seconds differ."""
    found = {p.relative_to(root): p.read_bytes() for p in Path(root).rglob("*") if p.is_file()}
    return {name: found[name] for name in sorted(found)}


def made_here(config, root):
    prepare(config, Report(f"{root}.report.json"))
    return contents(root)


def test_facts_come_back_in_the_order_of_the_units():
    before = torch.get_num_threads()
    facts = pipeline.run(units(3, 1, 2), Square, ExecutorConfig(), "square")
    assert [one["square"] for one in facts] == [9, 1, 4]
    assert {one["threads"] for one in facts} == {1}
    assert torch.get_num_threads() == before
    assert pipeline.run([], Square, ExecutorConfig(), "square") == []


def test_failures_here():
    before = torch.get_num_threads()
    with pytest.raises(UserError, match=r"number=-1: numbers are above 0\."):
        pipeline.run(units(1, -1), Square, ExecutorConfig(), "square")
    with pytest.raises(RuntimeError, match=r"square failed at .*-2.*ZeroDivisionError: two below"):
        pipeline.run(units(1, -2), Square, ExecutorConfig(), "square")
    assert torch.get_num_threads() == before
    with pytest.raises(UserError, match=r"workers=0: give 1 or more"):
        pipeline.run(units(1), Square, ExecutorConfig(workers=0), "square")


@pytest.mark.ray
def test_failures_on_ray_are_the_same(ray_here):
    with pytest.raises(UserError, match=r"^number=-1: numbers are above 0\.$"):
        pipeline.run(units(1, -1), Square, ExecutorConfig(2), "square")
    with pytest.raises(RuntimeError, match=r"square failed at .*-2.*ZeroDivisionError: two below"):
        pipeline.run(units(1, -2), Square, ExecutorConfig(2), "square")


@pytest.mark.ray
def test_workers_share_the_units(ray_here):
    facts = pipeline.run(units(*range(20)), Square, ExecutorConfig(2), "square")
    assert [one["square"] for one in facts] == [number**2 for number in range(20)]
    assert {one["threads"] for one in facts} == {1}
    assert os.getpid() not in {one["process"] for one in facts}


@pytest.mark.ray
def test_a_worker_that_dies_costs_one_unit(ray_here, tmp_path):
    work = partial(Square, str(tmp_path))
    facts = pipeline.run(units(*range(8)), work, ExecutorConfig(1), "square")
    assert [one["square"] for one in facts] == [number**2 for number in range(8)]
    assert (tmp_path / "died").exists()
    assert len({one["process"] for one in facts}) == 2


@pytest.mark.ray
def test_a_unit_that_kills_every_worker_ends_the_run(ray_here):
    with pytest.raises(UserError, match=r"-3.*process died 5 times"):
        pipeline.run(units(1, -3), Square, ExecutorConfig(1), "square")


@pytest.mark.ray
def test_law_5_how_many_workers_does_not_matter(ray_session, tiny_prepare, tmp_path, tiny_bundle):
    found = {}
    for workers, verbs in ((None, VERBS), (1, "tile,embed"), (4, VERBS)):
        root = tmp_path / f"workers-{workers}"
        config = tiny_prepare(out=str(root), workers=workers, verbs=verbs, bundle=tiny_bundle)
        found[workers] = made_here(config, root)
    kinds = Counter(name.parts[0] for name in found[4] if name.suffix == ".parquet")
    assert kinds.pop("examples") == kinds.pop(next(k for k in kinds if "latents" in k)) > 1
    assert kinds == {"tiles": 1, "embeddings": 4}
    assert sum(name.suffix == ".parquet" for name in found[1]) == 1 + 4
    assert found[4] == found[None]
    assert found[1] == {name: found[None][name] for name in found[1]}


@pytest.mark.ray
@pytest.mark.slow
def test_law_5_with_a_real_network(ray_session, tiny_prepare, tmp_path):
    found = []
    for workers in (None, 2):
        root = tmp_path / f"workers-{workers}"
        embed = {"encoder": "efficientnet_lite0", "batch": 8}
        config = tiny_prepare(out=str(root), workers=workers, verbs="tile,embed", embed=embed)
        found.append(made_here(config, root))
    assert sum(name.suffix == ".parquet" for name in found[0]) == 1 + 4
    assert found[0] == found[1]


@pytest.mark.ray
def test_a_broken_slide_is_the_same_sentence_on_ray(ray_session, tiny_prepare, tmp_path):
    (tmp_path / "bad.svs").write_bytes(b"no slide")
    with pytest.raises(
        UserError, match=r"^slide [0-9a-f]{16}: the file is neither .*leave it out\. \(names\.json"
    ):
        made_here(tiny_prepare(slides=str(tmp_path / "bad.svs"), workers=1), tmp_path)


KILLED = """
import os, signal, sys
from raylarge import config, storage
from raylarge.data.prepare import Prepare, prepare
from raylarge.report import Report
left, write = [int(sys.argv[3])], storage.write_table
def write_table(path, *table):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    write(path, *table)
storage.write_table = write_table
prepare(config.build(Prepare, eval(sys.argv[1])), Report(sys.argv[2]))
"""


@pytest.mark.parametrize(
    ("parts", "made"),
    [
        (3, {"tile": 0, "embed": 2, "shard": 3, "blocks": 4}),
        (7, {"tile": 0, "embed": 0, "shard": 3, "blocks": 2}),
        (10, {"tile": 0, "embed": 0, "shard": 2, "blocks": 0}),
    ],
)
def test_killed_half_way_and_run_again(tiny_prepare, tmp_path, parts, made):
    config = tiny_prepare(out=str(tmp_path / "killed"))
    words = [repr(plain(config)), str(tmp_path / "r.json"), str(parts)]
    done = subprocess.run([sys.executable, "-c", KILLED, *words], **QUIETLY)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert len(storage.glob(f"{config.out}/*/*.parquet")) == parts
    assert storage.exists(f"{config.out}/embed.json") == (parts >= 7)
    facts = prepare(config, Report(str(tmp_path / "r.json")))
    found = {verb: one["made"] for verb, one in facts.items()}
    assert {**found, "blocks": facts["shard"]["blocks_made"]} == made
    undisturbed = tiny_prepare(out=str(tmp_path / "undisturbed"))
    assert contents(config.out) == made_here(undisturbed, undisturbed.out)


@pytest.mark.s3
def test_a_data_folder_in_a_bucket_is_the_same(s3_bucket, tiny_prepare, tmp_path):
    here = tiny_prepare(out=str(tmp_path / "here"))
    expected = made_here(here, here.out)
    there = tiny_prepare(out=f"{s3_bucket}/prepared/data")
    prepare(there, Report(str(tmp_path / "r.json")))
    found = {name: storage.read_bytes(f"{there.out}/{name}") for name in expected}
    assert found == expected
    assert len(found) > 9
    assert [f["made"] for f in prepare(there, Report(str(tmp_path / "r.json"))).values()] == [0] * 3


def test_the_job_prints_a_table_and_leaves_a_report(tiny_slide, tmp_path):
    out = tmp_path / "data"
    words = [f"slides={tiny_slide}", f"out={out}", "preset=tiny", "embed.encoder=toy"]
    job = [sys.executable, "jobs/prepare.py", *words]
    done = subprocess.run(job, **QUIETLY)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("verb "))
    assert lines[header].split() == [
        "verb",
        "seconds",
        "rows",
        "new",
        "failed",
        "tiles/s",
        "output",
    ]
    verbs = [line.split()[0] for line in lines[header + 2 : header + 5]]
    assert verbs == ["tile", "embed", "shard"]
    stages = storage.read_json(str(out / "report.json"))["stages"]
    assert stages["shard"]["rows"] == storage.read_json(str(out / "shard.json"))["rows"] > 0
    job[-1] = "embed.encodre=toy"
    done = subprocess.run(job, **QUIETLY)
    assert done.returncode == 2
    assert "unknown key 'embed.encodre'; did you mean 'embed.encoder'?" in done.stderr
