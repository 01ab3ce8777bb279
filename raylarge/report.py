"""How long work speaks: lines, progress bars, a closing table and `report.json`.

A `Report` holds the stages of one run (seconds, counts, files); writing it is atomic, and a
later run of the same command adds to it.
"""

from __future__ import annotations

import io
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from tqdm import tqdm

from raylarge import interrupts, storage
from raylarge.errors import UserError, printable
from raylarge.storage.web import redact_urls


def say(line: str) -> None:
    """Print one line (or a table) for the user, above any progress bar."""
    tqdm.write("\n".join(printable(one, "\t") for one in line.split("\n")), file=sys.stdout)
    sys.stdout.flush()


def progress(items: Iterable[Any] | None, title: str, **options: Any) -> tqdm[Any]:
    """A progress bar on a terminal; a line now and then where the output goes to a file."""
    calm = {} if sys.stderr.isatty() else {"mininterval": 10.0, "ascii": True}
    return tqdm(items, desc=f"{title:<10}", dynamic_ncols=True, leave=False, **calm, **options)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Rows under a header as aligned text."""
    cells = [[printable(str(cell)) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def entry(job: Callable[[list[str]], None]) -> NoReturn:
    """Run a job's main function on the command line's words; end with its exit status.

    A `UserError` becomes one sentence on stderr and status 2. Ctrl-C, SIGTERM and SIGHUP become a
    sentence and 128 + the signal's number (130, 143, 129).
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what its encoding lacks is escaped, no error
            stream.reconfigure(errors="backslashreplace")
    with interrupts.handled() as received:
        try:
            status = _status_of(job)
        except BaseException:
            if not received:
                raise
            status = 0  # whatever failed on the way out, the signal was the cause
        if received:
            status = 128 + received[0]
            _tell(f"stopped by {received[0].name}; run the same command again to go on")
    sys.exit(status)


def _status_of(job: Callable[[list[str]], None]) -> int:
    try:
        job(sys.argv[1:])
    except UserError as error:
        _tell(redact_urls(f"{printable(sys.argv[0])}: {error}"))
        return 2
    except interrupts.Interrupted:
        return 0
    except KeyboardInterrupt:
        _tell("interrupted; run the same command again to go on")
        return 130
    return 0


def _tell(line: str) -> None:
    """Print a line on stderr, which is gone when a terminal was closed."""
    try:
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):  # ValueError: the stream was closed
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - flushed at exit


class Report:
    """The stages of a run, kept in one JSON file."""

    def __init__(self, path: str) -> None:
        """Open the report at a path, with what an earlier run left there."""
        self.path = path
        self.facts: dict[str, Any] = {}
        self.read()

    def read(self) -> None:
        """Read the file again, which another command may have written meanwhile."""
        self.facts = storage.read_json(self.path) if storage.exists(self.path) else {}
        self.facts.setdefault("stages", {})

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Time a stage; what its body puts into the yielded dict is kept beside the seconds."""
        facts: dict[str, Any] = {}
        start = time.monotonic()
        yield facts
        self.facts["stages"][name] = {"seconds": round(time.monotonic() - start, 2), **facts}
        self.write()

    def add(self, **facts: Any) -> None:
        """Keep facts that belong to no stage, and write the file."""
        self.facts.update(facts)
        self.write()

    def write(self) -> None:
        """Write `report.json` atomically."""
        storage.write_json(self.path, self.facts)
