"""This rank's batches in order, made and drawn by a thread while the step before is computed."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch

from raylarge.errors import UserError
from raylarge.train.context import Context
from raylarge.train.ingest import share
from raylarge.train.task import Batch, Source, Task

DEPTH = 2  # batches in hand


class Prefetcher:
    """The batches of one rank from a step on."""

    def __init__(self, task: Task, source: Source, context: Context, batch: int, step: int) -> None:
        """Begin to make the first ones."""
        self._task, self._source, self._context = task, source, context
        self._batch, self._step = batch, step
        self._pin = context.device.type == "cuda"
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._made: list[Future[Batch]] = [self._ask() for _ in range(DEPTH)]
        self.waited = 0.0
        """Seconds for which the batch taken last was waited for."""

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def take(self) -> tuple[Batch, str]:
        """The next batch; or an empty one, and what is wrong with the data in words."""
        began = time.monotonic()
        future = self._made.pop(0)
        try:
            return future.result(), ""
        except UserError as error:
            return {}, str(error)
        finally:
            self.waited = time.monotonic() - began
            self._made.append(self._ask())

    def _ask(self) -> Future[Batch]:
        step, self._step = self._step, self._step + 1
        return self._pool.submit(self._make, step)

    def _make(self, step: int) -> Batch:
        samples = share(step, self._batch, self._context.rank, self._context.world_size)
        batch = self._task.draw(self._source.batch(samples))
        return _pinned(batch) if self._pin else batch


def _pinned(batch: Batch) -> Batch:
    """In memory that a GPU copies from by itself."""
    return {name: torch.Tensor.pin_memory(value) for name, value in batch.items()}
