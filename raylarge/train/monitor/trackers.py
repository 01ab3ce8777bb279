"""Watching a training while it runs: figures and pictures for a tracker.

    losses, lr, speed, sheets -> TensorBoard (events/ in the run's folder) | wandb | mlflow | none

A run that goes on from a checkpoint must not double its curve. TensorBoard is told to forget
what came after the checkpoint; the others never forget, so they are not told the same steps
again, whose values would be the same (resume equivalence). A tracker is imported only where it is
chosen.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from raylarge import images, report, storage
from raylarge.errors import UserError

Pixels = UInt8[np.ndarray, "_ _ 3"]
EVENTS = "events"
"""Folder of TensorBoard's files: tensorboard --logdir OUT/.train"""
COPY_SECONDS = 60.0  # between two copies of events to an object store
LARGE_BYTES = 8 << 20  # events of an object store go on in a new file from here


@runtime_checkable
class Tracker(Protocol):
    """Where figures and pictures of a run go; only rank 0 has one."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Figures after so many steps, by names such as `loss/scale 3`."""
        ...

    def picture(self, step: int, name: str, pixels: Pixels) -> None:
        """A picture after so many steps."""
        ...

    def flush(self) -> None:
        """Make safe what was told so far: with every checkpoint."""
        ...

    def close(self) -> None:
        """The run is over."""
        ...


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker knows of a run.

    Attributes:
        root: its folder, local or a URL.
        name: for people.
        config: for people, as JSON holds it.
        step: that it goes on from; 0 for a new one.
    """

    root: str
    name: str
    config: Mapping[str, Any]
    step: int = 0


def track(kind: str, run: TrackedRun) -> Tracker:
    """Open a tracker.

    Args:
        kind: one of `TRACKERS`.
        run: what is watched.

    Raises:
        UserError: no such tracker, a package that is missing, or a service that refuses.
    """
    if kind not in TRACKERS:
        raise UserError(f"track={kind} is not known; choose one of: {', '.join(TRACKERS)}.")
    return TRACKERS[kind](run)


class Silent:
    """Nobody watches."""

    def __init__(self, run: TrackedRun) -> None:
        """Keep nothing."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""

    def picture(self, step: int, name: str, pixels: Pixels) -> None:
        """See `Tracker`."""

    def flush(self) -> None:
        """See `Tracker`."""

    def close(self) -> None:
        """See `Tracker`."""


class TensorBoard:
    """Event files in the run's folder, by tensorboardX.

    Events for an object store are written to the local disk and copied now and then. Records
    are written at once, not by tensorboardX's own thread, whose `flush` leaves its queue out.
    """

    def __init__(self, run: TrackedRun) -> None:
        """Begin a file; a session's start hides what earlier files say of later steps."""
        self._records = _imported("tensorboard", "tensorboardX.record_writer", "tensorboardX")
        self._proto = importlib.import_module("tensorboardX.proto.event_pb2")
        self._summary = importlib.import_module("tensorboardX.proto.summary_pb2").Summary
        self._target = storage.join(run.root, EVENTS)
        self._far = not storage.is_local(run.root)
        self._beside = tempfile.TemporaryDirectory() if self._far else None
        self._folder = Path(self._beside.name if self._beside else storage.absolute(self._target))
        self._begin()
        log = self._proto.SessionLog(status=self._proto.SessionLog.START)
        self._write(run.step + 1 if run.step else 0, session_log=log)
        self.flush()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        told = [self._summary.Value(tag=name, simple_value=v) for name, v in values.items()]
        self._tell(step, told)

    def picture(self, step: int, name: str, pixels: Pixels) -> None:
        """See `Tracker`."""
        rows, columns = pixels.shape[:2]
        image = self._summary.Image(height=rows, width=columns, colorspace=3)
        image.encoded_image_string = images.png_bytes(pixels)
        self._tell(step, [self._summary.Value(tag=name, image=image)])

    def flush(self) -> None:
        """See `Tracker`."""
        self._writer.flush()
        self._copied = time.monotonic()
        if self._far:
            content = self._path.read_bytes()
            storage.write_bytes(storage.join(self._target, self._path.name), content)
            if len(content) > LARGE_BYTES:
                self._writer.close()
                self._path.unlink()
                self._begin()

    def close(self) -> None:
        """See `Tracker`."""
        self.flush()
        self._writer.close()
        if self._beside is not None:
            self._beside.cleanup()

    def _begin(self) -> None:
        """A file whose name sorts after those of earlier ones: that is their order."""
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._path = self._folder / name
        self._writer = self._records.RecordWriter(str(self._path))
        self._write(0, file_version="brain.Event:2")

    def _tell(self, step: int, values: list[Any]) -> None:
        self._write(step, summary=self._summary(value=values))
        if not self._far or time.monotonic() - self._copied >= COPY_SECONDS:
            self.flush()

    def _write(self, step: int, **what: Any) -> None:
        event = self._proto.Event(step=step, wall_time=time.time(), **what)
        self._writer.write(event.SerializeToString())


class Wandb:
    """Weights & Biases: WANDB_API_KEY, WANDB_PROJECT, WANDB_MODE in the workers' environment.

    In offline mode nobody knows what an interrupted run had told: its parts stay apart.
    """

    def __init__(self, run: TrackedRun) -> None:
        """Begin a run, or go on with the one that the run's folder names."""
        wandb = _imported("wandb", "wandb", "wandb")
        name = _remembered(run, "wandb") or uuid.uuid4().hex[:8]
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "raylarge"),
                id=name,
                name=run.name,
                config=dict(run.config),
                dir=storage.absolute(run.root) if storage.is_local(run.root) else None,
                resume="allow",
                settings=wandb.Settings(console="off"),
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"wandb does not begin: {error} Set WANDB_API_KEY or WANDB_MODE=offline where the "
                f"workers run, or choose another track=."
            ) from error
        _remember(run, "wandb", name)
        self._image, self._first = wandb.Image, self._run.starting_step

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        if step >= self._first:
            self._run.log(dict(values), step=step)

    def picture(self, step: int, name: str, pixels: Pixels) -> None:
        """See `Tracker`."""
        if step >= self._first:
            self._run.log({name: self._image(pixels)}, step=step)

    def flush(self) -> None:
        """It sends by itself."""

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()


class Mlflow:
    """MLflow: the server in MLFLOW_TRACKING_URI, or a database in the run's folder.

    A server that is lost meanwhile costs points of the curve, which stand in loss.csv, and not
    the run.
    """

    def __init__(self, run: TrackedRun) -> None:
        """Begin a run, or go on with the one that the run's folder names."""
        mlflow = _imported("mlflow", "mlflow", "mlflow")
        self._entities = importlib.import_module("mlflow.entities")
        self._error = mlflow.exceptions.MlflowException
        uri, artifacts = _database(run)
        try:
            self._client = mlflow.MlflowClient(tracking_uri=uri)
            self._id = _remembered(run, "mlflow") or self._new(run, artifacts)
            self._client.update_run(self._id, "RUNNING")
            told = self._client.get_run(self._id).data.metrics
        except self._error as error:
            raise UserError(
                f"mlflow at {uri} does not begin: {error} Check MLFLOW_TRACKING_URI where the "
                f"workers run, or choose another track=."
            ) from error
        _remember(run, "mlflow", self._id)
        self._last = int(told.get("step", -1))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`; the step is a figure too, to know the last one by."""
        now = int(time.time() * 1000)
        told = {**values, "step": step}
        found = [self._entities.Metric(name, float(v), now, step) for name, v in told.items()]
        self._try(step, self._client.log_batch, self._id, found)

    def picture(self, step: int, name: str, pixels: Pixels) -> None:
        """See `Tracker`."""
        self._try(step, self._client.log_image, self._id, pixels, None, name, step)

    def flush(self) -> None:
        """It sends at once."""

    def close(self) -> None:
        """See `Tracker`."""
        self._try(self._last + 1, self._client.set_terminated, self._id)

    def _new(self, run: TrackedRun, artifacts: str | None) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "raylarge")
        known = self._client.get_experiment_by_name(name)
        within = known.experiment_id if known else self._client.create_experiment(name, artifacts)
        made = self._client.create_run(within, run_name=run.name)
        told = [self._entities.Param(key, value) for key, value in _flat(run.config).items()]
        for start in range(0, len(told), 100):  # MLflow takes no more at once
            self._client.log_batch(made.info.run_id, params=told[start : start + 100])
        return str(made.info.run_id)

    def _try(self, step: int, send: Callable[..., Any], *what: Any) -> None:
        if step <= self._last:
            return
        try:
            send(*what)
        except self._error as error:
            report.say(f"mlflow did not take step {step}: {error}")


TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": Mlflow,
    "none": Silent,
}


def _imported(kind: str, module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"track={kind} needs the package {package}, which is not installed; run pip install "
            f"{package} (on all nodes), or give another track=."
        ) from error


def _remembered(run: TrackedRun, kind: str) -> str | None:
    """The service's name of a run that is gone on with."""
    path = storage.join(run.root, f"{kind}.json")
    return storage.read_json(path)["run"] if run.step and storage.exists(path) else None


def _remember(run: TrackedRun, kind: str, name: str) -> None:
    storage.write_json(storage.join(run.root, f"{kind}.json"), {"run": name})


def _database(run: TrackedRun) -> tuple[str, str | None]:
    """MLflow's tracking URI, and where pictures go if it is ours."""
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri, None
    if not storage.is_local(run.root):
        raise UserError(
            f"track=mlflow needs a server for a run in {run.root}; set MLFLOW_TRACKING_URI where "
            f"the workers run."
        )
    folder = Path(storage.absolute(run.root))
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder}/mlflow.db", (folder / "mlflow").as_uri()


def _flat(config: Mapping[str, Any], under: str = "") -> dict[str, str]:
    """A nested config as `ldm.unet.layers` -> value, as MLflow has it."""
    found: dict[str, str] = {}
    for key, value in config.items():
        inside = isinstance(value, Mapping)
        found |= _flat(value, f"{under}{key}.") if inside else {f"{under}{key}": json.dumps(value)}
    return found
