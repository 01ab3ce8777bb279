"""Where the loop runs: alone in this process, or as one worker among several.

The loop asks a context for its rank, for what all ranks together know, and tells it how far it
is; it knows neither Ray nor process groups. Every rank makes the same calls in the same order.
`ray_context.py` has the worker of Ray Train.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch

Status = dict[str, Any]
"""step, loss, rate (samples/s), fraction (of the training), eta_s: what a progress line shows."""


@runtime_checkable
class Context(Protocol):
    """One worker's view of the run."""

    rank: int
    world_size: int
    device: torch.device
    exits_on_preemption: bool  # told to go, it saves and ends; others go on until they are ended

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all ranks, the same on every rank."""
        ...

    def all_gather_str(self, mine: str) -> list[str]:
        """What each rank says, rank 0 first, on every rank."""
        ...

    def preemption_s(self) -> float:
        """Seconds until the machine must go: inf without a notice, 0 where it says no time."""
        ...

    def report(self, status: Status) -> None:
        """Let the driver's progress line know, now and then."""
        ...


class LocalContext:
    """One process, no Ray: the twin that tests, notebooks and one GPU use."""

    rank = 0
    world_size = 1
    exits_on_preemption = True

    def __init__(self, watch: Callable[[Status], None]) -> None:
        """Take who wants to be told how far it is."""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.watch = watch
        self.preempted = False

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        """Nobody to add."""
        return list(values)

    def all_gather_str(self, mine: str) -> list[str]:
        """A monologue."""
        return [mine]

    def preemption_s(self) -> float:
        """0 after SIGTERM, which batch systems and clouds send before they kill."""
        return 0.0 if self.preempted else math.inf

    def report(self, status: Status) -> None:
        """Straight to the progress line."""
        self.watch(status)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within, SIGTERM is heard instead of obeyed; where signals go to another thread, not."""

        def hear(*_: Any) -> None:
            self.preempted = True

        try:
            before = signal.signal(signal.SIGTERM, hear)
        except ValueError:  # only the main thread may ask for signals
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
