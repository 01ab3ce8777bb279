"""jobs/sample.py killed, stopped by signals, and begun twice."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from test_jobs_sample import pixels

from jobs import sample as job
from raylarge.errors import UserError

ROOT = Path(__file__).parents[1]


def wait_for_replies(out, process, kept):
    deadline = time.monotonic() + 300
    while len(list(out.glob(".ledger-*/[a-z]*"))) < kept:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)


def killed_half_way(words, out, kept=8):
    """Start the job, and kill it for good once some replies are on disk; its offspring."""
    process = subprocess.Popen(
        [sys.executable, "jobs/sample.py", *words, f"out={out}"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wait_for_replies(out, process, kept)
    os.kill(process.pid, signal.SIGSTOP)  # so that it does not end meanwhile
    offspring = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (out / "image.png").exists()
    return offspring


def test_law_4_killed_and_run_again(words, law_image, tmp_path):
    killed_half_way(words, tmp_path)
    job.main([*words, f"out={tmp_path}"])
    np.testing.assert_array_equal(pixels(tmp_path), law_image)
    done = json.loads((tmp_path / "report.json").read_text())["stages"]["sample"]
    assert done["resumed"] >= 8
    assert done["requests"] == 21 - done["resumed"]


def stopped_half_way(words, out, number, ready):
    """Start the job, send it a signal at a moment, and return its last line on stderr."""
    process = subprocess.Popen(
        [sys.executable, "jobs/sample.py", *words, f"out={out}"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # under nohup, too
    )  # fmt: skip
    ready(process)
    offspring = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 128 + number, errors
    last = errors.strip().splitlines()[-1].strip()
    for trace in ("Traceback", "Check failed", "** SIG", "core_worker"):
        assert trace not in errors
    assert not (out / "image.png").exists()
    assert not (out / ".lock").exists()
    assert psutil.wait_procs(offspring, timeout=30)[1] == []
    return last


def until_ray_starts(process):
    parent, deadline = psutil.Process(process.pid), time.monotonic() + 300
    while not any("gcs_server" in child.name() for child in parent.children(recursive=True)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_a_job_that_can_be_resumed(words, law_image, tmp_path, number):
    said = stopped_half_way(words, tmp_path, number, lambda job: wait_for_replies(tmp_path, job, 4))
    assert said == f"stopped by {number.name}; run the same command again to go on"
    job.main([*words, f"out={tmp_path}"])
    np.testing.assert_array_equal(pixels(tmp_path), law_image)
    assert json.loads((tmp_path / "report.json").read_text())["stages"]["sample"]["resumed"] >= 4


@pytest.mark.ray
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)]
)
def test_a_signal_ends_actors_in_order(words, tmp_path, number):
    more = [*words, "workers=2", "order.sampler.steps=20"]
    said = stopped_half_way(more, tmp_path, number, lambda job: wait_for_replies(tmp_path, job, 4))
    assert said == f"stopped by {number.name}; run the same command again to go on"


@pytest.mark.ray
def test_a_signal_while_ray_starts_ends_it_in_order(words, tmp_path):
    said = stopped_half_way([*words, "workers=2"], tmp_path, signal.SIGTERM, until_ray_starts)
    assert said == "stopped by SIGTERM; run the same command again to go on"


def test_two_commands_do_not_share_a_folder(words, tmp_path):
    command = [sys.executable, "jobs/sample.py", *words, "order.sampler.steps=40"]
    process = subprocess.Popen([*command, f"out={tmp_path}"], cwd=ROOT, stderr=subprocess.DEVNULL)
    wait_for_replies(tmp_path, process, 1)
    for seed in (0, 1):
        with pytest.raises(UserError, match=r"is in use: sample .*give another out="):
            job.main([*words, f"out={tmp_path}", f"order.seed={seed}"])
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    with pytest.raises(UserError, match="holds an unfinished result of another order"):
        job.main([*words, f"out={tmp_path}", "order.seed=1"])


@pytest.mark.ray
def test_law_4_begun_by_actors_killed_and_ended_here(words, law_image, tmp_path):
    offspring = killed_half_way([*words, "workers=2"], tmp_path)
    assert len(offspring) > 2
    # Two small agents of Ray's look for their parent once a minute, then leave as well.
    workers = [process for process in offspring if "Agent" not in process.name()]
    assert psutil.wait_procs(workers, timeout=30)[1] == []
    job.main([*words, f"out={tmp_path}"])
    np.testing.assert_array_equal(pixels(tmp_path), law_image)


@pytest.mark.cluster
def test_law_4_on_a_cluster_that_loses_a_node(words, tmp_path, monkeypatch):
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    fast = {
        "health_check_initial_delay_ms": 1000,
        "health_check_period_ms": 500,
        "health_check_timeout_ms": 500,
        "health_check_failure_threshold": 3,
    }
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": fast}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        doomed, _ = (cluster.add_node(num_cpus=1) for _ in range(2))
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        long = [word.replace("chunk=1", "chunk=2") for word in words]
        command = [sys.executable, "jobs/sample.py", *long, f"out={tmp_path}", "workers=2"]
        process = subprocess.Popen([*command, "order.sampler.steps=40"], cwd=ROOT)
        wait_for_replies(tmp_path, process, 6)
        raylet = psutil.Process(doomed.all_processes["raylet"][0].process.pid)
        for victim in [raylet, *raylet.children(recursive=True)]:
            victim.kill()
        assert process.wait(timeout=300) == 0
    finally:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        cluster.shutdown()
    there = pixels(tmp_path)
    job.main([*long, "order.sampler.steps=40", f"out={tmp_path}/here"])
    np.testing.assert_array_equal(pixels(tmp_path / "here"), there)
