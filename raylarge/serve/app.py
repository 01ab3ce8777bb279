"""The image service on Ray Serve: `serve run raylarge.serve.app:build bundle=DIR`.

    HTTP -> Ingress (one: the queue, its plans) -requests-> Worker (any number)

Orders are in the memory of the Ingress, which has one replica: they are lost when it restarts.
Workers may be added and removed at any time. Serve listens on loopback, without authentication.
"""

from __future__ import annotations

import logging
import socket
from contextlib import ExitStack
from typing import Any

from pydantic import Field

from raylarge import config as configuration
from raylarge import storage
from raylarge.compute.config import ComputeConfig, Dtype
from raylarge.compute.session import session
from raylarge.errors import UserError
from raylarge.sampling.bundle_facts import require
from raylarge.serve.order_queue import ServiceLimits

HOST = "127.0.0.1"
_running: list[ExitStack] = []


class Service(ServiceLimits):
    """Arguments of `build`, besides the limits."""

    bundle: str = Field(examples=["bundle"])
    """The folder of the models, visible on every node."""
    workers: int = Field(1, ge=0)
    """Replicas of the Worker, unless the deployment's configuration says otherwise."""
    threads: int = Field(1, ge=1)
    """CPU threads of each; with the two below they decide the last bits."""
    dtype: Dtype = "float32"
    """Of the networks."""
    compile: bool = False
    """Compile the networks where no derivative is taken."""


def build(args: dict[str, Any]) -> Any:
    """The `ray.serve.Application` of arguments such as `bundle=DIR workers=2`.

    Raises:
        UserError: an unknown argument, or a bundle that cannot sample.
    """
    config = configuration.build(Service, args)
    means = ComputeConfig(threads=config.threads, dtype=config.dtype, compile=config.compile)
    folder = storage.absolute(config.bundle)
    require(folder)
    from ray import serve  # here, for `session` settles Ray's environment before

    from raylarge.serve.deployments import MAX_ONGOING, ServiceIngress, WorkerReplica

    worker = serve.deployment(
        WorkerReplica,
        name="Worker",
        num_replicas=config.workers,
        max_ongoing_requests=MAX_ONGOING,
        ray_actor_options={"num_cpus": means.threads},
    )
    ingress = serve.deployment(
        serve.ingress()(ServiceIngress),
        name="Ingress",
        max_ongoing_requests=100,
    )
    limits = ServiceLimits(**{name: getattr(config, name) for name in ServiceLimits.model_fields})
    return ingress.bind(worker.bind(folder, means), limits)


def start(bundle: str, port: int = 8000, workers: int = 1, logs: str = "") -> str:
    """Start the service on this machine; returns its URL. `stop` ends it.

    Args:
        bundle: the folder of the models.
        port: on loopback; 0 takes a free one.
        workers: replicas of the worker.
        logs: a folder for Ray's logs, if Ray is started here.

    Raises:
        UserError: no bundle, the port is taken, or Serve runs already. Then nothing was started.
    """
    folder = storage.absolute(bundle)
    require(folder)
    port = _claim(port)
    with ExitStack() as stack:
        stack.enter_context(session(workers + 1, logs))
        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        if serve.status().proxies:
            raise UserError(
                "Serve runs on this Ray already: use serve deploy, or end it with serve shutdown."
            )
        stack.callback(serve.shutdown)
        serve.start(http_options={"host": HOST, "port": port})
        serve.run(build({"bundle": folder, "workers": workers}), name="raylarge")
        _running.append(stack.pop_all())
    return f"http://{HOST}:{port}"


def stop() -> None:
    """End what `start` started: the service, and Ray if that was ours."""
    while _running:
        _running.pop().close()


def _claim(port: int) -> int:
    """A port that can be listened on.

    Raises:
        UserError: something listens there.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(
                f"port {port} is in use on this machine; choose another, such as port={port + 1}."
            ) from error
        return int(probe.getsockname()[1])
