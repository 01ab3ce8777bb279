"""How long work speaks: lines, progress bars, a closing table and `report.json`.

A `Report` holds the stages of one run (seconds, counts, files); writing it is atomic, and a
later run of the same command adds to it.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from tqdm import tqdm

from raylarge import storage
from raylarge.errors import UserError
from raylarge.storage.web import scrubbed


def say(line: str) -> None:
    """Print one line for the user, above any progress bar."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


def progress(items: Iterable[Any] | None, title: str, **options: Any) -> tqdm[Any]:
    """A progress bar on a terminal; a line now and then where the output goes to a file."""
    calm = {} if sys.stderr.isatty() else {"mininterval": 10.0, "ascii": True}
    return tqdm(items, desc=f"{title:<10}", dynamic_ncols=True, leave=False, **calm, **options)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Rows under a header as aligned text."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def entry(job: Callable[[list[str]], None]) -> NoReturn:
    """Run a job's main function on the command line's words; end with its exit status.

    A `UserError` becomes one sentence on stderr and status 2; Ctrl-C becomes status 130.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    try:
        job(sys.argv[1:])
    except UserError as error:
        print(scrubbed(f"{sys.argv[0]}: {error}"), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


class Report:
    """The stages of a run, kept in one JSON file."""

    def __init__(self, path: str) -> None:
        """Open the report at a path, with what an earlier run left there."""
        self.path = path
        self.facts: dict[str, Any] = storage.read_json(path) if storage.exists(path) else {}
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
