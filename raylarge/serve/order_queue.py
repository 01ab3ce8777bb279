"""The desk: takes orders, has them carried out a few at a time, keeps the results for a while.

    queued -> running -> done | failed | cancelled

It knows nothing of HTTP or Ray: it is given an `answer` as `plan.arun` wants it. Everything
lives as long as the desk: tickets in memory, pictures in a temporary folder.
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
    """What one service takes on."""

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
    """Too many orders are waiting; one may be taken later."""


@dataclass
class Job:
    """One order and what became of it; the order itself is a file in the folder."""

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
        """How long it has been worked on."""
        if self.began is None:
            return 0.0
        return (self.ended or time.monotonic()) - self.began

    def watch(self, plan: Plan) -> None:
        """Follow the plan; its result still has to be written when all requests are answered."""
        self.progress = min(plan.progress, 0.99)


class OrderQueue:
    """Orders from the moment they are taken to the moment they are forgotten.

    Args:
        answer: answers the plans' requests.
        facts: asks what bundle the workers have, once.
        limits: what to take on.
    """

    def __init__(
        self,
        answer: Callable[..., Awaitable[Any]],
        facts: Callable[[], Awaitable[BundleFacts]],
        limits: ServiceLimits,
    ) -> None:
        self.limits = limits
        self._answer, self._ask_facts = answer, facts
        self._facts: BundleFacts | None = None
        self._tickets: dict[str, Job] = {}
        self._room = asyncio.Semaphore(limits.running)
        self._scratch = tempfile.TemporaryDirectory(prefix="raylarge-serve-")

    async def facts(self) -> BundleFacts:
        """What orders are planned with."""
        if self._facts is None:
            self._facts = await self._ask_facts()
        return self._facts

    async def take(self, values: Mapping[str, Any]) -> Job:
        """Take an order in.

        Raises:
            UserError: it cannot be read, does not fit the bundle, or is beyond the limits.
            FullError: too many orders wait.
        """
        self._turn_away()
        facts = await self.facts()
        order, plan = await asyncio.to_thread(self._plan, values, facts)
        name = uuid.uuid4().hex
        self._turn_away()  # others came in while this one was read
        ticket = Job(name, order.digest, Path(self._scratch.name, name))
        result.write_order(str(ticket.folder), order)
        self._tickets[name] = ticket
        ticket.work = asyncio.create_task(self._carry_out(ticket, order, plan, facts))
        ticket.work.add_done_callback(lambda work: self._settle(ticket, work))
        return ticket

    def find(self, id: str) -> Job | None:
        """The ticket of an id, if it is known (still)."""
        return self._tickets.get(id)

    def cancel(self, ticket: Job) -> None:
        """Stop an order that waits or runs; forget one that has ended."""
        if ticket.ended is not None:
            self._forget(ticket)
        elif ticket.work is not None:
            ticket.state = "cancelled"
            ticket.work.cancel()

    def close(self) -> None:
        """Stop everything and remove all results."""
        for ticket in list(self._tickets.values()):
            self.cancel(ticket)
        self._scratch.cleanup()

    def _turn_away(self) -> None:
        waiting = sum(ticket.state == "queued" for ticket in self._tickets.values())
        if waiting >= self.limits.queued:
            raise FullError(f"{waiting} orders are waiting already; try again later.")

    def _plan(self, values: Mapping[str, Any], facts: BundleFacts) -> tuple[Order, Plan]:
        order = orders.parse(values)
        self._bound(order, facts.patch)
        plan = joint.plan(order, facts.patch)
        facts.check(order)
        return order, plan

    def _bound(self, order: Order, patch: Patch) -> None:
        """Refuse what would keep the service busy for ever or fill its memory."""
        sampler, limits = order.sampler, self.limits
        windows = order.count or order.size[0] * order.size[1] // patch.side_px**2
        asked = {
            "windows": windows,
            "batch": order.batch,
            "passes": max(
                sampler.steps * (1 + sampler.corrections),
                order.condition.iterations,
                order.condition.prior_steps,
            ),
        }
        for name, value in asked.items():
            if value > (most := getattr(limits, name)):
                raise UserError(f"the order asks for {value} {name}; this service allows {most}.")

    async def _carry_out(self, ticket: Job, order: Order, plan: Plan, facts: BundleFacts) -> None:
        async with self._room:
            ticket.state, ticket.began = "running", time.monotonic()
            made = await arun(plan, self._answer, ticket.watch)
            await asyncio.to_thread(result.write, str(ticket.folder), order, facts, made)

    def _settle(self, ticket: Job, work: asyncio.Task[None]) -> None:
        """Note how an order ended, and forget the oldest."""
        ticket.ended = time.monotonic()
        error = None if work.cancelled() else work.exception()
        if work.cancelled():
            ticket.state = "cancelled"
        elif error is None:
            ticket.state, ticket.progress = "done", 1.0
        else:
            ticket.state, ticket.error = "failed", _sentence(error)
            logger.error("order %s failed", ticket.id, exc_info=error)
        ended = [t for t in self._tickets.values() if t.ended is not None]
        for old in sorted(ended, key=lambda t: t.ended or 0.0)[: -self.limits.kept or None]:
            self._forget(old)

    def _forget(self, ticket: Job) -> None:
        self._tickets.pop(ticket.id, None)
        shutil.rmtree(ticket.folder, ignore_errors=True)


def _sentence(error: BaseException) -> str:
    """What the client is told: our own sentences, and of other errors only that there was one."""
    if isinstance(error, UserError):
        return str(error)
    return f"the service failed ({type(error).__name__}); its log says more."
