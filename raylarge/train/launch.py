"""One verb, `train`: a config in, a part of the bundle out, in this process or under Ray Train.

    OUT/                       the bundle that the model's parts go into
    OUT/.train/<model>/        config.json, step-*/ (checkpoints), loss.csv, facts.json

The same command run again goes on from the newest checkpoint, whatever killed it; a command
that differs in what shapes the result is refused.
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING
from tqdm import tqdm

from raylarge import config as configuration
from raylarge import report, storage, tables
from raylarge.errors import UserError
from raylarge.train import driver
from raylarge.train.cdm import CdmConfig
from raylarge.train.checkpoint import HISTORY, Checkpoints
from raylarge.train.context import Context, LocalContext, RayContext, Status
from raylarge.train.engine import DeepSpeedEngine, Engine, TorchEngine
from raylarge.train.ingest import Ingest, check_batch
from raylarge.train.ldm import LdmConfig
from raylarge.train.loop import fit
from raylarge.train.task import Build, Recipe
from raylarge.train.vae import VaeConfig

TASKS = {"vae": "examples", "ldm": "latents", "cdm": "latents"}
"""The models and the tables they learn from; raylarge/train/<model>.py has their `build`."""

STATISTICS = 64
"""Training samples that a task sees at its end, to standardise by."""

CHOICES = {
    "model": tuple(TASKS),
    "strategy": ("deepspeed", "torch"),
    "zero": (0, 1, 2, 3),
    "precision": ("fp32", "bf16"),
    "schedule": ("constant", "cosine"),
}

FREE = {"out", "data", "steps", "minutes", "logs", "checkpoint_every", "keep", "log_every", "gpu"}
FREE |= {"patience", "accumulation", "workers", "strategy", "zero", "max_failures"}
"""Keys that a resumed run may change (see `_identity` for what the engine pins)."""


@dataclass(frozen=True)
class Train(Recipe):
    """Which model learns from what, and who does the work."""

    model: str = MISSING  # vae, ldm or cdm
    data: str = MISSING  # folder of the tables
    out: str = MISSING  # the bundle
    workers: int = 0  # 0: the local twin, in this process; n: Ray Train
    strategy: str = "deepspeed"  # among workers: deepspeed or torch (DDP); the twin is torch
    gpu: bool | None = None  # one per worker; None: where the cluster has enough
    max_failures: int = 3  # of workers, before giving up
    logs: str | None = None  # folder for the workers' output; None: Ray's own
    vae: VaeConfig = field(default_factory=VaeConfig)
    ldm: LdmConfig = field(default_factory=LdmConfig)
    cdm: CdmConfig = field(default_factory=CdmConfig)


def train(config: Train, build: Build | None = None) -> dict[str, Any]:
    """Train a model and put it into the bundle.

    Args:
        config: what to train, how, and where.
        build: makes the task; by default that of raylarge/train/<model>.py.

    Returns:
        What `fit` says, with seconds_total, bundle and loss_csv.

    Raises:
        UserError: a config that cannot be, data that do not fit, workers that keep failing.
    """
    began = time.monotonic()
    config = _checked(config)
    root = run_folder(config)
    _refuse_mixing(config, root)
    facts = _finished(config, root)
    if facts is None:
        tables.manifest(config.data, table_name(config))  # before any worker starts
        with _line(config.model) as show:
            facts = (_on_ray if config.workers else _here)(config, build, show)
        facts |= {"bundle": config.out, "loss_csv": storage.join(root, HISTORY)}
        facts |= {"seconds_total": round(time.monotonic() - began, 2)}
        storage.write_json(storage.join(root, "facts.json"), facts)
    report.say(_closing(config, facts))
    return facts


def run_folder(config: Train) -> str:
    """Where a run keeps its checkpoints and its history."""
    return storage.join(config.out, ".train", config.model)


def table_name(config: Train) -> str:
    """The table that a model learns from; of latents, those of the bundle's autoencoder.

    Raises:
        UserError: no autoencoder, and no telling which latents.
    """
    if TASKS[config.model] == "examples":
        return "examples"
    if storage.exists(storage.join(config.out, "vae", "config.json")):
        from raylarge.models import bundle

        return f"latents-{bundle.digest(config.out, ('vae',))}"
    found = storage.listing(storage.join(config.data, "encode-*.json"))
    if len(found) != 1:
        raise UserError(
            f"there is no autoencoder in {config.out}; train one with python jobs/train.py "
            f"model=vae out={config.out}, then encode the examples with it."
        )
    return "latents-" + found[0].rsplit("encode-")[-1].removesuffix(".json")


def _work(config: Train, build: Build | None, context: Context) -> dict[str, Any]:
    """What every worker does, and the local twin."""
    torch.manual_seed(config.seed)
    build = build or importlib.import_module(f"raylarge.train.{config.model}").build
    ingest = Ingest(config.data, table_name(config), config)
    task = build(config, ingest.facts)
    deepspeed = config.workers and config.strategy == "deepspeed"
    engine: Engine = (DeepSpeedEngine if deepspeed else TorchEngine)(task, config, context)
    facts = fit(engine, context, ingest, config)
    facts |= {"config": _told(config), "data_digest": ingest.digest}
    average = engine.average()
    with engine.whole():
        if context.rank == 0:
            task.finish(config.out, average, facts, ingest.sample(STATISTICS))
    return facts


def _here(config: Train, build: Build | None, show: Callable[[Status], None]) -> dict[str, Any]:
    return _work(config, build, LocalContext(run_folder(config), config.keep, show))


def _on_ray(config: Train, build: Build | None, show: Callable[[Status], None]) -> dict[str, Any]:
    crew = driver.Crew(
        config.workers, config.gpu, config.max_failures, run_folder(config), config.logs
    )
    return driver.run(_worker, (config, build), crew, show)


def _worker(settings: dict[str, bytes]) -> dict[str, Any]:
    """The training function that Ray Train runs in each worker.

    What a user can mend (a `UserError`) is the same on every rank and will not go away by
    starting again, so it is returned; anything else is raised, and Ray starts again.
    """
    config, build = pickle.loads(settings["job"])
    context = RayContext(run_folder(config), config.keep)
    context.use_cores()
    if config.logs is not None:
        _redirect(Path(config.logs, f"train-{config.model}-rank{context.rank}.log"))
    try:
        return _work(config, build, context)
    except UserError as error:
        return {"refused": str(error)}


def _checked(config: Train) -> Train:
    """The config with absolute paths.

    Raises:
        UserError: a value that is not among the choices, or a batch that does not divide.
    """
    for key, choices in CHOICES.items():
        value = getattr(config, key)
        if value not in choices:
            known = ", ".join(str(choice) for choice in choices)
            raise UserError(f"{key}={value} is not known; choose one of: {known}.")
    for key in ("steps", "checkpoint_every", "keep", "log_every", "patience", "accumulation"):
        if getattr(config, key) < 1:
            raise UserError(f"{key}={getattr(config, key)} must be 1 or more.")
    check_batch(config, max(1, config.workers))
    paths = {key: getattr(config, key) for key in ("data", "out", "logs")}
    whole = {
        key: os.path.abspath(path) if path and storage.is_local(path) else path
        for key, path in paths.items()
    }
    return configuration.build(Train, configuration.plain(config), whole)


def _identity(config: Train) -> dict[str, Any]:
    """What shapes the result: a run is only ever gone on with under the same values."""
    sharded = config.workers and config.strategy == "deepspeed"
    engine = f"deepspeed, zero={config.zero}, workers={config.workers}" if sharded else "torch"
    kept = {key: value for key, value in _told(config).items() if key not in FREE}
    return kept | {"engine": engine}


def _told(config: Train) -> dict[str, Any]:
    """The config as JSON holds it, without the other models' parts."""
    values = json.loads(json.dumps(configuration.plain(config)))
    return {k: v for k, v in values.items() if k not in TASKS or k == config.model}


def _refuse_mixing(config: Train, root: str) -> None:
    path, now = storage.join(root, "config.json"), _identity(config)
    if storage.exists(path) and Checkpoints(root, config.keep).newest() is not None:
        before = storage.read_json(path)
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key):
                raise UserError(
                    f"{root} was trained with {key}={before.get(key)}, not {now.get(key)}; give "
                    f"the old value to go on, another out=, or remove that folder to begin anew."
                )
    storage.write_json(path, now)


def _finished(config: Train, root: str) -> dict[str, Any] | None:
    """The facts of a run that has nothing left to do."""
    path = storage.join(root, "facts.json")
    if not storage.exists(path):
        return None
    facts = storage.read_json(path)
    over = config.minutes is not None and facts["seconds"] >= config.minutes * 60
    return facts if over or facts["step"] >= config.steps else None


@contextmanager
def _line(model: str) -> Iterator[Callable[[Status], None]]:
    """One progress line, drawn anew now and then."""
    style = "{desc}{percentage:3.0f}%|{bar}|{postfix}"
    with report.progress(None, model, total=100, bar_format=style, postfix="starting") as bar:
        drawn = time.monotonic()

        def show(status: Status) -> None:
            """Draw the line anew, unless that was just done."""
            nonlocal drawn
            if time.monotonic() - drawn < bar.mininterval:
                return
            drawn, loss, eta = time.monotonic(), status["loss"], status["eta_s"]
            parts = [f"step {status['step']}", f"{status['rate']:.3g} samples/s"]
            parts += [f"loss {loss:.4g}"] if loss is not None else []
            parts += [f"{tqdm.format_interval(eta)} left"] if eta is not None else []
            bar.n = 100 * status["fraction"]
            bar.set_postfix_str(", ".join(parts))

        yield show


def _closing(config: Train, facts: Mapping[str, Any]) -> str:
    loss = "none" if facts["loss"] is None else f"{facts['loss']:.4g}"
    spent = tqdm.format_interval(facts["seconds"])
    line = f"{config.model}: {facts['step']} steps in {spent}, loss {loss}"
    line += f", {facts['skipped']} skipped" if facts["skipped"] else ""
    return f"{line} -> {config.out} (curve: {facts['loss_csv']})"


def _redirect(path: Path) -> None:
    """Send all that this process prints, C++ included, to the end of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    with path.open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
