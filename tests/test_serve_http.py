"""The service on Ray, over HTTP: answer independence, lost replicas, cluster file, shutdown."""

import contextlib
import time
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import yaml
from ray import serve

from raylarge import images
from raylarge.errors import UserError
from raylarge.serve import app

ROOT = Path(__file__).parents[1]
SMALL = {"size": 64, "sampler": {"steps": 1}}


@pytest.fixture(scope="module")
def url(ray_session, tiny_bundle):
    yield app.start(tiny_bundle, port=0, workers=2)
    app.stop()


@pytest.fixture
def http(url):
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


def ended(http, id, watch=lambda state: None):
    deadline = time.monotonic() + 240
    while True:
        state = http.get(f"/v1/images/{id}").json()
        watch(state)
        if state["state"] not in ("queued", "running"):
            return state
        assert time.monotonic() < deadline
        time.sleep(0.02)


def busy_replicas():
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "Worker" in (name := " ".join(process.cmdline())) and "Replica" in name:
                found.append(process)
    return found


@pytest.mark.ray
def test_law_4_over_http(http, law_order, law_image):
    answer = http.post("/v1/images", json=law_order)
    assert answer.status_code == 202
    seen = []
    state = ended(http, answer.json()["id"], lambda state: seen.append(state["progress"]))
    assert state["state"] == "done", state
    assert seen == sorted(seen)
    content = http.get(state["links"]["image"]).content
    np.testing.assert_array_equal(images.from_bytes(content), law_image)
    assert http.get("/v1/bundle").json()["digest"].encode() in content
    assert http.post("/v1/images", json={"size": 1}).status_code == 422


@pytest.mark.ray
def test_law_4_over_http_with_two_orders_and_a_killed_replica(http, law_order, law_image):
    ids = [http.post("/v1/images", json=law_order).json()["id"] for _ in range(2)]
    killed = []

    def kill_once(state):
        if state["progress"] > 0.2 and not killed:
            killed.extend(busy_replicas()[:1])
            killed[0].kill()

    for id in ids:
        state = ended(http, id, kill_once)
        assert state["state"] == "done", state
        content = http.get(state["links"]["image"]).content
        np.testing.assert_array_equal(images.from_bytes(content), law_image)
    assert len(killed) == 1


@pytest.mark.ray
def test_a_cancelled_order_leaves_the_workers_to_others(http, law_order):
    long = {**law_order, "chunk": 50, "sampler": {**law_order["sampler"], "steps": 999}}
    id = http.post("/v1/images", json={**long, "size": 64}).json()["id"]
    while http.get(f"/v1/images/{id}").json()["state"] != "running":
        time.sleep(0.02)
    assert http.delete(f"/v1/images/{id}").json()["state"] == "cancelled"
    assert ended(http, http.post("/v1/images", json=SMALL).json()["id"])["state"] == "done"
    assert http.get(f"/v1/images/{id}").json()["state"] == "cancelled"


@pytest.mark.ray
def test_the_deployments_are_those_that_the_cluster_file_configures(url, tiny_bundle):
    [ours] = yaml.safe_load((ROOT / "cluster" / "serve.yaml").read_text())["applications"]
    deployments = serve.status().applications["raylarge"].deployments
    assert deployments.keys() == {deployment["name"] for deployment in ours["deployments"]}
    assert ours["args"].keys() <= app.Service.model_fields.keys()
    with pytest.raises(UserError, match="Serve runs on this Ray already"):
        app.start(tiny_bundle, port=0)


@pytest.mark.ray
def test_it_listens_on_loopback_only(url):
    port = int(url.rsplit(":", 1)[1])
    listening = {
        connection.laddr.ip
        for process in psutil.Process().children(recursive=True)
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    }
    assert listening == {"127.0.0.1"}


@pytest.mark.ray
def test_stop_leaves_nothing_behind(url):
    app.stop()
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{url}/healthz")
    assert busy_replicas() == []
