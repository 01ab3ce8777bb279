"""Cost of a request to a replica of Ray Serve, by the number of requests that it accepts.

python -m benchmarks.serve_requests bundle=DIR [steps=10] [rounds=3] [hardware=2cores] [write=true]

The same patches, one request per step: in this process, and by a Worker deployment that accepts 2
requests, or all that are in flight. Ways alternate in each round.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from omegaconf import MISSING

from benchmarks import page
from raylarge import storage
from raylarge.compute.config import ComputeConfig
from raylarge.compute.session import session
from raylarge.config import parse
from raylarge.geometry import Patch
from raylarge.models import bundle as bundles
from raylarge.order import Order
from raylarge.order import parse as parse_order
from raylarge.sampling import joint
from raylarge.sampling.plan import arun, run
from raylarge.workers.worker import Worker

BEFORE = 2
"""Former limit of the deployment."""


@dataclass(frozen=True)
class ServeBench:
    """Settings of the benchmark.

    Attributes:
        bundle: the folder of the models.
        count: patches; each is a batch of its own.
        steps: sampling steps of each, one request each.
        rounds: how often every way has its turn.
        hardware: names the file of the results.
        write: write the page of results.
    """

    bundle: str = MISSING
    count: int = 16
    steps: int = 10
    rounds: int = 3
    hardware: str = "2cores"
    write: bool = False


def main(arguments: list[str]) -> None:
    """Measure, print, and write if asked to."""
    config = parse(ServeBench, arguments, {})
    torch.set_num_threads(1)
    section = measured(config)
    page.show(section)
    if config.write:
        path = page.place("serve_requests", config.hardware)
        command = page.command("benchmarks.serve_requests")
        page.write(path, "Requests over Ray Serve", command, [section])


def measured(config: ServeBench) -> page.Section:
    """Return medians of all ways, and what each costs beside this process."""
    values = {"count": config.count, "batch": 1, "chunk": 1, "sampler": {"steps": config.steps}}
    order, worker = parse_order(values), Worker(bundles.load(config.bundle))
    patch = worker.bundle.patch
    requests = len(joint.plan(order, patch).requests)
    seconds: dict[str, list[float]] = {}
    with session(3):
        from ray import serve

        ways = {"in this process": lambda: run(joint.plan(order, patch), worker.answer)}
        ways |= served(serve, storage.absolute(config.bundle), order, patch)
        pictures = {name: way() for name, way in ways.items()}  # the first time is warming up
        for _ in range(config.rounds):
            for name, way in ways.items():
                began = time.monotonic()
                way()
                seconds.setdefault(name, []).append(time.monotonic() - began)
        serve.shutdown()
    first, *others = pictures.values()
    assert all(np.array_equal(first, other) for other in others)
    return page.Section(
        f"{config.count} patches in {requests} requests, one replica",
        ["way", "seconds, median", "range", "ms per request", "times this process"],
        rows(seconds, requests),
        [
            f"Medians of {config.rounds} interleaved rounds after one that warms up; the bytes of "
            "all ways are equal (asserted). 64 requests are in flight at most, as in the service."
        ],
    )


def served(serve: Any, bundle: str, order: Order, patch: Patch) -> dict[str, Callable[[], Any]]:
    """Return one way per number of requests that a replica accepts, deployed."""
    from raylarge.serve.deployments import MAX_ONGOING, WorkerReplica
    from raylarge.workers.pool import Replicas

    def way(most: int) -> Callable[[], Any]:
        deployment = serve.deployment(
            WorkerReplica, name=f"Worker{most}", max_ongoing_requests=most
        )
        bound = deployment.bind(bundle, ComputeConfig())
        handle = serve.run(bound, name=f"accepts-{most}", route_prefix=None)

        async def carry_out() -> Any:
            return await arun(joint.plan(order, patch), Replicas(handle).answer)

        return lambda: asyncio.run(carry_out())

    return {f"a replica accepts {most}": way(most) for most in (BEFORE, MAX_ONGOING)}


def rows(seconds: dict[str, list[float]], requests: int) -> list[list[str]]:
    """Return a line per way."""
    base = statistics.median(next(iter(seconds.values())))
    lines = []
    for name, each in seconds.items():
        median = statistics.median(each)
        spread = f"{min(each):.2f} to {max(each):.2f}"
        per_request = f"{1e3 * median / requests:.1f}"
        lines.append([name, f"{median:.2f}", spread, per_request, f"{median / base:.2f}"])
    return lines


if __name__ == "__main__":
    main(sys.argv[1:])
