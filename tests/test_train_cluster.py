"""Training on three Ray nodes in one machine: workers that come and go, notices of departure."""

import csv
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
import toy

from raylarge import storage
from raylarge.train.checkpoint import Checkpoints
from raylarge.train.launch import Train, train

HEALTH = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}
STEPS, BATCH = 150, 8
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(580)]


@pytest.fixture
def nodes():
    """A head without a CPU, and two nodes for a worker each."""
    import ray
    from ray.cluster_utils import Cluster

    patch = pytest.MonkeyPatch()
    for name, value in {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
        "OMP_NUM_THREADS": "1",
    }.items():
        patch.setenv(name, value)
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": HEALTH}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    both = [cluster.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    ray.cloudpickle.register_pickle_by_value(toy)
    yield cluster, both
    ray.cloudpickle.unregister_pickle_by_value(toy)
    ray.shutdown()
    cluster.shutdown()
    patch.undo()


@pytest.fixture
def config(tmp_path):
    toy.write_latents(tmp_path / "data")
    return Train(
        model="ldm",
        data=str(tmp_path / "data"),
        out=str(tmp_path / "out"),
        steps=STEPS,
        batch=BATCH,
        lr=1e-2,
        checkpoint_every=5,
        log_every=1,
        track="none",
        validate=0,
    )


class Running(threading.Thread):
    """A training in the background."""

    def __init__(self, config, task):
        super().__init__(daemon=True)
        self.config, self.task = config, task
        self.facts = None
        self.start()

    def run(self):
        self.facts = train(self.config, self.task)

    def step(self):
        path = storage.join(self.config.run.folder, "status.json")
        return storage.read_json(path)["step"] if storage.exists(path) else 0

    def wait_for(self, condition):
        while self.is_alive() and not condition():
            time.sleep(0.1)
        assert condition()


def losses(facts):
    with open(facts["loss_csv"]) as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def weights(config):
    return torch.load(Path(config.out, "toy", "weights.pt"))


def lives(seen):
    """The samples that each process saw, by the time of its beginning."""
    files = sorted(seen.iterdir(), key=lambda file: file.stat().st_ctime)
    return [list(map(int, file.read_text().split())) for file in files]


def kill(node):
    """A node's death: its raylet and everything it has started."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    for process in [raylet, *raylet.children(recursive=True)]:
        process.kill()


def test_two_workers_lose_one_go_on_and_are_two_again(nodes, config, tmp_path):
    cluster, (_, second) = nodes
    twin = replace(config, out=str(tmp_path / "twin"))
    expected = losses(train(twin, toy.Toy()))
    (seen := tmp_path / "seen").mkdir()
    elastic = replace(config, workers=2, min_workers=1, resize_s=5.0, zero=2)
    running = Running(elastic, toy.Toy(seen=str(seen), pause=0.2))
    running.wait_for(lambda: running.step() >= 12)
    kill(second)
    cluster.remove_node(second, allow_graceful=False)
    alone = running.step()
    running.wait_for(lambda: len(lives(seen)) == 3 and running.step() > alone + 8)
    cluster.add_node(num_cpus=1)
    running.join(400)

    assert running.facts["step"] == STEPS
    assert losses(running.facts) == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(weights(elastic), weights(twin), atol=1e-5, rtol=0)
    found = lives(seen)
    assert len(found) == 5  # two, then one, then two
    of_a_step = [len({sample % BATCH for sample in some}) for some in found]
    assert sorted(of_a_step) == [4, 4, 4, 4, BATCH]  # which share of every batch was theirs
    assert {sample for some in found for sample in some} == set(range(STEPS * BATCH))


def test_a_notice_of_departure_is_answered_with_a_checkpoint(nodes, config, tmp_path):
    import ray
    from ray.core.generated import autoscaler_pb2

    cluster, (_, second) = nodes
    (seen := tmp_path / "seen").mkdir()
    rare = replace(config, workers=2, min_workers=1, checkpoint_every=10_000, max_failures=0)
    running = Running(rare, toy.Toy(seen=str(seen), pause=0.2))
    running.wait_for(lambda: running.step() >= 10)
    client = ray._raylet.GcsClient(address=cluster.address)
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline = int(time.time() * 1000) + 15_000
    accepted, _ = client.drain_node(second.node_id, reason, "", deadline)
    assert accepted
    checkpoints = Checkpoints(rare.run.folder, 2)
    running.wait_for(lambda: checkpoints.newest() is not None)
    assert abs(checkpoints.newest().facts["step"] - running.step()) <= 10
    # When the time is over, Ray ends the workers; no failure of theirs is counted.
    running.wait_for(lambda: len(lives(seen)) == 3 or running.facts is not None)
    kill(second)
    cluster.remove_node(second, allow_graceful=False)
    running.join(400)
    assert running.facts["step"] == STEPS
    found = lives(seen)
    assert len(found) == 3
    done, again = max(found[0][-1], found[1][-1]), min(found[2])
    assert running.facts["resumed_from"] == again // BATCH
    # What was done after the last look before the time was over, at most 7 s earlier.
    assert done // BATCH - again // BATCH <= 7.5 / 0.2 + 2
