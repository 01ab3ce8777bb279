"""The budget of a training in steps and minutes, over all sessions, and the learning rate."""

from __future__ import annotations

import math
import time

from raylarge.train.task import Recipe


class Budget:
    """Training time over all sessions; all ranks use the time that rank 0 reported last."""

    def __init__(self, recipe: Recipe, before: float) -> None:
        """Take the seconds that earlier sessions took."""
        self.recipe, self.before = recipe, before
        self.start, self.agreed = time.monotonic(), before

    def seconds(self) -> float:
        """Return the seconds of training so far."""
        return self.before + time.monotonic() - self.start

    def fraction(self, step: int) -> float:
        """Return the completed fraction of the training, at the agreed time."""
        return self.fraction_at(step, self.agreed)

    def fraction_at(self, step: int, seconds: float) -> float:
        """Return the completed fraction: by steps, or by time where that ends first."""
        limit = self.recipe.minutes * 60 if self.recipe.minutes is not None else math.inf
        done = seconds >= limit or step >= self.recipe.steps
        return 1.0 if done else max(step / self.recipe.steps, seconds / limit)


def rate(recipe: Recipe, step: int, fraction: float) -> float:
    """Return the learning rate: linear warm-up, then constant or a cosine down to 0.

    Args:
        recipe: gives lr, warmup and schedule.
        step: from 0.
        fraction: completed part of the training, 0 to 1.
    """
    warm = min(1.0, (step + 1) / max(1, recipe.warmup))
    fall = 0.5 * (1 + math.cos(math.pi * min(1.0, fraction))) if recipe.schedule == "cosine" else 1
    return recipe.lr * warm * fall
