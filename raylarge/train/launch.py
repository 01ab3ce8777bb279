"""One verb, `train`: a config in, a part of the bundle out, in this process or under Ray Train.

    OUT/                       the bundle that the model's parts go into
    OUT/.train/<model>/        config.json, step-*/ (checkpoints), loss.csv, skipped.csv,
                               curve.png, sheets/, events/, facts.json, report.json

The same command run again goes on from the newest checkpoint, whatever killed it and however
many workers it has now; a command that differs in what shapes the result is refused.
"""

from __future__ import annotations

import pickle
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from raylarge import report, storage
from raylarge.errors import UserError
from raylarge.models import bundle as bundles
from raylarge.train import ray_trainer, registry, resume
from raylarge.train.checkpoint import Checkpoints
from raylarge.train.config import Train, checked
from raylarge.train.context import LocalContext, Status
from raylarge.train.estimate import plan as plans
from raylarge.train.history import HISTORY
from raylarge.train.monitor import progress
from raylarge.train.ray_context import RayContext
from raylarge.train.task import BuildTask, SampleSource
from raylarge.train.worker import work

__all__ = ["Train", "plan", "train", "train_folds"]


def train(config: Train, build: BuildTask | None = None) -> dict[str, Any]:
    """Train a model and put it into the bundle.

    Args:
        config: what to train, how, and where.
        build: makes the task; by default that of raylarge/train/tasks/<model>.py.

    Returns:
        What `fit` says, with seconds_total, bundle and loss_csv.

    Raises:
        UserError: a config that cannot be, data that do not fit, workers that keep failing,
            another process that trains the same model into the same bundle.
    """
    began = time.monotonic()
    config = checked(config)
    run = config.run
    root = run.folder
    if build is None:
        resume.refuse_lacking(run)
    storage.require_writable("out", config.out)
    source = registry.source(run)  # what is missing is said before any worker starts
    with storage.exclusive(root, f"the training of model={config.model}"):
        resume.refuse_mixing(config)
        facts = resume.finished(run, source.digest)
        if facts is None:
            facts = _carried_out(config, build, source)
            facts |= {"seconds_total": round(time.monotonic() - began, 2)}
            storage.write_json(storage.join(root, "facts.json"), storage.without_folders(facts))
    report.say(_closing(config, facts))
    for said in bundles.mismatched_parts(config.out).values():
        report.say(said)
    return facts


def _carried_out(config: Train, build: BuildTask | None, source: SampleSource) -> dict[str, Any]:
    """Train from the newest whole checkpoint on; what `fit` says, with bundle and loss_csv."""
    root = config.run.folder
    for sentence in Checkpoints(root, config.keep).damage():
        report.say(sentence)
    with progress.progress(config.model, config.batch) as show:
        if config.workers:
            facts = _on_ray(config, build, show)
        else:
            facts = _here(config, build, show, source)
    return facts | {"bundle": config.out, "loss_csv": storage.join(root, HISTORY)}


def plan(config: Train) -> str:
    """What a training would take, as text; nothing is started.

    Without `data` those of ZoomLDM's TCGA-BRCA are assumed.

    Raises:
        UserError: a config that cannot be, or data that do not fit.
    """
    config = checked(config)
    build = partial(registry.build, config.run)
    if not config.data and config.model not in ("vae", "ldm"):
        raise UserError(f"model={config.model} is planned on data alone; give data= and out=.")
    batch, facts, assumed = None, plans.BRCA, f"assumed: {plans.ASSUMED}\n\n"
    if config.data:
        source = registry.source(config.run)
        batch, facts, assumed = source.batch(range(2)), source.facts, ""
    task = plans.on_meta(build, facts)
    plan_ = plans.plan(config, config.worker_group, config.card, facts, task, batch)
    return assumed + plans.format_plan(plan_)


def train_folds(config: Train) -> list[dict[str, Any]]:
    """Train one model per fold, one after the other; what each says."""
    folds = range(config.mil.folds)
    return [train(replace(config, mil=replace(config.mil, fold=fold))) for fold in folds]


def _here(
    config: Train, build: BuildTask | None, show: Callable[[Status], None], source: SampleSource
) -> dict[str, Any]:
    context = LocalContext(show)
    with context.listening():
        return work(config, build, context, source)


def _on_ray(
    config: Train, build: BuildTask | None, show: Callable[[Status], None]
) -> dict[str, Any]:
    crew = ray_trainer.Crew(
        workers=config.workers,
        fewest=config.min_workers or config.workers,
        gpu=config.gpu,
        max_failures=config.max_failures,
        resize_s=config.resize_s,
        root=config.run.folder,
        logs=config.logs,
    )
    return ray_trainer.run(_worker, (config, build), crew, show)


def _worker(settings: dict[str, bytes]) -> dict[str, Any]:
    """The training function that Ray Train runs in each worker.

    What a user can mend (a `UserError`) all ranks know together and it will not go away by
    starting again, so it is returned; anything else is raised, and Ray starts again.
    """
    config, build = pickle.loads(settings["job"])
    context = RayContext(config.run.folder)
    context.use_cores()
    if config.logs is not None:
        _redirect(Path(config.logs, f"train-{config.model}-rank{context.rank}.log"))
    try:
        return work(config, build, context)
    except UserError as error:
        return {"refused": str(error)}


def _closing(config: Train, facts: Mapping[str, Any]) -> str:
    loss = "none" if facts["loss"] is None else f"{facts['loss']:.4g}"
    spent = tqdm.format_interval(facts["seconds"])
    told = f"{config.model}: {facts['step']} steps in {spent}, loss {loss}"
    told += f", {facts['skipped']} skipped" if facts["skipped"] else ""
    return f"{told} -> {config.out} (curve: {facts['loss_csv']})"


def _redirect(path: Path) -> None:
    """Send all that this process prints, C++ included, to the end of a file."""
    import os

    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    with path.open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
