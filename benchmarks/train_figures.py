"""What turns say: medians of differences within a turn, with intervals, as rows and sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.train_turns import Found

STEP_S = 0.5
"""The step that overheads are a share of."""
RESAMPLES = 4000


class Middle(NamedTuple):
    """A median with its 95 % interval."""

    value: float
    low: float
    high: float

    @staticmethod
    def of(values: np.ndarray) -> Middle:
        """By bootstrap."""
        picks = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
        low, high = np.percentile(np.median(values[picks], axis=1), (2.5, 97.5))
        return Middle(float(np.median(values)), float(low), float(high))

    @property
    def interval(self) -> str:
        """Its ends in words."""
        return f"{self.low:+.2f} to {self.high:+.2f}"

    @property
    def share(self) -> Middle:
        """Of milliseconds, as a share of `STEP_S`."""
        return Middle(*(value / 1000 / STEP_S for value in self))


def of_turns(found: Found, name: str) -> np.ndarray:
    """Milliseconds of a step by turn, [turns, 2]: the median one's wall, the mean one's CPU."""
    seconds = found.seconds[name]
    return 1000 * np.stack([np.median(seconds[..., 0], axis=1), seconds[..., 1].mean(axis=1)], 1)


def over_first(found: Found, name: str) -> tuple[Middle, Middle]:
    """Wall and CPU milliseconds of a step over those of the first way."""
    apart = of_turns(found, name) - of_turns(found, next(iter(found.seconds)))
    return Middle.of(apart[:, 0]), Middle.of(apart[:, 1])


HEADER = ("way", "step, ms", "CPU, ms", "wall over the first, ms", "95 %", "CPU over the first, ms",
          "95 %", f"wall, of a {STEP_S:g} s step", "CPU, of it")  # fmt: skip


def table(found: Sequence[Found]) -> list[list[str]]:
    """A row for each way, held against the first that it took turns with."""
    rows = []
    for one in found:
        for name in one.seconds:
            row = [name, *(f"{value:.1f}" for value in np.median(of_turns(one, name), axis=0))]
            if name != next(iter(one.seconds)):
                both = over_first(one, name)
                row += [text for each in both for text in (f"{each.value:+.2f}", each.interval)]
                row += [f"{each.share.value:+.1%}" for each in both]
            rows.append(row + ["–"] * (len(HEADER) - len(row)))
    return rows


def checkpoint(seconds: np.ndarray) -> tuple[Middle, Middle, Middle]:
    """Milliseconds that the checkpoint in the middle of each turn cost.

    Args:
        seconds: [turns, steps, 2].

    Returns:
        The step that it stops; the steps after it, together, while it is written; CPU of all.
        Each above the turn's median step before the checkpoint.
    """
    at = seconds.shape[1] - seconds.shape[1] // 2 - 1
    excess = 1000 * (seconds - np.median(seconds[:, 1:at], axis=1, keepdims=True))
    after = excess[:, at + 1 :, 0].sum(axis=1)
    return Middle.of(excess[:, at, 0]), Middle.of(after), Middle.of(excess[:, at:, 1].sum(axis=1))
