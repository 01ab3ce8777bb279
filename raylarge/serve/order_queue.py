"""A queue of orders: run a few at a time, keep the results for a while.

    queued -> running -> done | failed | cancelled

It uses neither HTTP nor Ray: `answer` is any function that `plan.arun` can call. Jobs are in
memory and pictures in a temporary folder; both are lost when the process ends.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from raylarge import order as orders
from raylarge.config import Config
from raylarge.errors import UserError
from raylarge.execution import result
from raylarge.geometry import Patch
from raylarge.order import Order
from raylarge.sampling import joint
from raylarge.sampling.bundle_facts import BundleFacts
from raylarge.sampling.plan import Plan, arun

logger = logging.getLogger(__name__)


class ServiceLimits(Config):
    """Limits of one service."""

    running: int = Field(2, ge=1)
    """Orders carried out at the same time."""
    queued: int = Field(16, ge=0)
    """Orders that may wait; more are turned away."""
    kept: int = Field(64, ge=0)
    """Finished orders whose pictures are kept; the oldest go first."""
    windows: int = Field(1 << 16, ge=1)
    """The most windows of one order."""
    batch: int = Field(256, ge=1)
    """The most windows of one batch."""
    passes: int = Field(10_000, ge=1)
    """The most denoising steps and corrections of one window."""
    body_bytes: int = Field(64 << 20, ge=1)
    """The largest order as JSON, in bytes."""


class FullError(Exception):
    """Too many orders are waiting; try again later."""


@dataclass
class Job:
    """One order, its state and its files; the order itself is a file in the folder."""

    id: str
    digest: str
    folder: Path
    state: str = "queued"
    progress: float = 0.0
    error: str = ""
    began: float | None = None
    ended: float | None = None
    work: asyncio.Task[None] | None = field(default=None, repr=False)

    @property
    def seconds(self) -> float:
        """Seconds since it began to run."""
        if self.began is None:
            return 0.0
        return (self.ended or time.monotonic()) - self.began

    def watch(self, plan: Plan) -> None:
        """Follow the plan; its result still has to be written when all requests are answered."""
        self.progress = min(plan.progress, 0.99)


class OrderQueue:
    """Orders from submission until their results are removed.

    Args:
        answer: answers the plans' requests.
        facts: asks what bundle the workers have, once.
        limits: of orders and of the queue.
    """

    def __init__(
        self,
        answer: Callable[..., Awaitable[Any]],
        facts: Callable[[], Awaitable[BundleFacts]],
        limits: ServiceLimits,
    ) -> None:
        self.limits = limits
        self._answer, self._read_facts = answer, facts
        self._facts: BundleFacts | None = None
        self._jobs: dict[str, Job] = {}
        self._room = asyncio.Semaphore(limits.running)
        self._scratch = tempfile.TemporaryDirectory(prefix="raylarge-serve-")

    async def facts(self) -> BundleFacts:
        """Return the facts of the bundle, read once."""
        if self._facts is None:
            self._facts = await self._read_facts()
        return self._facts

    async def submit(self, values: Mapping[str, Any]) -> Job:
        """Add an order to the queue.

        Raises:
            UserError: it cannot be read, does not fit the bundle, or is beyond the limits.
            FullError: too many orders wait.
        """
        self._refuse_if_full()
        facts = await self.facts()
        order, plan = await asyncio.to_thread(self._plan, values, facts)
        name = uuid.uuid4().hex
        self._refuse_if_full()  # other orders may have come while this one was read
        job = Job(name, order.digest, Path(self._scratch.name, name))
        result.write_order(str(job.folder), order)
        self._jobs[name] = job
        job.work = asyncio.create_task(self._carry_out(job, order, plan, facts))
        job.work.add_done_callback(lambda work: self._finish(job, work))
        return job

    def find(self, id: str) -> Job | None:
        """Return the job of an id, or None if there is none or it was removed."""
        return self._jobs.get(id)

    def cancel(self, job: Job) -> None:
        """Cancel a job that waits or runs; remove one that has ended."""
        if job.ended is not None:
            self._forget(job)
        elif job.work is not None:
            job.state = "cancelled"
            job.work.cancel()

    def close(self) -> None:
        """Stop everything and remove all results."""
        for job in list(self._jobs.values()):
            self.cancel(job)
        self._scratch.cleanup()

    def _refuse_if_full(self) -> None:
        waiting = sum(job.state == "queued" for job in self._jobs.values())
        if waiting >= self.limits.queued:
            raise FullError(f"{waiting} orders are waiting already; try again later.")

    def _plan(self, values: Mapping[str, Any], facts: BundleFacts) -> tuple[Order, Plan]:
        order = orders.parse(values)
        self._check_limits(order, facts.patch)
        plan = joint.plan(order, facts.patch)
        facts.check(order)
        return order, plan

    def _check_limits(self, order: Order, patch: Patch) -> None:
        """Refuse an order that is beyond the limits."""
        sampler, limits = order.sampler, self.limits
        windows = order.count or order.size[0] * order.size[1] // patch.side_px**2
        sizes = {
            "windows": windows,
            "batch": order.batch,
            "passes": max(
                sampler.steps * (1 + sampler.corrections),
                order.condition.iterations,
                order.condition.prior_steps,
            ),
        }
        for name, value in sizes.items():
            if value > (limit := getattr(limits, name)):
                raise UserError(f"the order asks for {value} {name}; this service allows {limit}.")

    async def _carry_out(self, job: Job, order: Order, plan: Plan, facts: BundleFacts) -> None:
        async with self._room:
            job.state, job.began = "running", time.monotonic()
            image = await arun(plan, self._answer, job.watch)
            await asyncio.to_thread(result.write, str(job.folder), order, facts, image)

    def _finish(self, job: Job, work: asyncio.Task[None]) -> None:
        """Record how a job ended, and remove the oldest results."""
        job.ended = time.monotonic()
        error = None if work.cancelled() else work.exception()
        if work.cancelled():
            job.state = "cancelled"
        elif error is None:
            job.state, job.progress = "done", 1.0
        else:
            job.state, job.error = "failed", _sentence(error)
            logger.error("order %s failed", job.id, exc_info=error)
        ended = [t for t in self._jobs.values() if t.ended is not None]
        for old in sorted(ended, key=lambda t: t.ended or 0.0)[: -self.limits.kept or None]:
            self._forget(old)

    def _forget(self, job: Job) -> None:
        self._jobs.pop(job.id, None)
        shutil.rmtree(job.folder, ignore_errors=True)


def _sentence(error: BaseException) -> str:
    """Return an error's text for clients; of unexpected errors only the type."""
    if isinstance(error, UserError):
        return str(error)
    return f"the service failed ({type(error).__name__}); its log says more."
