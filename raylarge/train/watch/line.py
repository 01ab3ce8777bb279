"""One progress line for a training, drawn anew now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from raylarge import report
from raylarge.train.context import Status


@contextmanager
def progress(model: str) -> Iterator[Callable[[Status], None]]:
    """Within, what is told is shown."""
    style = "{desc}{percentage:3.0f}%|{bar}|{postfix}"
    with report.progress(None, model, total=100, bar_format=style, postfix="starting") as bar:
        drawn = time.monotonic()

        def show(status: Status) -> None:
            """Draw the line anew, unless that was just done."""
            nonlocal drawn
            if time.monotonic() - drawn < bar.mininterval:
                return
            drawn, loss, eta = time.monotonic(), status["loss"], status["eta_s"]
            parts = [f"step {status['step']}", f"{status['rate']:.3g} samples/s"]
            parts += [f"loss {loss:.4g}"] if loss is not None else []
            parts += [f"{tqdm.format_interval(eta)} left"] if eta is not None else []
            bar.n = 100 * status["fraction"]
            bar.set_postfix_str(", ".join(parts))

        yield show
