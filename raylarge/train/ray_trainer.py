"""The driver's half of a run under Ray Train: start the workers, watch them, say what failed.

It knows Ray but not what is trained. Workers need no runtime environment of their own, so
Ray hands them processes that have started already; with Ray's waits cut to what one run
needs, starting two workers is the time that their imports take.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from raylarge import storage
from raylarge.compute.resources import WorkerResources, require_resources
from raylarge.compute.session import session
from raylarge.errors import UserError
from raylarge.train.context import Status
from raylarge.train.ray_context import status_path

SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",  # 2 s by default, waited at every end
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean the same everywhere
}


@dataclass(frozen=True)
class Crew:
    """The workers of a run."""

    workers: int
    fewest: int  # with which it goes on while others are missing
    gpu: bool | None  # one per worker; None: where the cluster has enough
    max_failures: int
    resize_s: float  # between two looks for workers that are missing
    root: str  # the run's folder
    logs: str | None


def run(
    worker: Callable[[dict[str, bytes]], dict[str, Any]],
    job: Any,
    crew: Crew,
    show: Callable[[Status], None],
) -> dict[str, Any]:
    """Run a function in all workers; what it returned on rank 0.

    Args:
        worker: importable by the workers; gets {"job": the job, pickled}.
        job: picklable.
        crew: who works, and where.
        show: told how far rank 0 is.

    Raises:
        UserError: the workers failed more often than `max_failures`, or one returned
            {"refused": why}.
    """
    with session(crew.workers, storage.join(crew.logs, "ray") if crew.logs else ""):
        import ray
        from ray.train import TrainingFailedError

        with _environment(_settings(ray)):
            # As bytes: Ray's controller would import all our modules to look inside.
            trainer = _trainer(ray, worker, {"job": ray.cloudpickle.dumps(job)}, crew)
            try:
                answer: dict[str, Any] = _watched(trainer.fit, crew.root, show).return_value
            except TrainingFailedError as error:
                raise _explained(error, crew) from error
    if "refused" in answer:
        raise UserError(answer["refused"])
    return answer


def _trainer(ray: Any, worker: Callable[..., Any], settings: dict[str, bytes], crew: Crew) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    resources = ray.cluster_resources()
    gpus = resources.get("GPU", 0) >= crew.workers if crew.gpu is None else crew.gpu
    elastic = crew.fewest < crew.workers
    cpus = min(1.0, max(0.01, resources.get("CPU", 0) / crew.workers))
    each = {"CPU": 1.0 if elastic else cpus} | ({"GPU": 1.0} if gpus else {})
    fewest = crew.fewest if elastic else crew.workers
    keys = "workers= or set gpu=false" if gpus else "workers="
    require_resources(WorkerResources("training", each["CPU"], each.get("GPU", 0.0), fewest, keys))
    return TorchTrainer(
        worker,
        train_loop_config=settings,
        scaling_config=ScalingConfig(
            num_workers=(crew.fewest, crew.workers) if elastic else crew.workers,
            elastic_resize_monitor_interval_s=crew.resize_s,
            use_gpu=gpus,
            resources_per_worker=each,
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=crew.root,
            failure_config=FailureConfig(max_failures=crew.max_failures),
        ),
    )


def _settings(ray: Any) -> dict[str, str]:
    """On one node nothing is preempted, and the watcher is one more process to start."""
    alone = len(ray.nodes()) == 1
    return SETTINGS | ({"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"} if alone else {})


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

    def run_it() -> None:
        try:
            done.append(work())
        except BaseException as error:
            failed.append(error)

    seen = _status(root)
    thread = threading.Thread(target=run_it, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.5)
        status = _status(root)
        if status is not None and status != seen:
            seen = status
            show(status)
    if failed and isinstance(failed[0], SystemExit):  # Ray's way to say that it is gone
        raise UserError(
            "Ray ended while its workers trained; the last checkpoint is kept, the same command "
            "goes on from it."
        ) from failed[0]
    if failed:
        raise failed[0]
    return done[0]


def _status(root: str) -> Status | None:
    path = status_path(root)
    try:
        return storage.read_json(path) if storage.exists(path) else None
    except UserError:  # a line that is not drawn is no reason to stop
        return None


def _explained(error: Exception, crew: Crew) -> UserError:
    """What stopped the workers in one sentence; the whole of it in a file."""
    failures = getattr(error, "worker_failures", {}) or {0: error}
    cause = str(next(iter(failures.values()))).strip().splitlines() or [repr(error)]
    path = storage.join(crew.root, "error.txt")
    storage.write_bytes(path, str(error).encode())
    return UserError(
        f"the workers failed more than max_failures={crew.max_failures} times: {cause[0]} (the "
        f"whole error is in {path}); the last checkpoint is kept, the same command goes on from it."
    )
