"""Samples drawn by a Ray task from a checkpoint, for weights that are sharded (ZeRO-3).

Training continues meanwhile. The task reads the checkpoint, whose tensors are whole, puts the
averages in place of the weights and draws what `monitor.py` would have drawn.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from raylarge.errors import UserError
from raylarge.train.checkpoint import LOOK_S, SHARED_S, Checkpoints
from raylarge.train.checkpoint_reader import Checkpoint
from raylarge.train.monitor import monitor
from raylarge.train.state import StoredState, put_buffers
from raylarge.train.task import Batch, DataFacts, SampleSource, TrainTask


@dataclass(frozen=True)
class SampleJob:
    """What the Ray task needs; it is pickled.

    Attributes:
        root: the run's folder.
        build: makes the trained task.
        facts: of the training data.
    """

    root: str
    build: Callable[[DataFacts], TrainTask]
    facts: DataFacts

    def __call__(self, batch: Batch, step: int) -> None:
        """Draw the samples of a step, once its checkpoint is committed."""
        checkpoints = Checkpoints(self.root, keep=1)
        task = self.build(self.facts)
        task.network.to("cuda" if torch.cuda.is_available() else "cpu")
        with checkpoints.fetch(_committed(checkpoints, step)) as folder:
            put(task, StoredState(folder))
        monitor.draw(self.root, step, task, batch)


class RemoteSamples:
    """Requests and awaits the Ray tasks that draw samples; used by rank 0."""

    def __init__(self, job: SampleJob, source: SampleSource, num_gpus: float) -> None:
        """Take the job, the samples that serve as conditions, and the GPUs of a task."""
        self._job, self._source, self._num_gpus = job, source, num_gpus
        self._requests: list[Any] = []

    def request(self, step: int) -> None:
        """Start a task that waits for the checkpoint of a step and draws its samples."""
        import ray

        job = ray.remote(num_cpus=0, num_gpus=self._num_gpus, max_retries=0)(_draw)
        batch = self._source.batch(range(monitor.SHOWN))
        self._requests.append(job.remote(self._job, batch, step))

    def wait(self) -> None:
        """Wait until all requests are drawn or have failed; a failure does not stop training."""
        import ray

        ray.wait(self._requests, num_returns=len(self._requests), timeout=SHARED_S)


def _draw(job: SampleJob, batch: Batch, step: int) -> None:
    job(batch, step)


def put(task: TrainTask, stored: StoredState) -> None:
    """Copy the weights of a checkpoint into a task's network, averaged ones where they exist."""
    averaged = {id(p) for p in task.averaged.parameters()} if task.averaged is not None else set()
    trained = {n: p for n, p in task.network.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in trained.items():
            kind = "average" if id(parameter) in averaged else "weights"
            parameter.copy_(stored[f"{kind}/{name}"])
    put_buffers(task.network, stored)


def _committed(checkpoints: Checkpoints, step: int) -> Checkpoint:
    """Wait for the checkpoint of a step, or a later one, and return it.

    Raises:
        UserError: none is committed within `SHARED_S`.
    """
    began = time.monotonic()
    while time.monotonic() - began < SHARED_S:
        newest = checkpoints.newest()
        if newest is not None and newest.facts["step"] >= step:
            return newest
        time.sleep(LOOK_S)
    raise UserError(f"{checkpoints.root} has no checkpoint of step {step}; no sheet is drawn.")
