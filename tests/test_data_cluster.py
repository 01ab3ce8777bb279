"""The data engine on three Ray nodes in one machine: the same rows, whatever dies."""

import hashlib
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import psutil
import pytest

from raylarge import storage, tables
from raylarge.data import embed, embed_config, parts, tile_table
from raylarge.data.pipeline import ExecutorConfig
from raylarge.data.prepare import prepare
from raylarge.report import Report

HEALTH = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(580)]


@pytest.fixture
def nodes():
    """A head with the driver, and two nodes of two CPUs each that may be killed."""
    import ray
    from ray.cluster_utils import Cluster

    patch = pytest.MonkeyPatch()
    for name, value in {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    }.items():
        patch.setenv(name, value)
    head = {"num_cpus": 2, "include_dashboard": False, "_system_config": HEALTH}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    workers = [cluster.add_node(num_cpus=2) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    module = sys.modules[__name__]
    ray.cloudpickle.register_pickle_by_value(module)
    yield cluster, workers
    ray.cloudpickle.unregister_pickle_by_value(module)
    ray.shutdown()
    cluster.shutdown()
    patch.undo()


def digest(root, name):
    """The rows of a table, whatever their order and their files."""
    rows = tables.rows(root, name).to_pylist()
    lines = sorted(hashlib.sha256(repr(sorted(row.items())).encode()).hexdigest() for row in rows)
    return len(rows), hashlib.sha256("".join(lines).encode()).hexdigest()


def digests(root, latents):
    return {name: digest(root, name) for name in ("tiles", "embeddings", "examples", latents)}


def kill(node):
    """A node's death: its raylet and everything it has started."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    for process in [raylet, *raylet.children(recursive=True)]:
        process.kill()


def wait_for(condition):
    while not condition():
        time.sleep(0.1)


def test_law_5_three_nodes_make_the_rows_of_one_process(nodes, tiny_prepare, tmp_path, tiny_bundle):
    found = {}
    for workers in (None, 5):
        root = str(tmp_path / f"workers-{workers}")
        verbs = "tile,embed,shard,encode"
        config = tiny_prepare(out=root, workers=workers, verbs=verbs, bundle=tiny_bundle)
        done = prepare(config, Report(f"{root}.json"))
        found[workers] = digests(root, done["encode"]["table"].rsplit("/", 1)[-1])
        assert found[workers]["examples"][0] == done["shard"]["rows"] > 100
    assert found[None] == found[5]


class Slow(embed.EmbedStage):
    """Takes a second for each block, on whichever node, and says where."""

    def make(self, unit):
        time.sleep(1.0)
        with open(f"{os.environ['BEGUN']}/{unit.part.rsplit('/', 1)[-1]}", "a") as log:
            log.write(f"{os.environ.get('RAY_NODE_ID', '')} {os.getpid()}\n")
        return super().make(unit)


class Slowly:
    """Make the stage in a worker that has the environment variable of the test."""

    def __init__(self, folder, make):
        self.folder, self.make = folder, make

    def __call__(self):
        os.environ["BEGUN"] = self.folder
        return self.make()


def test_nodes_that_die_every_few_seconds_cost_work_but_no_row(nodes, tmp_path, tiny_prepare):
    from raylarge.slides import procedural

    cluster, workers = nodes
    begun = tmp_path / "begun"
    begun.mkdir()
    slide = str(tmp_path / "large.tif")
    procedural.write(slide, (2048, 1024), seed=5)
    config = tiny_prepare(slides=slide, tile={"block_tiles": 16, "tissue": [0.0]}, verbs="tile")
    prepare(config, Report(str(tmp_path / "r.json")))
    alone = tiny_prepare(slides=slide, tile=config.tile, out=str(tmp_path / "alone"))
    prepare(alone, Report(str(tmp_path / "r.json")))
    sections = {
        "tile": tile_table.section(config.tile),
        "embed": embed_config.section(config.embed),
    }
    units = embed.units_of(config.out, config.tile, sections)
    assert len(units) == 32
    make_stage = partial(Slow, config.out, config.tile, config.embed)
    executor = ExecutorConfig(5)
    with ThreadPoolExecutor(1) as thread:  # nodes may be added by the main thread alone
        work = Slowly(str(begun), make_stage)
        building = thread.submit(parts.build, config.out, units, work, executor, "embed")
        wait_for(lambda: len(list(begun.iterdir())) >= 4)
        for _ in range(5):
            doomed = workers.pop(0)
            kill(doomed)
            cluster.remove_node(doomed, allow_graceful=False)
            workers.append(cluster.add_node(num_cpus=2))
            time.sleep(2.0)
            assert not building.done()
        built = building.result()
    facts = parts.finish(config.out, "embed", built, sections)
    assert built.failed == []
    assert len(built.facts) == 32
    assert digest(config.out, "embeddings") == digest(alone.out, "embeddings")
    attempts = sum(len(path.read_text().splitlines()) for path in begun.iterdir())
    print(f"5 nodes killed: {attempts} blocks begun for 32, {facts['again']} of them again")
    assert facts["again"] >= 1  # what died in vain is reported
    assert storage.children(f"{config.out}/embeddings", "*") == [
        f"{config.out}/{unit.part}" for unit in units
    ]
