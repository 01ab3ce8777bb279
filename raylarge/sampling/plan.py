"""Plans: sampling algorithms as graphs of requests, without I/O.

`ready()` returns the requests whose inputs are there and that it has not returned before; `feed`
takes a reply, in any order. A reply is opaque here: a tensor, or a reference to one. Requests are
pure functions, so each may be answered anywhere, and more than once.

    plan -ready-> requests -answer-> replies -feed-> plan -> result

Replies are in a `Store` as long as a request needs them: in memory, or on disk (`ReplyStore`).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from raylarge.sampling.tasks import Parts, Task

Reply = Any


@dataclass(frozen=True)
class Request:
    """A task under a stable id.

    Attributes:
        needs: the task's inputs by name: the id of the reply, or several ids, of an input that
            is a list of replies.
    """

    id: str
    task: Task
    needs: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)

    @property
    def sources(self) -> list[str]:
        """The ids of all replies that the task takes."""
        needs = self.needs.values()
        return [id for need in needs for id in ([need] if isinstance(need, str) else need)]


@dataclass(frozen=True)
class Snapshot:
    """The state of a plan: the finished ids, and the replies that requests still need."""

    finished: frozenset[str]
    replies: Mapping[str, Reply]


@runtime_checkable
class Store(Protocol):
    """Where a plan keeps replies as long as a request needs them."""

    def keep(self, name: str, reply: Reply | None) -> Any:
        """Keep a reply (None: only that there was one); return what `open` takes."""
        ...

    def open(self, kept: Any) -> Reply:
        """Return a reply that was kept."""
        ...

    def free(self, name: str) -> None:
        """Delete a reply, but not that there was one."""
        ...


class MemoryStore:
    """Keeps replies in memory: what it returns is the reply."""

    def keep(self, name: str, reply: Reply | None) -> Any:
        """Return the reply."""
        return reply

    def open(self, kept: Any) -> Reply:
        """Return the reply."""
        return kept

    def free(self, name: str) -> None:
        """Do nothing: the plan drops the reply."""


class Plan:
    """A graph of requests and how to make a result of the replies that are kept to the end.

    Args:
        requests: in any order; each need is the id of another request, or id#i for one part.
        results: names whose replies make the result.
        finish: the result of those replies, in the order of `results`; it gets them as the
            store kept them, and `open`, which gives the reply itself.

    Raises:
        ValueError: a need or a result that no request gives.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        results: Sequence[str],
        finish: Callable[[list[Any], Callable[[Any], Reply]], Any],
    ) -> None:
        self.requests = {request.id: request for request in requests}
        self.results, self.finish, self.store = tuple(results), finish, MemoryStore()
        needed = [need for request in requests for need in request.sources]
        if unknown := {whole(n) for n in [*needed, *results]} - self.requests.keys():
            raise ValueError(f"no request gives {sorted(unknown)}")
        self._users = Counter([*needed, *self.results])
        self._waits = {r.id: len({whole(n) for n in r.sources}) for r in requests}
        self._next: dict[str, list[str]] = {}
        for request in requests:
            for source in dict.fromkeys(map(whole, request.sources)):
                self._next.setdefault(source, []).append(request.id)
        self._fresh = [id for id, count in self._waits.items() if not count]
        self._finished: set[str] = set()
        self._replies: dict[str, Any] = {}

    def ready(self) -> list[Request]:
        """Requests that may be answered now and were not handed out yet."""
        fresh, self._fresh = self._fresh, []
        return [self.requests[id] for id in fresh if id not in self._finished]

    def inputs(self, request: Request) -> dict[str, Any]:
        """Return the replies that a request takes, by name: a reply, or a list of replies."""

        def opened(id: str) -> Reply:
            return self.store.open(self._replies[id])

        return {
            name: opened(need) if isinstance(need, str) else [opened(id) for id in need]
            for name, need in request.needs.items()
        }

    @property
    def names(self) -> frozenset[str]:
        """Names of all replies that some request takes, or that make the result."""
        return frozenset(self._users)

    def feed(self, id: str, reply: Reply) -> None:
        """Take a reply, unless there was one; delete the replies that no request needs any more."""
        if id in self._finished:
            return
        for name, part in _parts(id, reply).items():
            needed = self._users[name] > 0
            if needed or name == id:
                kept = self.store.keep(name, part if needed else None)
            if needed:
                self._replies[name] = kept
        self._finish(id)

    def _finish(self, id: str) -> None:
        """Note that a request is finished: others may follow, and its needs lose a user."""
        self._finished.add(id)
        for follower in self._next.get(id, ()):
            self._waits[follower] -= 1
            if not self._waits[follower]:
                self._fresh.append(follower)
        for need in self.requests[id].sources:
            self._users[need] -= 1
            if not self._users[need] and self._replies.pop(need, None) is not None:
                self.store.free(need)

    @property
    def done(self) -> bool:
        """Whether every result is there."""
        return self._finished.issuperset(map(whole, self.results))

    @property
    def progress(self) -> float:
        """The share of requests that are finished, 0 to 1."""
        return len(self._finished) / len(self.requests)

    @property
    def result(self) -> Any:
        """Return the result.

        Raises:
            RuntimeError: the plan is not done.
        """
        if not self.done:
            raise RuntimeError(f"the plan is not done: {self.progress:.0%} of its requests are")
        return self.finish([self._replies[name] for name in self.results], self.store.open)

    def snapshot(self) -> Snapshot:
        """The state from which `restore` goes on."""
        opened = {name: self.store.open(kept) for name, kept in self._replies.items()}
        return Snapshot(frozenset(self._finished), opened)

    def restore(self, snapshot: Snapshot) -> Plan:
        """Take up a snapshot of a plan of the same order; returns this plan."""
        kept = {name: self.store.keep(name, reply) for name, reply in snapshot.replies.items()}
        return self.resume(snapshot.finished, kept)

    def resume(self, finished: Iterable[str], kept: Mapping[str, Any]) -> Plan:
        """Take up what is finished, with the replies as the store keeps them."""
        for id in set(finished) - self._finished:
            self._finish(id)
        self._replies = dict(kept)
        return self


def whole(name: str) -> str:
    """The id of the request that gives the reply of a name."""
    return name.partition("#")[0]


def _parts(id: str, reply: Reply) -> dict[str, Reply]:
    """The replies that a reply consists of, by name."""
    if not isinstance(reply, Parts):
        return {id: reply}
    return {id: reply.whole} | {f"{id}#{i}": part for i, part in enumerate(reply.parts)}


def run(
    plan: Plan,
    answer: Callable[..., Reply],
    watch: Callable[[Plan], None] = lambda plan: None,
) -> Any:
    """Carry out a plan in one process: `answer(task, **inputs)` for each request in turn.

    The latest ready requests come first, so that few replies exist at a time.
    """
    stack: list[Request] = []
    while not plan.done:
        stack += reversed(plan.ready())
        request = stack.pop()
        plan.feed(request.id, answer(request.task, **plan.inputs(request)))
        watch(plan)
    return plan.result


async def arun(
    plan: Plan,
    answer: Callable[..., Awaitable[Reply]],
    watch: Callable[[Plan], None] = lambda plan: None,
    most: int = 64,
) -> Any:
    """Carry out a plan with up to `most` requests at a time.

    When a request fails for good its exception is raised, after the others were cancelled.
    """
    asked: dict[asyncio.Future[Any], Request] = {}
    stack: list[Request] = []
    try:
        while not plan.done:
            stack += reversed(plan.ready())
            while stack and len(asked) < most:
                request = stack.pop()
                future = asyncio.ensure_future(answer(request.task, **plan.inputs(request)))
                asked[future] = request
            finished, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            for done in finished:
                plan.feed(asked.pop(done).id, done.result())
                watch(plan)
    finally:
        for left in asked:
            left.cancel()
    return plan.result
