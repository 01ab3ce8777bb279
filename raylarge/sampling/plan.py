"""The one idea: a sampling algorithm asks, it never calls anybody.

A plan is a graph of requests. `ready()` gives those whose needs have been fed and that were
not handed out yet, `feed` takes a reply (opaque here: a tensor, or a reference to one held
elsewhere), and nobody learns who answered. Requests are pure: asking twice is harmless.

    plan -ready-> requests -answer-> replies -feed-> plan -> result
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raylarge.order import Order

Reply = Any


@dataclass(frozen=True)
class Task:
    """What is asked; the subclasses are the whole vocabulary. `order` is brief but for Draw."""

    order: Order


@dataclass(frozen=True)
class Draw(Task):
    """The context tokens of some windows at a scale -> [B, n, D]. Takes no replies.

    `kind` is how: null, cdm or embeddings, as in `order.Condition`.
    """

    kind: str
    scale: int
    windows: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Guide(Task):
    """The coarse image's trajectory -> [S + 1, 3, P, P]: S estimates, then the image itself.

    Takes the guide's tokens.
    """

    scale: int


@dataclass(frozen=True)
class Windows(Task):
    """A batch of windows through steps first .. last - 1 -> latents [B, c, p, p].

    Takes the batch's tokens; under a guide its frames; after the first chunk the latents.
    """

    windows: tuple[tuple[int, int], ...]
    first: int
    last: int
    guided_by: int | None


@dataclass(frozen=True)
class Decode(Task):
    """Pixel rows top .. bottom - 1 of the canvas, blended -> uint8 [rows, columns, 3].

    Takes the latents of the batches whose windows reach into the band; `windows` places them.
    """

    windows: tuple[tuple[tuple[int, int], ...], ...]
    top: int
    bottom: int


@dataclass(frozen=True)
class DecodeEach(Task):
    """Separate latents, each decoded alone -> uint8 [B, P, P, 3]. Takes the latents."""


@dataclass(frozen=True)
class Request:
    """A task under a stable id, with the ids of the replies it takes, in their order."""

    id: str
    task: Task
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Snapshot:
    """What a plan needs to go on elsewhere: the finished ids and the replies still wanted."""

    finished: frozenset[str]
    replies: Mapping[str, Reply]


class Plan:
    """A graph of requests and how to make a result of the replies that are kept to the end.

    Args:
        requests: in any order; each need is the id of another request.
        results: ids whose replies make the result.
        finish: the result of those replies, in the order of `results`.

    Raises:
        ValueError: a need or a result that no request gives.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        results: Sequence[str],
        finish: Callable[[list[Reply]], Any],
    ) -> None:
        self.requests = {request.id: request for request in requests}
        self.results, self.finish = tuple(results), finish
        needed = [need for request in requests for need in request.needs]
        if unknown := {*needed, *results} - self.requests.keys():
            raise ValueError(f"no request gives {sorted(unknown)}")
        self._users = dict.fromkeys(self.requests, 0)
        for name in [*needed, *self.results]:
            self._users[name] += 1
        self._handed: set[str] = set()
        self._finished: set[str] = set()
        self._replies: dict[str, Reply] = {}

    def ready(self) -> list[Request]:
        """Requests that may be answered now and were not handed out yet."""
        found = [
            request
            for request in self.requests.values()
            if request.id not in self._handed and self._finished.issuperset(request.needs)
        ]
        self._handed.update(request.id for request in found)
        return found

    def inputs(self, request: Request) -> list[Reply]:
        """The replies that a request takes."""
        return [self._replies[need] for need in request.needs]

    def feed(self, id: str, reply: Reply) -> None:
        """Take a reply; one that came before is ignored. Replies nobody needs any more go."""
        if id in self._finished:
            return
        request = self.requests[id]
        self._finished.add(id)
        self._handed.add(id)
        if self._users[id]:
            self._replies[id] = reply
        for need in request.needs:
            self._users[need] -= 1
            if not self._users[need]:
                self._replies.pop(need, None)

    @property
    def done(self) -> bool:
        """Whether every result is there."""
        return self._finished.issuperset(self.results)

    @property
    def progress(self) -> float:
        """The share of requests that are finished, 0 to 1."""
        return len(self._finished) / len(self.requests)

    @property
    def result(self) -> Any:
        """What the plan was for.

        Raises:
            RuntimeError: the plan is not done.
        """
        if not self.done:
            raise RuntimeError(f"the plan is not done: {self.progress:.0%} of its requests are")
        return self.finish([self._replies[name] for name in self.results])

    def snapshot(self) -> Snapshot:
        """The state from which `restore` goes on."""
        return Snapshot(frozenset(self._finished), dict(self._replies))

    def restore(self, snapshot: Snapshot) -> Plan:
        """Take up a snapshot of a plan of the same order; returns this plan."""
        for id in snapshot.finished:
            self.feed(id, None)
        self._replies = dict(snapshot.replies)
        return self


def run(
    plan: Plan,
    answer: Callable[..., Reply],
    watch: Callable[[Plan], None] = lambda plan: None,
) -> Any:
    """Carry out a plan in one process: `answer(task, *inputs)` for each request in turn."""
    while not plan.done:
        for request in plan.ready():
            plan.feed(request.id, answer(request.task, *plan.inputs(request)))
            watch(plan)
    return plan.result


async def arun(
    plan: Plan,
    answer: Callable[..., Awaitable[Reply]],
    watch: Callable[[Plan], None] = lambda plan: None,
) -> Any:
    """The same loop over many answerers: everything ready is asked at once.

    When a request fails for good its exception is raised, after the others were cancelled.
    """
    asked: dict[asyncio.Future[Any], Request] = {}
    try:
        while not plan.done:
            for request in plan.ready():
                future = asyncio.ensure_future(answer(request.task, *plan.inputs(request)))
                asked[future] = request
            finished, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            for done in finished:
                plan.feed(asked.pop(done).id, done.result())
                watch(plan)
    finally:
        for left in asked:
            left.cancel()
    return plan.result
