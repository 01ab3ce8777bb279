"""A sheet of samples by a Ray task of its own, from a checkpoint: for weights that lie in shards.

Training goes on meanwhile. The task reads the checkpoint, whose tensors are whole, puts the
averages in place of the weights and draws what `monitor.py` would have drawn.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from raylarge.errors import UserError
from raylarge.train.checkpoint import LOOK_S, SHARED_S, Checkpoints, Found
from raylarge.train.config import Train, run_folder
from raylarge.train.monitor import monitor
from raylarge.train.state import StoredState, put_buffers
from raylarge.train.task import Build, Source, Task


class RemoteSamples:
    """Rank 0's hand on the tasks that draw."""

    def __init__(self, config: Train, build: Build, sources: tuple[Source, Source | None]) -> None:
        """Take what is trained, and the sources of training and held-out samples."""
        self._config, self._build = config, build
        self._shown = sources[1] or sources[0]
        self._facts = sources[0].facts
        self._asked: list[Any] = []

    def ask(self, step: int) -> None:
        """Have a sheet drawn as soon as the step's checkpoint stands."""
        import ray

        job = ray.remote(num_cpus=0, num_gpus=self._config.sheet_gpus, max_retries=0)(_draw)
        batch = self._shown.batch(range(monitor.SHOWN))
        self._asked.append(job.remote(self._config, self._build, self._facts, batch, step))

    def wait(self) -> None:
        """Until what was asked for is drawn, or has failed: a sheet is no reason to stop."""
        import ray

        ray.wait(self._asked, num_returns=len(self._asked), timeout=SHARED_S)


def _draw(config: Train, build: Build, facts: Any, batch: Any, step: int) -> None:
    root = run_folder(config)
    checkpoints = Checkpoints(root, config.keep)
    task = build(config, facts)
    task.network.to("cuda" if torch.cuda.is_available() else "cpu")
    with checkpoints.fetch(_committed(checkpoints, step)) as folder:
        put(task, StoredState(folder))
    monitor.draw(root, step, task, batch)


def put(task: Task, stored: StoredState) -> None:
    """The weights of a checkpoint into a task's network, averaged ones where there are such."""
    averaged = {id(p) for p in task.averaged.parameters()} if task.averaged is not None else set()
    trained = {n: p for n, p in task.network.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in trained.items():
            kind = "average" if id(parameter) in averaged else "weights"
            parameter.copy_(stored[f"{kind}/{name}"])
    put_buffers(task.network, stored)


def _committed(checkpoints: Checkpoints, step: int) -> Found:
    """The checkpoint of a step, when it stands.

    Raises:
        UserError: it does not for too long.
    """
    began = time.monotonic()
    while time.monotonic() - began < SHARED_S:
        found = checkpoints.newest()
        if found is not None and found.facts["step"] >= step:
            return found
        time.sleep(LOOK_S)
    raise UserError(f"{checkpoints.root} has no checkpoint of step {step}; no sheet is drawn.")
