"""One progress line for a training, drawn anew now and then, and one line of its expected end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from raylarge import report
from raylarge.train.context import Status

FIRST_STEPS = 5
"""Steps of this process after which the end is estimated."""


@contextmanager
def progress(model: str, batch: int) -> Iterator[Callable[[Status], None]]:
    """Show the statuses that the yielded function gets; say the expected end once.

    Args:
        model: which model is trained.
        batch: samples of a step.
    """
    style = "{desc}{percentage:3.0f}%|{bar}|{postfix}"
    with report.progress(None, model, total=100, bar_format=style, postfix="starting") as bar:
        drawn = time.monotonic()
        first: int | None = None  # step; -1 once the end was estimated

        def show(status: Status) -> None:
            """Draw the line anew, unless that was just done."""
            nonlocal drawn, first
            first = status["step"] - 1 if first is None else first
            if first >= 0 and status["step"] - first >= FIRST_STEPS and status["eta_s"]:
                first = -1
                report.say(expected(model, batch, status))
            if time.monotonic() - drawn < bar.mininterval:
                return
            drawn, loss, eta = time.monotonic(), status["loss"], status["eta_s"]
            parts = [f"step {status['step']}", f"{status['rate']:.3g} samples/s"]
            parts += [f"loss {loss:.4g}"] if loss is not None else []
            parts += [f"{tqdm.format_interval(eta)} left"] if eta is not None else []
            bar.n = 100 * status["fraction"]
            bar.set_postfix_str(", ".join(parts))

        yield show


def expected(model: str, batch: int, status: Status) -> str:
    """Return a line with the seconds of a step and the expected end, as measured so far."""
    end = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(time.time() + status["eta_s"]))
    return (
        f"{model}: {batch / status['rate']:.3g} s per step of {batch} samples on this machine; "
        f"expected end in {tqdm.format_interval(status['eta_s'])}, at {end}"
    )
