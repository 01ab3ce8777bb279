"""Run units of work here or on Ray, and collect what each one says.

A unit is small JSON; its work reads, computes and writes its own part and answers with facts.
Who runs a unit, in which order and how often changes nothing. `workers=None` is the local twin.

Computing uses one torch thread everywhere, so that one and many workers round alike.
"""

from __future__ import annotations

import json
import logging
import os
import traceback
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any

import torch

from raylarge import report
from raylarge.errors import UserError
from raylarge.fleet.session import session

Unit = Mapping[str, Any]
Facts = dict[str, Any]
Work = Callable[[Unit], Facts]
_ATTEMPTS = 3
"""Workers may die and are replaced; a unit that killed so many must not kill for ever."""


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
    answers = _here(units, work) if workers is None else _on_ray(units, work, workers, title)
    found: dict[int, Facts] = {}
    bar = report.progress(None, title, total=len(units), unit="part")
    with closing(answers), bar:
        for answer in answers:
            if "error" in answer:
                raise UserError(answer["error"])
            if "failure" in answer:
                raise RuntimeError(f"{title} failed at {answer['failure']}")
            found[answer["index"]] = answer["facts"]
            bar.update()
    return [found[index] for index in range(len(units))]


def _here(units: Sequence[Unit], work: Callable[[], Work]) -> Generator[Facts, None, None]:
    with _one_thread():
        run_unit = _Runner(work)
        for index, unit in enumerate(units):
            yield run_unit.answer(index, unit)


def _on_ray(
    units: Sequence[Unit], work: Callable[[], Work], workers: int, title: str
) -> Generator[Facts, None, None]:
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")  # read when it is imported
    with session(workers + 1):
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        rows = [{"index": i, "unit": json.dumps(unit)} for i, unit in enumerate(units)]
        answers = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Runner,
            fn_constructor_args=[work, ray.remote(num_cpus=0)(_Attempts).remote()],
            batch_size=1,
            compute=_pool(min(workers, len(units))),
            num_cpus=1,
        )
        try:
            for row in answers.iter_rows():
                yield json.loads(row["answer"])
        except ray.exceptions.RayError as error:
            raise RuntimeError(f"a worker of {title} failed: {_cause(error)}") from error


def _pool(size: int) -> Any:
    """That many actors, or as many as the cluster has room for."""
    from ray.data import ActorPoolStrategy

    return ActorPoolStrategy(
        min_size=1, max_size=size, initial_size=size, max_tasks_in_flight_per_actor=2
    )


class _Runner:
    """Holds the work of one process; the shape of a class that `map_batches` takes."""

    def __init__(self, work: Callable[[], Work], attempts: Any = None) -> None:
        self._make = work
        self._work: Work | None = None
        self._attempts = attempts

    def answer(self, index: int, unit: Unit) -> Facts:
        """A unit's facts, or what went wrong as text: Ray wraps exceptions past recognition."""
        try:
            if self._work is None:
                self._work = self._make()
            return {"index": index, "facts": self._work(unit)}
        except UserError as error:
            return {"index": index, "error": str(error)}
        except Exception as error:
            named = f"{json.dumps(unit)}: {type(error).__name__}: {error}"
            return {"index": index, "failure": f"{named}\n{traceback.format_exc()}"}

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[str]]:
        """One row of `index` and `unit` (JSON) to one row of `answer` (JSON)."""
        import ray

        torch.set_num_threads(1)
        index, unit = int(batch["index"][0]), json.loads(str(batch["unit"][0]))
        if ray.get(self._attempts.begin.remote(index)) > _ATTEMPTS:
            why = f"{json.dumps(unit)}: its worker process died {_ATTEMPTS} times (out of memory?)"
            return {"answer": [json.dumps({"index": index, "failure": why})]}
        return {"answer": [json.dumps(self.answer(index, unit))]}


class _Attempts:
    """Counts how often each unit was begun; an actor, so that it outlives the workers."""

    def __init__(self) -> None:
        self._begun: Counter[int] = Counter()

    def begin(self, index: int) -> int:
        """The number of this attempt at a unit, from 1."""
        self._begun[index] += 1
        return self._begun[index]


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cause(error: BaseException) -> str:
    """The innermost reason of a Ray error, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{type(error).__name__}: {lines[-1]}"
