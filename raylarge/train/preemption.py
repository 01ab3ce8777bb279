"""Saving before a machine is taken away: at the first notice, and once more just before the end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from raylarge.train.context import Context

NOTICE_S = 5.0  # between two checks for a notice of preemption


class PreemptionWatch:
    """Checks for notices of preemption; every rank makes the same calls."""

    def __init__(self, context: Context, save: Callable[[], None]) -> None:
        """Start with nothing saved.

        Args:
            context: tells after how many seconds the machine is taken.
            save: writes a checkpoint and waits for it.
        """
        self._context, self._save = context, save
        self._checked_s = 0.0  # training time of the last check
        self._saves = 0  # for the present notice
        self._save_s = 0.0  # duration of the last one

    def check(self, seconds: float) -> None:
        """Save if there is a notice, and again at the last check before the machine is taken.

        Args:
            seconds: training time on which all ranks agree.
        """
        if seconds - self._checked_s < NOTICE_S:
            return
        self._checked_s = seconds
        remaining = self._context.preemption_s()
        is_last = remaining <= NOTICE_S + 1 + 2 * self._save_s
        counts = self._context.all_reduce_sum([float(remaining < math.inf), float(is_last)])
        due = sum(bool(count) for count in counts)
        if due > self._saves:
            start = time.monotonic()
            self._save()
            self._save_s = time.monotonic() - start
        self._saves = due
