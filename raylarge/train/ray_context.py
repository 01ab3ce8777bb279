"""The loop's context in a worker of Ray Train V2; the process group is up."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
import torch.distributed

from raylarge import storage
from raylarge.train.context import Status

TELL_SECONDS = 1.0  # between two tellings


class RayContext:
    """See `context.Context`."""

    exits_on_preemption = False

    def __init__(self, root: str) -> None:
        """Read rank, world size and device from Ray Train.

        Args:
            root: the run's folder, where rank 0 says how far it is.
        """
        import ray.train
        import ray.train.torch

        here = ray.train.get_context()
        self.rank = here.get_world_rank()
        self.world_size = here.get_world_size()
        self.local_world_size = here.get_local_world_size()
        self.device = ray.train.torch.get_device()
        self.status = status_path(root)
        self.told = 0.0
        self.teller = ThreadPoolExecutor(1, thread_name_prefix="status")  # a store takes its time
        self.telling: Future[None] | None = None

    def use_cores(self) -> None:
        """Share the node's cores evenly among the workers on it."""
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // self.local_world_size))

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        """One all-reduce in float64."""
        if self.world_size == 1:
            return list(values)
        message = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(message)
        found: list[float] = message.tolist()
        return found

    def all_gather_str(self, mine: str) -> list[str]:
        """See `Context`; for rare moments."""
        if self.world_size == 1:
            return [mine]
        said: list[str] = [""] * self.world_size
        torch.distributed.all_gather_object(said, mine)
        return said

    def preemption_s(self) -> float:
        """Seconds until the first node of ours is taken, of which Ray has notice; a barrier."""
        import ray.train

        info = ray.train.get_preemption_info()
        if info is None:
            return math.inf
        return 0.0 if info.deadline_ms is None else max(0.0, info.deadline_ms / 1000 - time.time())

    def report(self, status: Status) -> None:
        """Rank 0 leaves a small file beside the checkpoints, which the driver looks at.

        Raises:
            UserError: the one before could not be written.
        """
        if self.rank or time.monotonic() - self.told < TELL_SECONDS:
            return
        if (before := self.telling) is not None and not before.done():
            return
        self.told = time.monotonic()
        self.telling = self.teller.submit(storage.write_json, self.status, status)
        if before is not None:
            before.result()


def status_path(root: str) -> str:
    """Where rank 0 of a run says how far it is."""
    return storage.join(root, "status.json")
