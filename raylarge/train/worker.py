"""What every worker does, and the local twin: set up, train, finish.

What one rank alone finds wrong while it sets up is told to all, so that all of them stop.
"""

from __future__ import annotations

import secrets
from functools import partial
from typing import Any

import torch

from raylarge import storage
from raylarge.errors import UserError
from raylarge.models import model_card
from raylarge.train import registry, resume
from raylarge.train.activations import recompute
from raylarge.train.checkpoint import Checkpoints
from raylarge.train.config import Train
from raylarge.train.context import Context
from raylarge.train.deepspeed_engine import DeepSpeedEngine
from raylarge.train.engine import Engine
from raylarge.train.estimate.memory import training_flops
from raylarge.train.estimate.plan import example
from raylarge.train.history import HISTORY
from raylarge.train.ingest import Ingest
from raylarge.train.loop import TrainingJob, fit
from raylarge.train.monitor.bins import Bins
from raylarge.train.monitor.curve import curve, report, rows_of
from raylarge.train.monitor.meter import Meter
from raylarge.train.monitor.monitor import Monitor
from raylarge.train.monitor.remote_samples import RemoteSamples, SampleJob
from raylarge.train.monitor.trackers import TrackedRun, track
from raylarge.train.rows import NoRows
from raylarge.train.task import BuildTask, Run, SampleSource, TrainTask
from raylarge.train.torch_engine import TorchEngine

STATISTICS = 64
"""Training samples that a task sees at its end, to standardise by."""


def work(
    config: Train, build: BuildTask | None, context: Context, source: SampleSource | None = None
) -> dict[str, Any]:
    """Train, and on rank 0 write the parts of the bundle.

    Args:
        config: what to train on what.
        build: makes the task; by default that of the model.
        context: this worker's.
        source: of the training samples, where it is open already.

    Raises:
        UserError: what a user can mend; the same on every rank.
    """
    torch.manual_seed(config.seed)
    made: TrainingJob | None = None
    problem = ""
    attempt = context.all_gather_str(secrets.token_hex(4))[0]
    try:
        source = source or registry.source(config.run)
        made = _set_up(config, build, context, attempt, source)
    except UserError as error:
        problem = str(error)
    said = [words for words in context.all_gather_str(problem) if words]
    if said or made is None:
        raise UserError(said[0])
    try:
        return _trained(config, made, context)
    finally:
        for source in (made.source, made.held_out):
            if isinstance(source, Ingest):
                source.close()


def _trained(config: Train, made: TrainingJob, context: Context) -> dict[str, Any]:
    engine: Engine = (DeepSpeedEngine if config.by_deepspeed else TorchEngine)(
        made.task, config, context
    )
    facts = fit(engine, context, made, config)
    facts |= {"config": resume.shareable(config), "data_digest": made.source.digest}
    counts = {str(k): rows for k, rows in made.source.facts.counts.items()}
    facts |= {"rows": counts, "commit": model_card.commit()}
    average = engine.average()
    with engine.whole():
        if context.rank == 0:
            resume.refuse_replaced(config.run)
            facts |= {"on": resume.stands_on(config.run)}
            sample = made.source.batch(range(STATISTICS))
            made.task.finish(config.out, average, facts, sample)
            _tell(config, made, facts)
    return facts


def _set_up(
    config: Train, build: BuildTask | None, context: Context, attempt: str, source: SampleSource
) -> TrainingJob:
    """Everything but the engine.

    Raises:
        UserError: data, a bundle or settings that do not fit.
    """
    run = config.run
    make = partial(build, config) if build else partial(registry.build, run)
    task = make(source.facts)
    held = _held(run)
    watcher = _watcher(config, task, source, context)
    if config.checkpointing:
        recompute(task.network)
    sharded = config.by_deepspeed and config.zero == 3
    remote = None
    if sharded:
        job = SampleJob(run.folder, make, source.facts)
        remote = RemoteSamples(job, held or source, config.sheet_gpus)
    checkpoints = Checkpoints(run.folder, config.keep, attempt)
    return TrainingJob(task, source, held, checkpoints, watcher, remote)


def _held(run: Run) -> SampleSource | None:
    """Where held-out samples come from, if there are any."""
    try:
        return registry.source(run, "val")
    except NoRows:
        return None


def _watcher(config: Train, task: TrainTask, source: SampleSource, context: Context) -> Monitor:
    flops, begin = None, None
    if context.rank == 0:
        name = f"{config.model} {config.out.rstrip('/').rsplit('/', 1)[-1]}"
        begin = partial(_track, config, name)
        if config.track != "none":
            shaped = isinstance(source, Ingest)  # without a look at rows that come much later
            batch = example(source.facts, 2) if shaped else source.batch(range(2))
            flops = training_flops(task.network, task.draw(batch), config.checkpointing)
    meter = Meter(context.device, context.world_size, config.precision, flops)
    length = getattr(getattr(task.network, "schedule", None), "length", 1000)
    return Monitor(config.run.folder, Bins(source.facts.scales, length=length), meter, begin)


def _track(config: Train, name: str, step: int) -> Any:
    return track(config.track, TrackedRun(config.run.folder, name, resume.told(config), step))


def _tell(config: Train, made: TrainingJob, facts: dict[str, Any]) -> None:
    """What a run leaves for people."""
    root = config.run.folder
    if storage.exists(storage.join(config.out, "model_index.json")):
        model_card.write(config.out)
    rows = rows_of(storage.read_bytes(storage.join(root, HISTORY)).decode())
    curve(rows, storage.join(root, "curve.png"))
    report(root, {**facts, **made.monitor.figures()}, rows)
