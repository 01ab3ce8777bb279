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
    may_go: bool  # told to go, it saves and ends; others go on until they are ended

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums over all ranks, the same on every rank."""
        ...

    def words(self, mine: str) -> list[str]:
        """What each rank says, rank 0 first, on every rank."""
        ...

    def leaving(self) -> float:
        """Seconds until the machine must go: inf without a notice, 0 where it says no time."""
        ...

    def tell(self, status: Status) -> None:
        """Let the driver's progress line know, now and then."""
        ...


class LocalContext:
    """One process, no Ray: the twin that tests, notebooks and one GPU use."""

    rank = 0
    world_size = 1
    may_go = True

    def __init__(self, watch: Callable[[Status], None]) -> None:
        """Take who wants to be told how far it is."""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.watch = watch
        self.told_to_go = False

    def total(self, values: Sequence[float]) -> list[float]:
        """Nobody to add."""
        return list(values)

    def words(self, mine: str) -> list[str]:
        """A monologue."""
        return [mine]

    def leaving(self) -> float:
        """0 after SIGTERM, which batch systems and clouds send before they kill."""
        return 0.0 if self.told_to_go else math.inf

    def tell(self, status: Status) -> None:
        """Straight to the progress line."""
        self.watch(status)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within, SIGTERM is heard instead of obeyed; where signals go to another thread, not."""

        def hear(*_: Any) -> None:
            self.told_to_go = True

        try:
            before = signal.signal(signal.SIGTERM, hear)
        except ValueError:  # only the main thread may ask for signals
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
