"""How much of a training is over, all sessions together, and the learning rate by it."""

from __future__ import annotations

import math
import time

from raylarge.train.task import Recipe


class Budget:
    """Training time, all sessions together; all ranks go by what rank 0's showed last."""

    def __init__(self, recipe: Recipe, before: float) -> None:
        """Take the seconds that sessions before took."""
        self.recipe, self.before = recipe, before
        self.start, self.agreed = time.monotonic(), before

    def seconds(self) -> float:
        """Of training so far."""
        return self.before + time.monotonic() - self.start

    def fraction(self, step: int) -> float:
        """How much of the training is over, at the agreed time."""
        return self.fraction_at(step, self.agreed)

    def fraction_at(self, step: int, seconds: float) -> float:
        """How much of the training is over: by steps, or by time where that ends first."""
        limit = self.recipe.minutes * 60 if self.recipe.minutes is not None else math.inf
        done = seconds >= limit or step >= self.recipe.steps
        return 1.0 if done else max(step / self.recipe.steps, seconds / limit)


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
