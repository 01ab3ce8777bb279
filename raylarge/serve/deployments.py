"""The two deployments: workers that compute, and the ingress with the queue of orders."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from fastapi import FastAPI
from ray.serve.handle import DeploymentHandle

from raylarge.compute.config import ComputeConfig
from raylarge.sampling.bundle_facts import BundleFacts
from raylarge.sampling.plan import Reply
from raylarge.sampling.tasks import Task
from raylarge.serve.api import Api
from raylarge.serve.order_queue import OrderQueue, ServiceLimits
from raylarge.workers.pool import IN_FLIGHT, Replicas, open_inputs
from raylarge.workers.worker import Worker

MAX_ONGOING = IN_FLIGHT + 1
"""Requests that a replica accepts: all that the ingress has in flight, and one for the facts.

With fewer than are in flight, Serve's router tries again and again until a replica has room,
which takes longer than a small request.
"""
OPENED = 2
"""Requests of a replica whose inputs are in memory: the one that is computed, and the next."""


class WorkerReplica:
    """A worker as a Serve deployment: one request at a time, in a thread of its own.

    A cancelled request is felt at once; the one being computed ends by itself, and its reply
    is dropped.
    """

    def __init__(self, bundle: str, means: ComputeConfig) -> None:
        """Load the bundle; the replica is healthy when this has come back."""
        self._worker = Worker.opened(bundle, means)
        self._room = asyncio.Semaphore(OPENED)
        self._thread = ThreadPoolExecutor(1, "answer", torch.set_num_threads, (means.threads,))

    async def facts(self) -> BundleFacts:
        """What the bundle is."""
        return BundleFacts.of(self._worker.bundle)

    async def answer(self, task: Task, **inputs: Any) -> Reply:
        """Return the reply to a task."""
        loop = asyncio.get_running_loop()
        async with self._room:
            opened = await asyncio.to_thread(open_inputs, inputs)
            call = partial(self._worker.answer, task, **opened)
            return await loop.run_in_executor(self._thread, call)


class ServiceIngress:
    """The queue of orders behind HTTP, as a Serve deployment."""

    def __init__(self, worker: DeploymentHandle, limits: ServiceLimits) -> None:
        """Create the queue."""
        replicas = Replicas(worker)
        self._queue = OrderQueue(replicas.answer, replicas.facts, limits)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the application, in the process that has the queue."""
        return Api(self._queue).app()
