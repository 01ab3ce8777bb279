"""Run units of work here or on Ray, and collect what each one says.

A unit is small JSON; its work reads, computes and writes its own part and answers with facts.
Who runs a unit, in which order and how often changes nothing. `workers=None` is the local twin.

Computing uses one torch thread everywhere, so that one and many workers round alike.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from raylarge import report
from raylarge.errors import UserError

Unit = Mapping[str, Any]
Facts = dict[str, Any]
Work = Callable[[Unit], Facts]


def run(
    units: Sequence[Unit], work: Callable[[], Work], workers: int | None, title: str
) -> list[Facts]:
    """The facts of all units, in the order of the units.

    Args:
        units: what is to be done; JSON.
        work: makes the work once per process; picklable (a class, `functools.partial` of one).
        workers: Ray actors of one CPU each; None: this process.
        title: of the progress bar.

    Raises:
        UserError: what a unit raised, or workers below 1.
        RuntimeError: any other failure of a unit, naming it.
    """
    if workers is not None and workers < 1:
        raise UserError(f"workers={workers}: give 1 or more, or leave it out to run without Ray.")
    if not units:
        return []
    answers = _here(units, work) if workers is None else _on_ray(units, work, workers)
    found: dict[int, Facts] = {}
    with report.progress(None, title, total=len(units), unit="part") as bar:
        for answer in answers:
            if "error" in answer:
                raise UserError(answer["error"])
            found[answer["index"]] = answer["facts"]
            bar.update()
    return [found[index] for index in range(len(units))]


def _here(units: Sequence[Unit], work: Callable[[], Work]) -> Iterator[Facts]:
    with _one_thread():
        run_unit = _Runner(work)
        for index, unit in enumerate(units):
            yield run_unit.answer(index, unit)


def _on_ray(units: Sequence[Unit], work: Callable[[], Work], workers: int) -> Iterator[Facts]:
    _start_ray(workers)
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    size = min(workers, len(units))
    rows = [{"index": i, "unit": json.dumps(unit)} for i, unit in enumerate(units)]
    answers = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _Runner,
        fn_constructor_args=[work],
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(
            min_size=1, max_size=size, initial_size=size, max_tasks_in_flight_per_actor=2
        ),
        num_cpus=1,
    )
    try:
        for row in answers.iter_rows():
            yield json.loads(row["answer"])
    except ray.exceptions.RayError as error:
        raise RuntimeError(f"a worker failed: {_cause(error)}") from error


class _Runner:
    """Holds the work of one process; the shape of a class that `map_batches` takes."""

    def __init__(self, work: Callable[[], Work]) -> None:
        self._make = work
        self._work: Work | None = None

    def answer(self, index: int, unit: Unit) -> Facts:
        """A unit's facts, or the sentence of the `UserError` that it raised."""
        try:
            if self._work is None:
                self._work = self._make()
            return {"index": index, "facts": self._work(unit)}
        except UserError as error:
            return {"index": index, "error": str(error)}

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[str]]:
        """One row of `index` and `unit` (JSON) to one row of `answer` (JSON)."""
        torch.set_num_threads(1)
        unit = json.loads(str(batch["unit"][0]))
        return {"answer": [json.dumps(self.answer(int(batch["index"][0]), unit))]}


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _start_ray(workers: int) -> None:
    """Join the cluster of a submitted job (RAY_ADDRESS), else start a quiet Ray here."""
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    import ray

    if ray.is_initialized():
        return
    if "RAY_ADDRESS" in os.environ:
        ray.init(logging_level="error", log_to_driver=False)
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, workers + 1),
        include_dashboard=False,
        logging_level="error",
        log_to_driver=False,
    )


def _cause(error: BaseException) -> str:
    """The innermost reason of a Ray error, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{type(error).__name__}: {lines[-1]}"
