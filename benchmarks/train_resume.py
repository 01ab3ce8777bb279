"""Time to resume at step 1,000,000, and rows per second, on a table as large as TCGA-BRCA's.

The checkpoint is one that the training wrote, with step, history and counts changed to those of a
run of a million steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import nn

from benchmarks.memory import Peaks
from benchmarks.page import Section
from benchmarks.train_runs import now, silent
from benchmarks.train_tables import GROUP
from raylarge import storage
from raylarge.train import registry
from raylarge.train.checkpoint import Checkpoints
from raylarge.train.checkpoint_reader import COMMIT
from raylarge.train.context import LocalContext
from raylarge.train.history import HISTORY, TrainingHistory
from raylarge.train.ingest import Ingest
from raylarge.train.launch import Train, train
from raylarge.train.state import StoredState
from raylarge.train.task import DataFacts, TrainTask
from raylarge.train.torch_engine import TorchEngine

STEP = 1_000_000
RESUME_GOAL_S = 5.0
BATCH = 64
Spent = dict[str, tuple[float, ...]]
"""By phase, wall and CPU seconds."""
T = TypeVar("T")


class FirstPass(Exception):
    """Raised by the first forward pass after resuming."""


def resume(config: Train, times: int) -> tuple[Section, list[Spent]]:
    """Measure the seconds until a training resumes at step 1,000,000.

    Args:
        config: of a training of `ldm`, whose table exists.
        times: number of measurements.
    """
    age_checkpoint(config)
    samples = [_resumed(replace(config, steps=STEP + 1)) for _ in range(times)]
    values = {name: np.median([sample[name] for sample in samples], axis=0) for name in samples[0]}
    values["table and state"] = values["table"] + values["state"]
    rows = [[_PHASES[name], *(f"{value:.2f}" for value in values[name])] for name in _PHASES]
    source = registry.source(config.run)
    total = sum(source.facts.counts.values())
    needed, batch, total_s = (
        float(values[name][0]) for name in ("table and state", "batch", "all")
    )
    short = [
        f"Resuming: {phase} takes {seconds:.1f} s; the aim is {RESUME_GOAL_S:g} s."
        for phase, seconds in {
            "table and state": needed,
            f"all until the first pass, the first batch's {batch:.1f} s among it,": total_s,
        }.items()
        if seconds > RESUME_GOAL_S
    ]
    note = (
        f"Medians of {times}, imports done. {total:,} rows of {len(source.facts.counts)} scales "
        f"in {total // GROUP:,} row groups, with grids of "
        f"{source.facts.channels} channels and latents of {source.facts.latent}; one file that is "
        f"listed many times, in the page cache. Batches of {config.batch} with equal weights "
        f"of all scales, so the first one needs row groups of all of them; four threads. A "
        f"history of {STEP // config.log_every:,} rows."
    )
    header = ["until", "seconds", "CPU seconds"]
    return Section("Resuming at step 1,000,000", header, rows, [note], short), samples


_PHASES = {
    "table": "the table's row groups are read (Ingest)",
    "state": "weights, moments, averages and history are loaded",
    "table and state": "both",
    "batch": "the first batch is read",
    "all": "the first forward pass of `train`, in total",
}


def age_checkpoint(config: Train) -> None:
    """Train one step, and change its checkpoint to one of a million steps."""
    train(replace(config, steps=1), silent)
    root = config.run.folder
    checkpoint = Checkpoints(root, 1).newest()
    assert checkpoint is not None
    old = Path(root, checkpoint.name)
    history = TrainingHistory(config)
    history.resume(checkpoint.facts, (old / HISTORY).read_text(), "")
    every = range(config.log_every, STEP + 1, config.log_every)
    history.rows = [(n, "0.123456789012345", "1e-04", 12.34, n / 2, 0, "") for n in every]
    history.step, history.seconds = STEP, STEP / 2
    new = old.rename(old.with_name(old.name.replace(f"{1:08d}", f"{STEP:08d}")))
    (new / HISTORY).write_text(history.tables()[HISTORY])
    facts = {**checkpoint.facts, **history.state()}
    facts["files"] = {name: (new / name).stat().st_size for name in facts["files"]}
    storage.write_json(str(new / COMMIT), facts)


def _resumed(config: Train) -> Spent:
    """Measure each phase, and the total."""
    spent: Spent = {}
    source, spent["table"] = timed(lambda: registry.source(config.run))
    _, spent["state"] = timed(lambda: _loaded(config, source.facts))
    first = range(STEP * config.batch, (STEP + 1) * config.batch)
    _, spent["batch"] = timed(lambda: source.batch(first))
    samples: list[list[int]] = []
    began = now()

    def build(config: Train, facts: DataFacts) -> TrainTask:
        """Build a task that stops at its first pass."""
        task = silent(config, facts)

        def hook(_: nn.Module, inputs: Any) -> None:
            spent["all"] = since(began)  # before waiting for prefetched batches
            samples.append(inputs[0]["sample"].tolist())
            raise FirstPass

        task.network.register_forward_pre_hook(hook)
        return task

    with suppress(FirstPass):
        train(config, build)
    if samples != [list(first)]:
        raise AssertionError(f"it resumed with the samples {samples}")
    return spent


def _loaded(config: Train, facts: DataFacts) -> None:
    """Load the task and the checkpoint."""
    engine = TorchEngine(registry.build(config.run, facts), config, LocalContext(lambda _: None))
    checkpoints = Checkpoints(config.run.folder, config.keep)
    newest = checkpoints.newest()
    assert newest is not None
    with checkpoints.fetch(newest) as folder:
        engine.load(StoredState(folder))
        TrainingHistory(config).resume(newest.facts, (folder / HISTORY).read_text(), "")


def timed(call: Callable[[], T]) -> tuple[T, tuple[float, ...]]:
    """Return the result of a call, and its wall and CPU seconds."""
    began = now()
    result = call()
    return result, since(began)


def since(began: tuple[float, float]) -> tuple[float, ...]:
    """Return wall and CPU seconds since a time."""
    return tuple(b - a for a, b in zip(began, now(), strict=True))


def ingest(config: Train, blocks: int) -> tuple[Section, list[list[str]]]:
    """Measure the rows per second of the ingest alone.

    Args:
        config: of a training of `ldm`, whose table exists.
        blocks: super-blocks to read of a scale.
    """
    scales = sorted(registry.source(config.run).facts.counts)
    large = [k for k in scales if 2**k >= 8] or scales[-1:]
    cases = {"8 x 8 cells, one scale": large[:1], f"all {len(scales)} scales alike": scales}
    rows = [_ingest_row(config, name, ks, blocks) for name, ks in cases.items()]
    note = (
        f"Batches of {BATCH}, one after the other in this process; rows are compressed by zstd, in "
        f"the page cache, not decoded before. {blocks} super-blocks of {config.super_block} row "
        f"groups of each scale, after one for warming up; four threads read ahead. Memory is the "
        f"peak above that at the start: the super-block in use and the next one, of each scale, "
        f"and up to 1 GiB of others. `draw` is the task's: timestep, coin and noise of each "
        f"sample, by one thread."
    )
    header = ["rows", "batches/s", "samples/s", "samples per CPU second", "ms a sample of draw",
              "first batch, s", "MiB"]  # fmt: skip
    return Section("Ingest alone", header, rows, [note]), rows


def _ingest_row(config: Train, name: str, scales: Sequence[int], blocks: int) -> list[str]:
    """Return a row of `ingest`."""
    table = Path(*storage.children(config.data, "latents-*")).name
    source = Ingest(config.data, {table: ("latent", "grid")}, config, scales=scales)
    block = max(1, config.super_block * GROUP * len(scales) // BATCH)

    def read(first: int, last: int) -> None:
        for number in range(first, last):
            source.batch(range(number * BATCH, (number + 1) * BATCH))

    def measure() -> tuple[float, float, float]:
        _, (first_s, _) = timed(lambda: read(0, 1))
        read(1, block)
        _, (wall, cpu) = timed(lambda: read(block, (blocks + 1) * block))
        return first_s, wall, cpu

    peaks = Peaks()
    first_s, wall, cpu = peaks.during("ingest", measure)
    count, batch = blocks * block, source.batch(range(BATCH))
    task = registry.build(config.run, source.facts)
    draw = min(timed(lambda: task.draw(batch))[1][0] for _ in range(5))
    figures = [f"{count / wall:.1f}", f"{count * BATCH / wall:.0f}", f"{count * BATCH / cpu:.0f}"]
    figures += [f"{1000 * draw / BATCH:.2f}", f"{first_s:.1f}"]
    return [name, *figures, f"{peaks.mib['ingest']:.0f}"]
