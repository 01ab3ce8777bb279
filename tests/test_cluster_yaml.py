"""The cluster files are what Ray reads, and a slip in one of them is refused."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.check import cluster_errors, serve_errors

CLUSTER = Path(__file__).parents[1] / "cluster"


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / name).read_text())


@pytest.mark.parametrize("name", ["gpu.yaml", "local.yaml"])
def test_ray_up_takes_the_file(name):
    assert list(cluster_errors(load(name))) == []


def test_serve_deploy_takes_the_file():
    assert list(serve_errors(load("serve.yaml"))) == []


@pytest.mark.parametrize(
    ("path", "slip"),
    [
        ((), "max_wokers"),
        (("provider",), "regions"),
        (("docker",), "imagge"),
        (("available_node_types", "gpu"), "max_worker"),
        (("available_node_types", "gpu", "node_config"), "InstnceType"),
    ],
)
def test_a_misspelt_key_of_a_cluster_is_refused(path, slip):
    config = load("gpu.yaml")
    place = config
    for key in path:
        place = place[key]
    place[slip] = 1
    assert slip in "".join(cluster_errors(config))


@pytest.mark.parametrize(
    ("path", "slip"),
    [
        ((), "proxy_locaton"),
        (("http_options",), "hots"),
        (("applications", 0), "arg"),
        (("applications", 0, "deployments", 0), "num_replica"),
        (("applications", 0, "deployments", 1, "ray_actor_options"), "num_gpu"),
        (("applications", 0, "deployments", 1, "autoscaling_config"), "max_replica"),
    ],
)
def test_a_misspelt_key_of_the_service_is_refused(path, slip):
    config = load("serve.yaml")
    place = config
    for key in path:
        place = place[key]
    place[slip] = 1
    assert slip in "".join(serve_errors(config))


def test_a_wrong_value_is_refused():
    config = load("serve.yaml")
    config["applications"][0]["deployments"][0]["num_replicas"] = -1
    assert "num_replicas" in "".join(serve_errors(config))
    config = load("gpu.yaml")
    config["head_node_type"] = "haed"
    assert "head_node_type" in "".join(cluster_errors(config))


def test_nothing_listens_to_the_world_and_ray_asks_for_the_token():
    assert load("serve.yaml")["http_options"]["host"] == "127.0.0.1"
    for name in ("gpu.yaml", "local.yaml"):
        assert "--dashboard-host=127.0.0.1" in load(name)["head_start_ray_commands"][-1]
    assert "-e RAY_AUTH_MODE=token" in load("gpu.yaml")["docker"]["run_options"]
    local = load("local.yaml")
    for start in (local["head_start_ray_commands"], local["worker_start_ray_commands"]):
        assert "RAY_AUTH_MODE=token" in start[-1]
