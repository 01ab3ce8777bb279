"""What can never be scheduled is refused; what may be later is waited for with a sentence."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from raylarge.compute import session
from raylarge.compute.resources import WorkerResources, _places, require_resources
from raylarge.errors import UserError

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("node", "need", "places"),
    [
        ((4, 0), (1, 0), 4),
        ((4, 0), (5, 0), 0),
        ((4, 0), (1, 1), 0),
        ((4, 2), (1, 1), 2),
        ((4, 1), (1, 0.25), 4),
        ((1, 3), (1, 1), 1),
        ((4, 0), (4 / 6, 0), 6),
        ((0, 1), (0, 1), 1),
    ],
)
def test_how_many_workers_fit_on_a_node(node, need, places):
    assert (
        _places(*map(float, node), WorkerResources("a worker", *map(float, need), fewest=9))
        == places
    )


@pytest.mark.ray
def test_a_ray_that_cannot_grow_refuses_at_once(ray_session, monkeypatch):
    monkeypatch.setattr(session, "_own", [Path("logs")])
    require_resources(WorkerResources("a worker", 4.0, 0.0))
    require_resources(WorkerResources("training", 1.0, 0.0, fewest=4))
    for room, says in (
        (
            WorkerResources("a worker", 1.0, 1.0),
            "a worker needs 1 CPUs and 1 GPUs and the largest of 1 nodes has 4 CPUs",
        ),
        (WorkerResources("a worker", 5.0, 0.0), "a worker needs 5 CPUs and the largest"),
        (WorkerResources("training", 1.0, 0.0, fewest=5), "training needs 5 times 1 CPUs"),
    ):
        with pytest.raises(UserError, match=f"{says}.*RAY_ADDRESS"):
            require_resources(room)


@pytest.mark.ray
def test_a_cluster_with_an_autoscaler_is_waited_for(ray_session, capsys):
    from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_put

    key = b"__autoscaling_status"
    _internal_kv_put(key, b"{}")
    try:
        require_resources(WorkerResources("a worker", 1.0, 1.0))
        assert "waiting for more nodes" in capsys.readouterr().out
    finally:
        _internal_kv_del(key)
    if not session.may_grow():  # Ray has written no status of its own since
        with pytest.raises(UserError, match="the largest of 1 nodes"):
            require_resources(WorkerResources("a worker", 1.0, 1.0))


@pytest.mark.ray
@pytest.mark.parametrize(
    "words",
    [
        "sample.py bundle={bundle} order.size=64 order.sampler.steps=1 out={out} workers=1 gpus=1",
        pytest.param(
            "train.py model=vae preset=tiny data={data} out={out} track=none workers=2 gpu=true",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_job_on_its_own_ray_does_not_wait_for_a_gpu(words, tiny_bundle, small_examples, tmp_path):
    job, *rest = words.format(bundle=tiny_bundle, data=small_examples, out=tmp_path / "o").split()
    alone = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    cure = {"sample.py": "lower gpus= or threads=", "train.py": "lower workers= or set gpu=false"}
    hidden = alone | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, f"jobs/{job}", *rest],
        cwd=ROOT, capture_output=True, text=True, env=hidden, timeout=240,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "1 GPUs and the largest of 1 nodes has" in done.stderr
    assert cure[job] in done.stderr
    assert "Traceback" not in done.stderr
