"""One verb, `train`: a config in, a part of the bundle out, in this process or under Ray Train.

    OUT/                       the bundle that the model's parts go into
    OUT/.train/<model>/        config.json, step-*/ (checkpoints), loss.csv, facts.json

The same command run again goes on from the newest checkpoint, whatever killed it; a command
that differs in what shapes the result is refused. Workers need no runtime environment of
their own, so Ray hands them processes that have started already.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING

from raylarge import config as configuration
from raylarge import report, storage
from raylarge.errors import UserError
from raylarge.train.cdm import CdmConfig
from raylarge.train.checkpoint import Checkpoints
from raylarge.train.context import Context, LocalContext, RayContext, Status, status_path
from raylarge.train.engine import DeepSpeedEngine, Engine, TorchEngine
from raylarge.train.ingest import Ingest, check_batch
from raylarge.train.loop import HISTORY, fit
from raylarge.train.task import Build, Recipe

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

RAY_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",  # 2 s by default, waited at every end
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean the same everywhere
}


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


def table_folder(config: Train) -> str:
    """The table that a model learns from; of latents, those of the bundle's autoencoder.

    Raises:
        UserError: no latents, or no telling which.
    """
    if TASKS[config.model] == "examples":
        return storage.join(config.data, "examples")
    found = storage.listing(storage.join(config.data, "latents-*"))
    if storage.exists(storage.join(config.out, "vae", "config.json")):
        from raylarge.models import bundle

        found = [storage.join(config.data, f"latents-{bundle.digest(config.out, ('vae',))}")]
    if len(found) != 1 or not storage.exists(found[0]):
        raise UserError(
            f"{config.data} has no latents of the autoencoder in {config.out}; train that with "
            f"python jobs/train.py model=vae, then encode with python jobs/prepare.py."
        )
    return found[0]


def _work(config: Train, build: Build | None, context: Context) -> dict[str, Any]:
    """What every worker does, and the local twin."""
    torch.manual_seed(config.seed)
    build = build or importlib.import_module(f"raylarge.train.{config.model}").build
    ingest = Ingest(table_folder(config), config)
    task = build(config, ingest.facts)
    deepspeed = config.workers and config.strategy == "deepspeed"
    engine: Engine = (DeepSpeedEngine if deepspeed else TorchEngine)(task, config, context)
    facts = fit(engine, context, ingest, config)
    facts |= {"config": configuration.plain(config), "data_digest": ingest.digest}
    average = engine.average()
    with engine.whole():
        if context.rank == 0:
            task.finish(config.out, average, facts, ingest.sample(STATISTICS))
    return facts


def _here(config: Train, build: Build | None, show: Callable[[Status], None]) -> dict[str, Any]:
    return _work(config, build, LocalContext(run_folder(config), config.keep, show))


def _on_ray(config: Train, build: Build | None, show: Callable[[Status], None]) -> dict[str, Any]:
    with _session(config.workers) as ray, _environment(_settings(ray)):
        from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.torch import TorchTrainer

        resources = ray.cluster_resources()
        gpu = config.gpu if config.gpu is not None else resources.get("GPU", 0) >= config.workers
        cpus = min(1.0, max(0.01, resources.get("CPU", 0) / config.workers))
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"config": config, "build": build},
            scaling_config=ScalingConfig(
                config.workers, use_gpu=gpu, resources_per_worker={"CPU": cpus, "GPU": int(gpu)}
            ),
            run_config=RunConfig(
                name="ray",
                storage_path=run_folder(config),
                failure_config=FailureConfig(max_failures=config.max_failures),
            ),
        )
        try:
            facts = _watched(trainer.fit, run_folder(config), show).return_value
        except TrainingFailedError as error:
            raise _explained(config, error) from error
    if "refused" in facts:
        raise UserError(facts["refused"])
    return facts


def _worker(settings: dict[str, Any]) -> dict[str, Any]:
    """The training function that Ray Train runs in each worker.

    What a user can mend (a `UserError`) is the same on every rank and will not go away by
    starting again, so it is returned; anything else is raised, and Ray starts again.
    """
    config: Train = settings["config"]
    context = RayContext(run_folder(config), config.keep)
    context.use_cores()
    if config.logs is not None:
        _redirect(Path(config.logs, f"train-{config.model}-rank{context.rank}.log"))
    try:
        return _work(config, settings["build"], context)
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
    kept = {k: v for k, v in configuration.plain(config).items() if k not in FREE}
    sharded = config.workers and config.strategy == "deepspeed"
    engine = f"deepspeed, zero={config.zero}, workers={config.workers}" if sharded else "torch"
    return kept | {"engine": engine}


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
def _session(workers: int) -> Iterator[Any]:
    """A Ray that is up already, the cluster that RAY_ADDRESS names, or one of our own."""
    import ray

    if ray.is_initialized():
        yield ray
        return
    quiet = {"log_to_driver": False, "logging_level": "error"}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**quiet)
    else:
        cores = max(len(os.sched_getaffinity(0)), workers)
        ray.init("local", num_cpus=cores, include_dashboard=False, **quiet)
    try:
        yield ray
    finally:
        ray.shutdown()


def _settings(ray: Any) -> dict[str, str]:
    """On one node nothing is preempted, and the watcher is one more process to start."""
    alone = len(ray.nodes()) == 1
    return RAY_SETTINGS | ({"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"} if alone else {})


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for a while; what the user has set stays."""
    mine = {key: value for key, value in values.items() if key not in os.environ}
    os.environ.update(mine)
    try:
        yield
    finally:
        for key in mine:
            os.environ.pop(key, None)


def _watched(work: Callable[[], Any], root: str, show: Callable[[Status], None]) -> Any:
    """Run something in a thread; meanwhile show what rank 0 tells. Ctrl-C gets through."""
    done: list[Any] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:
            failed.append(error)

    path, seen = status_path(root), _status(status_path(root))
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.5)
        status = _status(path)
        if status and status != seen:
            seen = status
            show(status)
    if failed:
        raise failed[0]
    return done[0]


def _status(path: str) -> Status | None:
    return storage.read_json(path) if storage.exists(path) else None


@contextmanager
def _line(model: str) -> Iterator[Callable[[Status], None]]:
    """One progress line."""
    style = "{desc}{percentage:3.0f}%|{bar}|{postfix}"
    with report.progress(None, model, total=100, bar_format=style) as bar:
        bar.set_postfix_str("starting")

        def show(status: Status) -> None:
            loss, eta = status["loss"], status["eta_s"]
            parts = [f"step {status['step']}", f"{status['rate']:.3g} samples/s"]
            parts += [f"loss {loss:.4g}"] if loss is not None else []
            parts += [f"{_clock(eta)} left"] if eta is not None else []
            bar.set_postfix_str(", ".join(parts), refresh=False)
            bar.update(int(100 * status["fraction"]) - bar.n)

        yield show


def _closing(config: Train, facts: Mapping[str, Any]) -> str:
    loss = "none" if facts["loss"] is None else f"{facts['loss']:.4g}"
    line = f"{config.model}: {facts['step']} steps in {_clock(facts['seconds'])}, loss {loss}"
    line += f", {facts['skipped']} skipped" if facts["skipped"] else ""
    return f"{line} -> {config.out} (curve: {facts['loss_csv']})"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def _explained(config: Train, error: Exception) -> UserError:
    """What stopped the workers in one sentence; the whole of it in a file."""
    failures = getattr(error, "worker_failures", {}) or {0: error}
    cause = str(next(iter(failures.values()))).strip().splitlines() or [repr(error)]
    path = storage.join(run_folder(config), "error.txt")
    storage.write_bytes(path, str(error).encode())
    return UserError(
        f"training {config.model} failed more than max_failures={config.max_failures} times: "
        f"{cause[-1]}; the whole error is in {path}; the last checkpoint is kept."
    )


def _redirect(path: Path) -> None:
    """Send all that this process prints, C++ included, to the end of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    with path.open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
