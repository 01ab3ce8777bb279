"""Actions that may fail on one rank: all ranks stop together, or training goes on without them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from raylarge import report
from raylarge.errors import UserError
from raylarge.train.context import Context

T = TypeVar("T")


def on_all_ranks(context: Context, action: Callable[[], T]) -> T:
    """Return the result of an action that every rank runs; if it fails on one, all stop.

    Raises:
        UserError: the message of the first rank on which it failed.
    """
    results: list[T] = []
    problem = _message_of(lambda: results.append(action()))
    if context.all_reduce_sum([float(bool(problem))])[0]:
        raise_first(context, problem)
    return results[0]


def raise_first(context: Context, problem: str) -> None:
    """Raise the message of the first rank that has one; every rank calls it.

    Raises:
        UserError: always, unless no rank has a problem.
    """
    for message in filter(None, context.all_gather_str(problem)):
        raise UserError(message)


class BestEffort:
    """Runs what training can do without: each error is reported once, and training continues."""

    def __init__(self) -> None:
        """Start without reported errors."""
        self._reported: set[str] = set()

    def __call__(self, action: Callable[[], None]) -> None:
        """Run an action; report its `UserError`, if that was not reported before."""
        problem = _message_of(action)
        if problem and problem not in self._reported:
            self._reported.add(problem)
            report.say(f"training goes on: {problem}")


def _message_of(action: Callable[[], None]) -> str:
    """Return the message of the `UserError` that an action raises, or an empty string."""
    try:
        action()
    except UserError as error:
        return str(error)
    return ""
