"""Run units of work here or on Ray, and collect what each one says.

The work of a unit (`units.py`) reads, computes and writes its own part, and answers with facts.
Who runs a unit, in which order and how often changes nothing. `workers=None` is the local twin.

Computing uses one torch thread everywhere, so that one and many workers round alike.
"""

from __future__ import annotations

import json
import logging
import math
import os
import pickle
import traceback
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from raylarge import report
from raylarge.compute.resources import WorkerResources, require_resources
from raylarge.compute.session import session
from raylarge.config import plain
from raylarge.data.units import Unit
from raylarge.errors import SlideError, UserError

Facts = dict[str, Any]
Work = Callable[[Any], Facts]
_RUN = 8
"""Blocks of one slide that go to a worker together, at most."""
_ATTEMPTS = 5
"""Workers may die and are replaced; a unit that killed so many must not kill for ever."""


@dataclass(frozen=True)
class ExecutorConfig:
    """Who does the work of a verb.

    Attributes:
        workers: Ray actors; None: this process.
        gpus: of each actor; a part of one lets several share it.
        skip: go on without a slide that cannot be read.
    """

    workers: int | None = None
    gpus: float = 0.0
    skip: bool = False

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise UserError(
                f"workers={self.workers}: give 1 or more, or leave it out to run without Ray."
            )


@dataclass(frozen=True)
class ActorConfig:
    """What a verb with a network adds to its executor; the bytes do not depend on it."""

    actors: int | None = None
    """Ray actors; absent: `workers`."""
    gpus: float = 0.0
    """Of each actor; a part of one lets several share it."""

    def __post_init__(self) -> None:
        """Refuse values that make no sense.

        Raises:
            UserError: naming the key and its value.
        """
        if self.actors is not None and self.actors < 1:
            raise UserError(f"actors={self.actors}: give 1 or more, or leave it out.")
        if not 0 <= self.gpus < math.inf:
            raise UserError(f"gpus={self.gpus}: it must be 0 or more.")
        if getattr(self, "batch", 1) < 1:
            raise UserError(f"batch={getattr(self, 'batch', 1)}: it must be 1 or more.")

    @property
    def device(self) -> str:
        """Where an actor's network runs."""
        return "cuda" if self.gpus else "cpu"

    def of(self, executor: ExecutorConfig) -> ExecutorConfig:
        """The executor, with these means."""
        workers = executor.workers if self.actors is None else self.actors
        return replace(executor, workers=workers, gpus=self.gpus)


def without_actors(config: ActorConfig) -> dict[str, Any]:
    """A config as plain values, without what the bytes do not depend on."""
    means = {field.name for field in fields(ActorConfig)}
    return {key: value for key, value in plain(config).items() if key not in means}


def run(
    units: Sequence[Unit], work: Callable[[], Work], executor: ExecutorConfig, title: str
) -> list[Facts]:
    """The facts of all units, in the order of the units; of a skipped one `{"failed": why}`.

    `again` among the facts is how often a unit was begun in vain, by workers that died.

    Args:
        units: what is to be done.
        work: makes the work once per process; picklable (a class, `functools.partial` of one).
        executor: who does it.
        title: of the progress bar.

    Raises:
        SlideError: a slide cannot be read, and the executor does not skip it.
        UserError: what else a unit raised.
        RuntimeError: any other failure of a unit, naming it.
    """
    if not units:
        return []
    if executor.workers is None:
        _require_gpu(executor.gpus)
        answers = _here(units, work)
    else:
        answers = _on_ray(units, work, executor, title)
    results: dict[int, Facts] = {}
    with closing(answers), _Progress(units, title) as progress:
        for answer in answers:
            index, again = answer["index"], answer.get("again", 0)
            skipped = executor.skip and units[index].slide_id
            if "error" in answer:
                raise UserError(answer["error"])
            if "failed" in answer and not skipped:
                raise SlideError(answer["failed"])
            if "failure" in answer:
                raise RuntimeError(f"{title} failed at {answer['failure']}")
            facts = {"failed": answer["failed"]} if "failed" in answer else answer["facts"]
            results[index] = {**facts, "again": again} if again else facts
            progress.advance(index)
    return [results[index] for index in range(len(units))]


def _require_gpu(gpus: float) -> None:
    if gpus and not torch.cuda.is_available():
        raise UserError(
            f"gpus={gpus:g}: this machine has no CUDA device; leave gpus= out, or give workers= on "
            "a cluster that has some."
        )


class _Progress:
    """A bar in tiles (or parts) with the slides that are done; a context manager."""

    def __init__(self, units: Sequence[Unit], title: str) -> None:
        counted = all(unit.tiles is not None for unit in units)
        self._tiles = [unit.tiles or 0 if counted else 1 for unit in units]
        self._slides = [unit.slide_id for unit in units]
        self._left = Counter(self._slides)
        self._of = len(self._left)
        name = "tile" if counted else "part"
        self._bar = report.progress(None, title, total=sum(self._tiles), unit=name)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, index: int) -> None:
        """One unit is done."""
        self._left[self._slides[index]] -= 1
        done = sum(not left for left in self._left.values())
        if self._slides[index]:
            self._bar.set_postfix_str(f"slides {done}/{self._of}", refresh=False)
        self._bar.update(self._tiles[index])


def _here(units: Sequence[Unit], work: Callable[[], Work]) -> Generator[Facts, None, None]:
    with _one_thread():
        run_unit = _Runner(work)
        for index, unit in enumerate(units):
            yield run_unit.answer(index, unit)


def _on_ray(
    units: Sequence[Unit], work: Callable[[], Work], executor: ExecutorConfig, title: str
) -> Generator[Facts, None, None]:
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")  # read when it is imported
    workers = min(executor.workers or 1, len(units))
    with session(workers + 1):
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        require_resources(
            WorkerResources(
                f"an actor of {title}", 1.0, float(executor.gpus), keys=f"{title}.gpus="
            )
        )
        rows = [{"runs": ray.cloudpickle.dumps(one)} for one in _runs(units, workers)]
        answers = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Runner,
            fn_constructor_args=[work, _attempts()],
            batch_size=1,
            compute=_pool(workers),
            num_cpus=1,
            num_gpus=executor.gpus or None,
        )
        try:
            for row in answers.iter_rows():
                yield json.loads(row["answer"])
        except ray.exceptions.RayError as error:
            raise RuntimeError(f"a worker of {title} failed: {_cause(error)}") from error


def _runs(units: Sequence[Unit], workers: int) -> list[list[tuple[int, Unit]]]:
    """Units with their numbers, some neighbours of one slide together, and enough runs for all."""
    most = max(1, min(_RUN, len(units) // (8 * workers)))
    groups: list[list[tuple[int, Unit]]] = []
    for index, unit in enumerate(units):
        last = groups[-1] if groups else []
        same = last and unit.slide_id and unit.slide_id == last[-1][1].slide_id
        if same and len(last) < most:
            last.append((index, unit))
        else:
            groups.append([(index, unit)])
    return groups


def _pool(size: int) -> Any:
    """That many actors, or as many as the cluster has room for."""
    from ray.data import ActorPoolStrategy

    return ActorPoolStrategy(
        min_size=1, max_size=size, initial_size=size, max_tasks_in_flight_per_actor=2
    )


def _attempts() -> Any:
    """The counter of attempts, on the driver's own node: it lives as long as the driver."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(_Attempts).options(scheduling_strategy=here).remote()


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
        except SlideError as error:
            return {"index": index, "failed": str(error)}
        except UserError as error:
            return {"index": index, "error": str(error)}
        except Exception as error:
            named = f"{_name(unit)}: {type(error).__name__}: {error}"
            return {"index": index, "failure": f"{named}\n{traceback.format_exc()}"}

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[str]]:
        """Return a row of `answer` (JSON) for each of a run of units (pickled)."""
        torch.set_num_threads(1)
        units = pickle.loads(batch["runs"][0])
        return {"answer": [json.dumps(self._attempted(index, unit)) for index, unit in units]}

    def _attempted(self, index: int, unit: Unit) -> Facts:
        """The answer to a unit, unless it has killed too many workers."""
        import ray

        again = ray.get(self._attempts.begin.remote(index)) - 1
        if again >= _ATTEMPTS:
            why = f"{_name(unit)}: its worker process died {_ATTEMPTS} times (out of memory?)"
            return {"index": index, "failed": why}
        answer = self.answer(index, unit)
        self._attempts.end.remote(index)
        return {**answer, "again": again}


class _Attempts:
    """Counts how often each unit was begun; an actor, so that it outlives the workers."""

    def __init__(self) -> None:
        self._begun: Counter[int] = Counter()

    def begin(self, index: int) -> int:
        """The number of this attempt at a unit, from 1."""
        self._begun[index] += 1
        return self._begun[index]

    def end(self, index: int) -> None:
        """The unit has been answered: if its run is begun again, that is not its fault."""
        self._begun[index] -= 1


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _name(unit: Unit) -> str:
    """A unit by its part, which names no file of the user."""
    return unit.part or str(unit)


def _cause(error: BaseException) -> str:
    """The innermost reason of a Ray error, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{type(error).__name__}: {lines[-1]}"
