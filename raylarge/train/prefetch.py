"""Prefetching: a thread reads and draws this rank's next batches during the present step."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch

from raylarge.errors import UserError
from raylarge.train.context import Context
from raylarge.train.ingest import share
from raylarge.train.task import Batch, SampleSource, TrainTask

DEPTH = 2  # batches read ahead


class Prefetcher:
    """Yields the batches of one rank in order, from a step on."""

    def __init__(
        self, task: TrainTask, source: SampleSource, context: Context, batch: int, step: int
    ) -> None:
        """Start to read the first batches."""
        self._task, self._source, self._context = task, source, context
        self._batch, self._step = batch, step
        self._pin = context.device.type == "cuda"
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._futures: list[Future[Batch]] = [self._submit() for _ in range(DEPTH)]
        self.waited = 0.0
        """Seconds spent waiting for the last batch."""

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
        """Return the next batch; or an empty one, and the error message of the data."""
        began = time.monotonic()
        future = self._futures.pop(0)
        try:
            return future.result(), ""
        except UserError as error:
            return {}, str(error)
        finally:
            self.waited = time.monotonic() - began
            self._futures.append(self._submit())

    def _submit(self) -> Future[Batch]:
        step, self._step = self._step, self._step + 1
        return self._pool.submit(self._read, step)

    def _read(self, step: int) -> Batch:
        samples = share(step, self._batch, self._context.rank, self._context.world_size)
        batch = self._task.draw(self._source.batch(samples))
        return _pinned(batch) if self._pin else batch


def _pinned(batch: Batch) -> Batch:
    """Copy a batch to pinned memory."""
    return {name: torch.Tensor.pin_memory(value) for name, value in batch.items()}
