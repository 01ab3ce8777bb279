"""What happened so far in a training: it travels in every checkpoint, so a curve has no seam.

loss.csv     step, loss (mean since the row before), lr, samples_per_s, seconds, skipped, val
skipped.csv  step, why, loss, the samples of the step, the worst of them
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from raylarge.errors import UserError
from raylarge.train.task import Recipe

HISTORY, SKIPPED = "loss.csv", "skipped.csv"
COLUMNS = ("step", "loss", "lr", "samples_per_s", "seconds", "skipped", "val")
SKIPPED_COLUMNS = ("step", "why", "loss", "first_sample", "last_sample", "worst")
SETTLED = 50  # steps before a loss may count as a spike

Row = tuple[Any, ...]


@dataclass
class TrainingHistory:
    """Steps, losses and time, all sessions together."""

    recipe: Recipe
    step: int = 0
    seconds: float = 0.0
    skipped: int = 0
    running: int = 0  # skipped steps since the last good one
    loss: float = math.nan  # running mean, decay 0.98
    first: float = math.nan
    best: float = math.nan  # of held-out losses
    best_step: int | None = None
    rows: list[Row] = field(default_factory=list)
    skips: list[Row] = field(default_factory=list)
    since: list[float] = field(default_factory=list)  # losses since the last row
    began: tuple[int, float] = (0, 0.0)  # step and seconds when it was started

    def resume(self, facts: dict[str, Any], history: str, skips: str) -> None:
        """Resume from a checkpoint's facts and its tables.

        A fact that an older version did not write is that of a training that begins.
        """
        facts = TrainingHistory(self.recipe).state() | facts
        self.step, self.seconds = facts["step"], facts["seconds"]
        self.skipped, self.running = facts["skipped"], facts["running"]
        self.loss, self.first = (_value(facts[name]) for name in ("loss", "first_loss"))
        self.best, self.best_step = _value(facts["best_loss"]), facts["best_step"]
        self.since = facts["since"]
        self.rows, self.skips = _rows(history), _rows(skips)
        self.began = (self.step, self.seconds)

    def most(self) -> float:
        """The largest loss that is no spike: what the training began with never is."""
        settled = self.recipe.spike > 0 and self.step - self.skipped >= SETTLED
        return max(self.recipe.spike * self.loss, self.first) if settled else math.inf

    def note(self, loss: float, applied: bool, lr: float, seconds: float) -> None:
        """Enter one step.

        Raises:
            UserError: `patience` steps running were skipped.
        """
        self.step += 1
        self.seconds = seconds
        if applied:
            self.running = 0
            self.loss = loss if math.isnan(self.loss) else 0.98 * self.loss + 0.02 * loss
            self.first = loss if math.isnan(self.first) else self.first
            self.since.append(loss)
        else:
            self.skipped += 1
            self.running += 1
            self._check_patience()
        if self.step % self.recipe.log_every == 0:
            self._row(lr)

    def skip(self, loss: float, most: float, worst: Sequence[str]) -> None:
        """Say of the step to come that it was skipped: why, and which samples were the worst."""
        first = self.step * self.recipe.batch
        why = "spike" if math.isfinite(loss) and loss > most else "not finite"
        samples = (first, first + self.recipe.batch - 1, " ".join(worst))
        self.skips.append((self.step + 1, why, f"{loss:.6g}", *samples))

    def validated(self, loss: float, lr: float) -> None:
        """Enter the loss of held-out samples."""
        if math.isnan(self.best) or loss < self.best:
            self.best, self.best_step = loss, self.step
        if not self.rows or int(self.rows[-1][0]) != self.step:
            self._row(lr)
        self.rows[-1] = (*self.rows[-1][:-1], repr(loss))

    def refuse_nothing(self) -> None:
        """Refuse to end with a network that no step has changed.

        Raises:
            UserError: there was none, or none had a finite loss.
        """
        if self.step == 0:
            given = self.recipe.minutes or 0
            raise UserError(f"minutes={given:g} were over before the first step; give more.")
        if math.isnan(self.loss):
            raise UserError(
                f"none of {self.step} steps had a finite loss, so nothing is put into the bundle; "
                f"look at {SKIPPED} beside the checkpoints, then remove their folder, and begin "
                f"anew with a lower lr={self.recipe.lr:g}."
            )

    def speed(self) -> float:
        """Samples per second since it was started."""
        steps, seconds = self.step - self.began[0], self.seconds - self.began[1]
        return steps * self.recipe.batch / seconds if seconds > 0 else 0.0

    def facts(self) -> dict[str, Any]:
        """What the run says at its end."""
        return {
            "step": self.step,
            "samples": self.step * self.recipe.batch,
            "seconds": round(self.seconds, 3),
            "loss": number(self.loss),
            "first_loss": number(self.first),
            "best_loss": number(self.best),
            "best_step": self.best_step,
            "samples_per_s": round(self.speed(), 2),
            "skipped": self.skipped,
        }

    def state(self) -> dict[str, Any]:
        """What a checkpoint must know to go on, beside the tables."""
        return self.facts() | {"since": self.since, "running": self.running}

    def tables(self) -> dict[str, str]:
        """The content of loss.csv, and of skipped.csv."""
        return {HISTORY: _text(COLUMNS, self.rows), SKIPPED: _text(SKIPPED_COLUMNS, self.skips)}

    def _row(self, lr: float) -> None:
        mean = sum(self.since) / len(self.since) if self.since else math.nan
        speed, now = round(self.speed(), 2), round(self.seconds, 2)
        self.rows.append((self.step, repr(mean), f"{lr:.6g}", speed, now, self.skipped, ""))
        self.since = []

    def _check_patience(self) -> None:
        if self.running >= self.recipe.patience:
            batch = self.recipe.batch
            first, last = (self.step - self.running) * batch, self.step * batch - 1
            raise UserError(
                f"{self.running} steps running had no finite loss or gradient, or a spike of it "
                f"(samples {first} to {last}); raise patience={self.recipe.patience}, or "
                f"begin anew with a lower lr={self.recipe.lr:g}. The last good checkpoint is kept."
            )


def number(value: float) -> float | None:
    """A value as JSON can hold it: NaN becomes null."""
    return value if math.isfinite(value) else None


def _value(found: float | None) -> float:
    return math.nan if found is None else found


def _rows(text: str) -> list[Row]:
    return [tuple(row) for row in list(csv.reader(io.StringIO(text)))[1:]]


def _text(header: Sequence[str], rows: Sequence[Row]) -> str:
    sink = io.StringIO()
    csv.writer(sink, lineterminator="\n").writerows([header, *rows])
    return sink.getvalue()
