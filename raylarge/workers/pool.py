"""Many workers behind one `answer(task, **inputs)`, as `plan.arun` calls it.

    ActorPool   Ray actors of this process      (jobs/sample.py workers=N)
    Replicas    a Ray Serve deployment          (serve/app.py)

Requests are pure: one that was lost with its worker is sent again, to any worker. A large reply
that many requests take (the guide's frames) is put into Ray's object store once, and stays there
as long as the plan keeps it.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import (
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)
from torch import Tensor

from raylarge.compute.config import ComputeConfig
from raylarge.compute.resources import WorkerResources, require_resources
from raylarge.errors import UserError
from raylarge.report import say
from raylarge.sampling.bundle_facts import BundleFacts
from raylarge.sampling.plan import Reply
from raylarge.sampling.tasks import Task
from raylarge.workers.worker import Worker

LARGE_BYTES = 1 << 20
TRIES = 5
PATIENCE_S = 60.0
IN_FLIGHT = 64
LOST = (RayActorError, NodeDiedError, OutOfMemoryError, WorkerCrashedError)
"""What a lost worker looks like: ActorDiedError and ActorUnavailableError are RayActorErrors."""


@dataclass(frozen=True)
class ObjectRefTensor:
    """A tensor in the object store: the reference to its bytes, and its type."""

    ref: ray.ObjectRef[Any]
    dtype: torch.dtype

    def open(self, content: np.ndarray) -> Tensor:
        """Return the tensor of the bytes that the reference stands for."""
        return torch.from_numpy(content.copy()).view(self.dtype)


class ObjectStoreCache:
    """Puts each large tensor into the object store once, and frees it when the tensor is freed."""

    def __init__(self) -> None:
        self._stored: dict[int, ObjectRefTensor] = {}

    def __len__(self) -> int:
        return len(self._stored)

    def put(self, reply: Reply) -> Reply | ObjectRefTensor:
        """Return what to send in place of a reply: the reply itself if it is small."""
        if not isinstance(reply, Tensor) or reply.nbytes < LARGE_BYTES:
            return reply
        name = id(reply)
        if name not in self._stored:
            content = reply.contiguous().view(torch.uint8).numpy()
            self._stored[name] = ObjectRefTensor(ray.put(content), reply.dtype)
            weakref.finalize(reply, self._stored.pop, name).atexit = False
        return self._stored[name]

    def put_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return a task's inputs as they are sent."""
        return {name: _each(self.put, value) for name, value in inputs.items()}


def open_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a task's inputs as they were before `ObjectStoreCache.put_inputs`."""

    def opened(value: Any) -> Any:
        return value.open(ray.get(value.ref)) if isinstance(value, ObjectRefTensor) else value

    return {name: _each(opened, value) for name, value in inputs.items()}


def _each(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to an input, or to each item of an input that is a list."""
    return [function(item) for item in value] if isinstance(value, list) else function(value)


async def persist(ask: Callable[[], Awaitable[Any]], what: str) -> Any:
    """Send a request until a reply comes, even if a few workers are lost.

    Raises:
        UserError: the worker raised one, or `TRIES` workers were lost over this request.
    """
    for attempt in range(TRIES):
        try:
            return await ask()
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            raise
        except LOST as error:
            last = error
            await asyncio.sleep(0.1 * 2**attempt)  # lets the news of the death spread
    raise UserError(
        f"{TRIES} workers in a row were lost over {what}; if memory ran out, lower order.batch "
        f"or use fewer workers per machine (the last one: {str(last).splitlines()[0]})."
    ) from last


class PooledWorker:
    """A worker in an actor. It loads at its first call, so that its errors reach the caller."""

    def __init__(self, bundle: str, means: ComputeConfig) -> None:
        """Nothing is loaded yet."""
        self._bundle, self._means = bundle, means
        self._worker: Worker | None = None

    def ready(self) -> None:
        """Load, unless that is done; comes back when the actor is idle."""
        if self._worker is None:
            torch.set_num_threads(self._means.threads)
            self._worker = Worker.opened(self._bundle, self._means)

    def answer(self, task: Task, **inputs: Any) -> Reply:
        """Return the reply to a task."""
        self.ready()
        return self._worker.answer(task, **open_inputs(inputs))  # type: ignore[union-attr]


class ActorPool:
    """Ray actors, each with one request at a time; a request goes to the first idle one.

    Args:
        bundle: the bundle's folder, visible on every node.
        workers: how many actors.
        means: of each. The same settings give the same bytes with any number of workers.
    """

    def __init__(self, bundle: str, workers: int, means: ComputeConfig | None = None) -> None:
        means = means or ComputeConfig()
        some = float(ray.cluster_resources().get("GPU", 0) > 0)
        gpus = some if means.gpus < 0 else means.gpus
        self._room = WorkerResources("a worker", float(means.threads), float(gpus))
        require_resources(self._room)
        actor = ray.remote(PooledWorker).options(
            num_cpus=means.threads, num_gpus=gpus, max_restarts=-1
        )
        self._actors = [actor.remote(bundle, means) for _ in range(workers)]
        self._idle: asyncio.Queue[Any] = asyncio.Queue()
        self._cache = ObjectStoreCache()
        self._closed = False
        self._coming: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Start the actors, and wait for the first; the others join when they are ready.

        Raises:
            UserError: the bundle cannot be loaded.
        """
        for actor in self._actors:
            self._await(actor)
        try:
            first = await asyncio.wait_for(self._next(), PATIENCE_S)
        except (asyncio.TimeoutError, TimeoutError):
            has = ray.cluster_resources()
            room = f"{has.get('CPU', 0):g} CPUs and {has.get('GPU', 0):g} GPUs"
            say(f"waiting for a worker: each wants {self._room.each} of the cluster's {room}")
            first = await self._next()
        self._idle.put_nowait(first)

    async def answer(self, task: Task, **inputs: Any) -> Reply:
        """Return the reply to a task, from the first idle actor."""
        sent = self._cache.put_inputs(inputs)
        return await persist(lambda: self._ask(task, sent), _name(task))

    async def shut_down(self) -> None:
        """End the actors, and what waits for them."""
        self.close()
        await asyncio.gather(*self._coming, return_exceptions=True)

    def close(self) -> None:
        """End the actors."""
        self._closed = True
        for waiting in self._coming:
            waiting.cancel()
        for actor in self._actors:
            ray.kill(actor)
        # A handle that outlives its Ray would, when it goes, end an actor of the next one.
        self._actors.clear()
        self._idle = asyncio.Queue()

    async def _ask(self, task: Task, inputs: Mapping[str, Any]) -> Reply:
        actor = await self._next()
        try:
            reply = await actor.answer.remote(task, **inputs)
        except BaseException:  # lost, failed or cancelled: it is idle when it says so
            self._await(actor)
            raise
        self._idle.put_nowait(actor)
        return reply

    async def _next(self) -> Any:
        """Return the next idle actor, or raise the error that keeps all from starting."""
        actor = await self._idle.get()
        if isinstance(actor, BaseException):
            self._idle.put_nowait(actor)
            raise actor
        return actor

    def _await(self, actor: Any) -> None:
        if self._closed:
            return
        waiting = asyncio.ensure_future(self._until_ready(actor))
        self._coming.add(waiting)
        waiting.add_done_callback(self._coming.discard)

    async def _until_ready(self, actor: Any) -> None:
        """Make an actor idle once it is up; Ray restarts a dead one before it answers."""
        try:
            await actor.ready.options(max_task_retries=-1).remote()
            self._idle.put_nowait(actor)
        except RayTaskError as error:
            cause = error.cause
            self._idle.put_nowait(cause if isinstance(cause, UserError) else error)
        except RayActorError as error:
            self._idle.put_nowait(error)


class Replicas:
    """The replicas of a Serve deployment of workers; Serve routes requests and restarts replicas.

    Args:
        handle: the deployment's handle.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._cache = ObjectStoreCache()
        self._room = asyncio.Semaphore(IN_FLIGHT)

    async def facts(self) -> BundleFacts:
        """What bundle the replicas have."""
        return await persist(lambda: self._handle.facts.remote(), "a question for the bundle")

    async def answer(self, task: Task, **inputs: Any) -> Reply:
        """The reply to a task. Cancelling it cancels the request at the replica."""
        sent = self._cache.put_inputs(inputs)
        async with self._room:
            return await persist(lambda: self._ask(task, sent), _name(task))

    async def _ask(self, task: Task, inputs: Mapping[str, Any]) -> Reply:
        response = self._handle.answer.remote(task, **inputs)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise


def _name(task: Task) -> str:
    """A task in words."""
    return f"one {type(task).__name__} request (order.batch={task.order.batch})"
