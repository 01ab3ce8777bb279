"""Handle SIGTERM and SIGHUP like Ctrl-C, so that a job ends in order.

    with handled() as received:     # around a job; `report.entry` does it
        with postponed():           # around what must not be cut in two: Ray's start and end
            ...

A signal raises `Interrupted` in the main thread, so that blocks are left in their order. Later
SIGTERMs and SIGHUPs change nothing: process groups often get several. SIGKILL ends at once.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

ENDING = (signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """SIGTERM or SIGHUP was received; code that handles Ctrl-C handles it, too."""


@contextmanager
def handled() -> Iterator[list[signal.Signals]]:
    """Raise `Interrupted` in the block on the first SIGTERM or SIGHUP.

    What is ignored stays so (SIGHUP under nohup). Only the main thread may handle signals:
    elsewhere nothing changes.

    Yields:
        The signals that came.
    """
    received: list[signal.Signals] = []

    def interrupt(number: int, _: Any) -> None:
        received.append(signal.Signals(number))
        if len(received) == 1:
            raise Interrupted(received[0].name)

    before = {} if _in_other_thread() else {number: signal.getsignal(number) for number in ENDING}
    before = {
        number: handler for number, handler in before.items() if handler is not signal.SIG_IGN
    }
    for number in before:
        signal.signal(number, interrupt)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def postponed() -> Iterator[None]:
    """Delay signals until the end of the block, except a second Ctrl-C.

    Handlers that the block installs (Ray's, which kills its processes under the program that
    still uses them) are dropped where the program has handlers of its own. Processes that the
    block starts do not get SIGHUP: the job ends them itself.
    """
    ending = () if _in_other_thread() else (signal.SIGINT, *ENDING)
    before = {n: h for n in ending if callable(h := signal.getsignal(n))}
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        received.append(number)
        if received.count(signal.SIGINT) > 1:
            raise KeyboardInterrupt

    try:
        with _installed(before, note):
            yield
    finally:
        for number in received[:1]:
            signal.raise_signal(number)


@contextmanager
def _installed(before: dict[Any, Any], note: Callable[[int, Any], None]) -> Iterator[None]:
    """Handle some signals by `note`; ignore handlers that the block installs for them."""
    install = signal.signal

    def keep(number: Any, handler: Any) -> Any:
        return before[number] if number in before else install(number, handler)

    for number in before:
        install(number, note)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP} & before.keys())
    signal.signal = keep  # type: ignore[assignment]
    try:
        yield
    finally:
        signal.signal = install
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            install(number, handler)


def _in_other_thread() -> bool:
    return threading.current_thread() is not threading.main_thread()
