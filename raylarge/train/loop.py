"""The training loop: from the restored step to the last, or until the time is up.

It knows a task only through the engine, workers only through the context and data only
through the ingest. A step is a pure function of the weights and the step's number, so 20
steps are 10 + kill + 10 (law 6); under a time limit, when to stop is rank 0's to say.
"""

from __future__ import annotations

import csv
import io
import math
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from raylarge.errors import UserError
from raylarge.train.checkpoint import HISTORY
from raylarge.train.context import Context
from raylarge.train.engine import Engine
from raylarge.train.ingest import Ingest
from raylarge.train.task import Batch, Recipe

COLUMNS = ("step", "loss", "lr", "samples_per_s", "seconds", "skipped")


def fit(engine: Engine, context: Context, ingest: Ingest, recipe: Recipe) -> dict[str, Any]:
    """Train until the recipe's steps are done or its minutes are over.

    Returns:
        step, samples, seconds, loss (running mean at the end), first_loss, samples_per_s
        (since it was started), skipped (steps), resumed_from (step or None).

    Raises:
        UserError: checkpoints of other data; too many steps without a finite gradient.
    """
    journal = Journal(recipe)
    with context.restore() as found:
        if found is not None:
            folder, facts = found
            _same_data(facts["data"], ingest.digest)
            engine.load(folder)
            journal.resume(facts, (folder / HISTORY).read_text())
    clock = _Clock(recipe, context, journal.seconds)
    saved = resumed_from = journal.step if found is not None else None
    with _Ahead(ingest, context, journal.step) as ahead:
        while not clock.over(journal.step):
            lr = rate(recipe, journal.step, clock.fraction(journal.step))
            loss = engine.step(_split(ahead.take(), recipe.accumulation), lr)
            journal.note(loss, lr, clock.seconds())
            context.tell(journal.status(clock))
            if journal.step % recipe.checkpoint_every == 0:
                saved = _save(engine, context, journal, ingest.digest)
    journal.seconds = max(journal.seconds, clock.agreed)
    if saved != journal.step:
        _save(engine, context, journal, ingest.digest)
    return journal.facts() | {"resumed_from": resumed_from}


def rate(recipe: Recipe, step: int, fraction: float) -> float:
    """Learning rate of a step: linear warm-up, then constant or a cosine down to 0.

    Args:
        recipe: gives lr, warmup and schedule.
        step: from 0.
        fraction: of the training that is over, 0 .. 1.
    """
    warm = min(1.0, (step + 1) / max(1, recipe.warmup))
    fall = 0.5 * (1 + math.cos(math.pi * min(1.0, fraction))) if recipe.schedule == "cosine" else 1
    return recipe.lr * warm * fall


@dataclass
class Journal:
    """What happened so far; it travels in every checkpoint, so a resumed curve has no seam."""

    recipe: Recipe
    step: int = 0
    seconds: float = 0.0
    skipped: int = 0
    running: int = 0  # skipped steps since the last good one
    loss: float = math.nan  # running mean, decay 0.98
    first: float = math.nan
    rows: list[tuple[Any, ...]] = field(default_factory=list)
    since: list[float] = field(default_factory=list)  # losses since the last row
    began: tuple[int, float] = (0, 0.0)  # step and seconds when it was started

    def resume(self, facts: dict[str, Any], history: str) -> None:
        """Go on from a checkpoint's facts and its loss.csv."""
        self.step, self.seconds, self.skipped = facts["step"], facts["seconds"], facts["skipped"]
        self.loss, self.first = (_value(facts[name]) for name in ("loss", "first_loss"))
        self.since = facts["since"]
        self.rows = [tuple(row) for row in list(csv.reader(io.StringIO(history)))[1:]]
        self.began = (self.step, self.seconds)

    def note(self, loss: float, lr: float, seconds: float) -> None:
        """Enter one step.

        Raises:
            UserError: `patience` steps running had no finite gradient.
        """
        self.step += 1
        self.seconds = seconds
        if math.isfinite(loss):
            self.running = 0
            self.loss = loss if math.isnan(self.loss) else 0.98 * self.loss + 0.02 * loss
            self.first = loss if math.isnan(self.first) else self.first
            self.since.append(loss)
        else:
            self.skipped += 1
            self.running += 1
            self._check_patience()
        if self.step % self.recipe.log_every == 0:
            mean = sum(self.since) / len(self.since) if self.since else math.nan
            speed, now = round(self.speed(), 2), round(seconds, 2)
            self.rows.append((self.step, repr(mean), f"{lr:.6g}", speed, now, self.skipped))
            self.since = []

    def speed(self) -> float:
        """Samples per second since it was started."""
        steps, seconds = self.step - self.began[0], self.seconds - self.began[1]
        return steps * self.recipe.batch / seconds if seconds > 0 else 0.0

    def status(self, clock: _Clock) -> dict[str, Any]:
        """What the progress line shows."""
        fraction = clock.fraction(self.step)
        before = clock.fraction_at(*self.began)
        spent = self.seconds - self.began[1]
        ahead = spent * (1 - fraction) / (fraction - before) if fraction > before else None
        shown = {"step": self.step, "loss": _number(self.loss), "fraction": fraction}
        return shown | {"rate": self.speed(), "eta_s": ahead}

    def facts(self) -> dict[str, Any]:
        """What the run says at its end."""
        return {
            "step": self.step,
            "samples": self.step * self.recipe.batch,
            "seconds": round(self.seconds, 3),
            "loss": _number(self.loss),
            "first_loss": _number(self.first),
            "samples_per_s": round(self.speed(), 2),
            "skipped": self.skipped,
        }

    def history(self) -> str:
        """The content of loss.csv."""
        sink = io.StringIO()
        csv.writer(sink, lineterminator="\n").writerows([COLUMNS, *self.rows])
        return sink.getvalue()

    def _check_patience(self) -> None:
        if self.running >= self.recipe.patience:
            batch = self.recipe.batch
            first, last = (self.step - self.running) * batch, self.step * batch - 1
            raise UserError(
                f"{self.running} steps running had no finite loss or gradient (samples {first} to "
                f"{last}); lower lr={self.recipe.lr:g}, or raise patience={self.recipe.patience}. "
                f"The last good checkpoint is kept."
            )


class _Clock:
    """Training time, all sessions together; under a time limit all ranks go by rank 0's."""

    def __init__(self, recipe: Recipe, context: Context, before: float) -> None:
        self.recipe, self.context, self.before = recipe, context, before
        self.start, self.agreed = time.monotonic(), before

    def seconds(self) -> float:
        return self.before + time.monotonic() - self.start

    def over(self, step: int) -> bool:
        """Whether to stop before this step; every rank gets the same answer."""
        if self.recipe.minutes is not None:
            self.agreed = self.context.agree(self.seconds())
        return self.fraction(step) >= 1.0

    def fraction(self, step: int) -> float:
        return self.fraction_at(step, self.agreed)

    def fraction_at(self, step: int, seconds: float) -> float:
        """How much of the training is over: by steps, or by time where that ends first."""
        limit = self.recipe.minutes * 60 if self.recipe.minutes is not None else math.inf
        done = seconds >= limit or step >= self.recipe.steps
        return 1.0 if done else max(step / self.recipe.steps, seconds / limit)


class _Ahead:
    """This rank's batches in order, the next one made while the present one is used."""

    def __init__(self, ingest: Ingest, context: Context, step: int) -> None:
        self.ingest, self.context, self.step = ingest, context, step
        self.pool = ThreadPoolExecutor(1)
        self.next: Future[Batch] = self._ask()

    def __enter__(self) -> _Ahead:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.pool.shutdown(cancel_futures=True)

    def take(self) -> Batch:
        batch = self.next.result()
        self.step += 1
        self.next = self._ask()
        return batch

    def _ask(self) -> Future[Batch]:
        return self.pool.submit(
            self.ingest.batch, self.step, self.context.rank, self.context.world_size
        )


def _split(batch: Batch, pieces: int) -> list[Batch]:
    size = len(batch["sample"]) // pieces
    return [
        {name: value[i * size : (i + 1) * size] for name, value in batch.items()}
        for i in range(pieces)
    ]


def _save(engine: Engine, context: Context, journal: Journal, data: str) -> int:
    with context.scratch() as folder:
        engine.save(folder)
        if context.rank == 0:
            Path(folder, HISTORY).write_text(journal.history())
        context.report(
            journal.step, journal.facts() | {"data": data, "since": journal.since}, folder
        )
    return journal.step


def _same_data(before: str, now: str) -> None:
    if before != now:
        raise UserError(
            f"the checkpoint was trained on other data (rows {before}, now {now}); give the data "
            f"it was trained on, or another out=, or remove its folder below .train to begin anew."
        )


def _number(value: float) -> float | None:
    """A value as JSON can hold it: NaN becomes null."""
    return value if math.isfinite(value) else None


def _value(number: float | None) -> float:
    return math.nan if number is None else number
