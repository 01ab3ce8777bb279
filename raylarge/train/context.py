"""Where the loop runs: alone in this process, or as one worker of Ray Train.

The loop asks a context for its rank, for agreement with the other workers, to keep a
checkpoint and to tell the driver how far it is; it knows neither Ray nor the file system.
Every rank makes the same calls in the same order.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed

from raylarge import storage
from raylarge.train.checkpoint import Checkpoints

Status = dict[str, Any]
"""step, loss, rate (samples/s), fraction (of the training), eta_s: what a progress line shows."""

TELL_SECONDS = 1.0  # between two tellings


@runtime_checkable
class Context(Protocol):
    """One worker's view of the run."""

    rank: int
    world_size: int
    device: torch.device

    def agree(self, value: float) -> float:
        """Rank 0's value, on every rank."""
        ...

    def tell(self, status: Status) -> None:
        """Let the driver's progress line know, now and then."""
        ...

    def scratch(self) -> AbstractContextManager[Path]:
        """A local folder for this rank's checkpoint files, gone at the end of the block."""
        ...

    def report(self, step: int, metrics: dict[str, Any], folder: Path) -> None:
        """Keep a checkpoint made of every rank's folder; it counts once all are in place."""
        ...

    def restore(self) -> AbstractContextManager[tuple[Path, dict[str, Any]] | None]:
        """The newest whole checkpoint (local folder, what was reported with it), if any."""
        ...


class LocalContext:
    """One process, no Ray: the twin that tests, notebooks and one GPU use."""

    rank = 0
    world_size = 1

    def __init__(self, root: str, keep: int, watch: Callable[[Status], None]) -> None:
        """Take the run's folder, how many checkpoints stay, and who wants to be told."""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.checkpoints = Checkpoints(root, keep)
        self.watch = watch

    def agree(self, value: float) -> float:
        """Nobody to disagree with."""
        return value

    def tell(self, status: Status) -> None:
        """Straight to the progress line."""
        self.watch(status)

    def scratch(self) -> AbstractContextManager[Path]:
        """See `Context`."""
        return self.checkpoints.scratch()

    def report(self, step: int, metrics: dict[str, Any], folder: Path) -> None:
        """See `Context`."""
        self.checkpoints.put(step, self.rank, folder)
        self.checkpoints.commit(step, self.world_size, metrics)

    @contextmanager
    def restore(self) -> Iterator[tuple[Path, dict[str, Any]] | None]:
        """See `Context`."""
        step = self.checkpoints.newest()
        self.checkpoints.forget_after(-1 if step is None else step)
        if step is None:
            yield None
            return
        with self.checkpoints.fetch(step) as found:
            yield found


class RayContext:
    """A worker of Ray Train V2; the process group is up."""

    def __init__(self, root: str, keep: int) -> None:
        """Read rank, world size and device from Ray Train."""
        import ray.train
        import ray.train.torch

        here = ray.train.get_context()
        self.rank = here.get_world_rank()
        self.world_size = here.get_world_size()
        self.local_world_size = here.get_local_world_size()
        self.device = ray.train.torch.get_device()
        self.checkpoints = Checkpoints(root, keep)
        self.status = status_path(root)
        self.told = 0.0

    def use_cores(self) -> None:
        """Share the node's cores evenly among the workers on it."""
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // self.local_world_size))

    def agree(self, value: float) -> float:
        """Broadcast from rank 0."""
        if self.world_size == 1:
            return value
        message = torch.tensor([value], dtype=torch.float64, device=self.device)
        torch.distributed.broadcast(message, src=0)
        return float(message.item())

    def tell(self, status: Status) -> None:
        """Rank 0 leaves a small file beside the checkpoints, which the driver looks at."""
        if self.rank == 0 and time.monotonic() - self.told >= TELL_SECONDS:
            self.told = time.monotonic()
            storage.write_json(self.status, status)

    def scratch(self) -> AbstractContextManager[Path]:
        """See `Context`."""
        return self.checkpoints.scratch()

    def report(self, step: int, metrics: dict[str, Any], folder: Path) -> None:
        """See `Context`; Ray Train is told the metrics, by every rank, once per checkpoint."""
        import ray.train

        self.checkpoints.put(step, self.rank, folder)
        torch.distributed.barrier()
        if self.rank == 0:
            self.checkpoints.commit(step, self.world_size, metrics)
        ray.train.report({"step": step, "loss": metrics.get("loss")})

    @contextmanager
    def restore(self) -> Iterator[tuple[Path, dict[str, Any]] | None]:
        """See `Context`; rank 0 looks, all take what it found."""
        found = None
        if self.rank == 0:
            found = self.checkpoints.newest()
            self.checkpoints.forget_after(-1 if found is None else found)
        step = int(self.agree(-1 if found is None else found))
        if step < 0:
            yield None
            return
        with self.checkpoints.fetch(step) as checkpoint:
            yield checkpoint


def status_path(root: str) -> str:
    """Where rank 0 of a run says how far it is."""
    return storage.join(root, "status.json")
