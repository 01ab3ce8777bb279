"""Statistics of timed runs: medians of differences within a round, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.train_runs import Timings

STEP_S = 0.5
"""Duration of the step of which overheads are a share."""
RESAMPLES = 4000


class Median(NamedTuple):
    """A median with its 95 % interval."""

    value: float
    low: float
    high: float

    @staticmethod
    def of(values: np.ndarray) -> Median:
        """Compute by bootstrap."""
        picks = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
        low, high = np.percentile(np.median(values[picks], axis=1), (2.5, 97.5))
        return Median(float(np.median(values)), float(low), float(high))

    @property
    def interval(self) -> str:
        """The interval as text."""
        return f"{self.low:+.2f} to {self.high:+.2f}"

    @property
    def share(self) -> Median:
        """Milliseconds as a share of `STEP_S`."""
        return Median(*(value / 1000 / STEP_S for value in self))


def by_round(timings: Timings, name: str) -> np.ndarray:
    """Return milliseconds of a step, [rounds, 2]: median of wall, mean of CPU time."""
    seconds = timings.seconds[name]
    return 1000 * np.stack([np.median(seconds[..., 0], axis=1), seconds[..., 1].mean(axis=1)], 1)


def over_first(timings: Timings, name: str) -> tuple[Median, Median]:
    """Return wall and CPU milliseconds of a step above those of the first way."""
    excess = by_round(timings, name) - by_round(timings, next(iter(timings.seconds)))
    return Median.of(excess[:, 0]), Median.of(excess[:, 1])


HEADER = ("way", "step, ms", "CPU, ms", "wall over the first, ms", "95 %", "CPU over the first, ms",
          "95 %", f"wall, of a {STEP_S:g} s step", "CPU, of it")  # fmt: skip


def table(timings: Sequence[Timings]) -> list[list[str]]:
    """Return a row for each way, compared with the first of its `Timings`."""
    rows = []
    for each in timings:
        for name in each.seconds:
            row = [name, *(f"{value:.1f}" for value in np.median(by_round(each, name), axis=0))]
            if name != next(iter(each.seconds)):
                medians = over_first(each, name)
                row += [text for m in medians for text in (f"{m.value:+.2f}", m.interval)]
                row += [f"{m.share.value:+.1%}" for m in medians]
            rows.append(row + ["–"] * (len(HEADER) - len(row)))
    return rows


def checkpoint(seconds: np.ndarray) -> tuple[Median, Median, Median]:
    """Return the milliseconds that a checkpoint halfway through each run costs.

    Args:
        seconds: [rounds, steps, 2].

    Returns:
        Of the step that it interrupts; of all steps after it, while it is written; CPU time of
        both. Each above the run's median step before the checkpoint.
    """
    at = seconds.shape[1] - seconds.shape[1] // 2 - 1
    excess = 1000 * (seconds - np.median(seconds[:, 1:at], axis=1, keepdims=True))
    after = excess[:, at + 1 :, 0].sum(axis=1)
    return Median.of(excess[:, at, 0]), Median.of(after), Median.of(excess[:, at:, 1].sum(axis=1))
