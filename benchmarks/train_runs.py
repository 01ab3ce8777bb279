"""Time the steps of the same training done in several ways, in interleaved runs.

    compare: for each round, each way in random order -> a new process -> seconds of its steps

Each run trains in a process of its own and drops its first steps. A hook notes the time before each
forward pass, so a step lasts from one pass to the next and includes everything that the loop does.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from torch import nn

from raylarge.train import registry
from raylarge.train.launch import Train, train
from raylarge.train.task import Batch, DataFacts, TrainTask

WARMUP = 10
"""Steps at the start of each run that do not count."""
LOOPS = ("bare", "bare, with its data")
"""Loops of plain torch: on batches made in advance, and on batches made in each step."""


@dataclass(frozen=True)
class Way:
    """A way to train: by the training loop, or (one of `LOOPS`) by plain torch."""

    name: str
    config: Train
    loop: str = ""


@dataclass
class Timings:
    """The result of `compare`.

    Attributes:
        seconds: by way, wall and CPU seconds of each step, [rounds, steps, 2].
        facts: by way, the facts that its last training returned.
        load: load averages at the start and at the end.
    """

    seconds: dict[str, np.ndarray] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    load: tuple[float, float] = (0.0, 0.0)


class StepTimer:
    """Notes wall and CPU time before each step, and saves them before the last one."""

    def __init__(self, path: str, steps: int) -> None:
        self.path, self.steps = path, steps
        self.times: list[tuple[float, float]] = []

    def before(self, step: int) -> None:
        """Note the time before a step."""
        self.times.append(now())
        if step == self.steps - 1:
            np.save(self.path, np.array(self.times))


@dataclass(frozen=True)
class TimedTask:
    """Builds the real task with a timer on rank 0; pickled to workers."""

    path: str

    def __call__(self, config: Train, facts: DataFacts) -> TrainTask:
        """See `task.BuildTask`."""
        torch.set_num_threads(1)
        task = silent(config, facts)
        timer = StepTimer(self.path, config.steps)

        def hook(_: nn.Module, inputs: tuple[Batch, ...]) -> None:
            step, sample = divmod(int(inputs[0]["sample"][0]), config.batch)
            if sample == 0:
                timer.before(step)

        task.network.register_forward_pre_hook(hook)
        return task


def silent(config: Train, facts: DataFacts) -> TrainTask:
    """Build the real task without sample grids and bundle."""
    task = registry.build(config.run, facts)
    vars(task).update(sheet=_nothing, finish=_nothing)
    return task


def compare(ways: Sequence[Way], steps: int, rounds: int, address: str = "") -> Timings:
    """Time the steps of several ways.

    Args:
        ways: to compare.
        steps: of each run that count; even. Configs may set `checkpoint_every` to `halfway(steps)`.
        rounds: runs of each way.
        address: of the Ray cluster for their workers.
    """
    seconds: dict[str, list[np.ndarray]] = defaultdict(list)
    facts: dict[str, dict[str, Any]] = {}
    shuffle, load = random.Random(0), os.getloadavg()[0]
    for _ in range(rounds):
        for way in shuffle.sample(ways, len(ways)):
            with tempfile.TemporaryDirectory(prefix="runs-") as folder:
                path = f"{folder}/times.npy"
                paths = {"out": f"{folder}/out", "logs": f"{folder}/logs"}
                total = WARMUP + steps + 1
                run = replace(way, config=replace(way.config, steps=total, **paths))
                facts[way.name] = _isolated(run_way, run, path, address)
                seconds[way.name].append(np.diff(np.load(path), axis=0)[-steps:])
    ordered = {way.name: np.stack(seconds[way.name]) for way in ways}
    return Timings(ordered, facts, (load, os.getloadavg()[0]))


def halfway(steps: int) -> int:
    """Return the step number in the middle of the steps that count."""
    return WARMUP + steps // 2


def run_way(way: Way, path: str, address: str = "") -> dict[str, Any]:
    """Train in one way, write the times to a file, and return the facts of the training."""
    torch.set_num_threads(1)
    if address:
        os.environ["RAY_ADDRESS"] = address
    if way.loop:
        return bare(way, StepTimer(path, way.config.steps))
    return train(way.config, TimedTask(path))


def bare(way: Way, timer: StepTimer) -> dict[str, Any]:
    """Train by plain torch: forward, backward, clipping, AdamW and the moving average."""
    config = way.config
    source = registry.source(config.run)
    task = registry.build(config.run, source.facts)
    network, facts = task.network.train(), {}
    averaged = list(task.averaged.parameters())
    options = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay}
    optimizer = torch.optim.AdamW(network.parameters(), **options)
    shadow = [parameter.detach().clone() for parameter in averaged]

    def batch(step: int) -> Batch:
        return task.draw(source.batch(range(step * config.batch, (step + 1) * config.batch)))

    in_advance = way.loop == LOOPS[0]
    batches = [batch(step) for step in range(config.steps)] if in_advance else []
    for step in range(config.steps):
        timer.before(step)
        loss = network(batches[step] if in_advance else batch(step)).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(shadow, averaged, 1 - min(0.9999, (2 + step) / (11 + step)))
        value = loss.item()
        facts.setdefault("first_loss", value)
        facts["loss"] = 0.98 * facts.get("loss", value) + 0.02 * value
    return facts


def now() -> tuple[float, float]:
    """Return wall and CPU seconds."""
    return time.perf_counter(), time.process_time()


def _isolated(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a new process without output."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_mute) as pool:
        return pool.submit(function, *arguments).result()


def _mute() -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.dup2(null, sys.stderr.fileno())


def _nothing(*_: Any) -> None:
    return None
