"""Peak memory of tile, embed and shard; it must not grow with the number of slides.

    parent -> python -m benchmarks.data_memory OUT SLIDES WORKERS -> one line of JSON: MiB by verb

Peaks are Linux's VmHWM: of the driver, reset before each verb, and of all its child processes, read
ten times a second. Every run is a new process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.data_slides import PATCH_PX, Slides
from benchmarks.data_speed import ENCODER, DataMeasure
from benchmarks.memory import Peaks
from benchmarks.page import Section
from raylarge.compute.session import session
from raylarge.config import build
from raylarge.data.prepare import Prepare, prepare
from raylarge.report import Report

GOAL = 1.1
"""Times the memory of one slide that many may take."""
VERBS = ("tile", "embed", "shard")
_EVERY_S = 0.1


def section(measure: DataMeasure, copies: int) -> Section:
    """Measure one slide and many, on Ray and in one process."""
    one = measure.create_slide("memory", (1, 1), 0.5)
    runs: dict[tuple[str, int], dict[str, Any]] = {}
    for workers in (1, 0):
        for slides in (one, one.copies(copies, measure.folder / "memory")):
            count = len(slides.paths)
            runs[_who(workers), count] = measured(
                slides, measure.folder / f"mem-{workers}-{count}", workers
            )
    kept = measure.samples.setdefault("memory", {})
    for (who, count), peak in runs.items():
        kept.setdefault(who, {})[f"{count} slides"] = [peak]
    rows, short = [], []
    for who in (_who(1), _who(0)):
        few, many = runs[who, 1], runs[who, copies]
        for process in few["mib"]:
            a, b = (max(each["mib"][process].values()) for each in (few, many))
            by_verb = [f"{many['mib'][process][verb]:.0f}" for verb in VERBS]
            rows.append([who, process, f"{a:.0f}", f"{b:.0f}", f"{b / a:.2f}", *by_verb])
            if b / a > GOAL:
                short.append(
                    f"Memory: the {process} ({who}) takes {b / a:.2f} times as much for {copies} "
                    f"slides as for one; the aim is {GOAL}."
                )
    many = runs[_who(1), copies]
    return Section(
        "Peak memory, MiB",
        ["run", "process", "1 slide", f"{copies} slides", "times",
         *(f"{verb}, {copies} slides" for verb in VERBS)],
        rows,
        [f"VmHWM, imports and encoder ({ENCODER}) included, in a fresh process each. A slide has "
         f"{one.tiles} base tiles and examples of the scales 0 to 3 as PNG; {copies} slides make "
         f"{many['examples_mb']:.0f} MB of EXAMPLES in 16 buckets, of which a worker of shard "
         f"holds one with its copies while it is mixed: that share grows with the data."],
        short,
    )  # fmt: skip


def _who(workers: int) -> str:
    return "Ray, 1 worker" if workers else "this process alone"


def measured(slides: Slides, out: Path, workers: int) -> dict[str, Any]:
    """Measure one run in a new process."""
    words = [sys.executable, "-m", "benchmarks.data_memory", str(out), ",".join(slides.paths)]
    done = subprocess.run([*words, str(workers)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the run for memory failed:\n{done.stderr[-2000:]}")
    peak: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return peak


class Below:
    """Peaks of the child processes, read by a thread."""

    def __init__(self) -> None:
        self.most = 0.0
        self._ended = threading.Event()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See them inside."""
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(_EVERY_S):
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error, OSError, StopIteration):
                    if process.name().startswith("ray::"):
                        self.most = max(self.most, _peak_mib(process.pid))


def _peak_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def carry_out(out: str, slides: str, workers: int | None) -> dict[str, Any]:
    """Run tile, embed and shard; return MiB by process and verb."""
    tile = {"patch_px": PATCH_PX, "scales": [0, 1, 2, 3], "mask": "all", "split": "band"}
    peaks, below = Peaks(), {}
    with nullcontext() if workers is None else session(workers + 1):
        for verb in VERBS:
            values = {"out": out, "slides": slides, "verbs": verb, "workers": workers}
            config = build(Prepare, {**values, "tile": tile, "embed": {"encoder": ENCODER}})
            watch = Below()
            with watch.watching():
                peaks.during(verb, _quiet, lambda c=config: prepare(c, Report(f"{out}.json")))
            below[verb] = watch.most
    above = {verb: peaks.start + more for verb, more in peaks.mib.items()}
    mib = {"driver": above} if workers is None else {"driver": above, "worker": below}
    sizes = [path.stat().st_size for path in Path(out, "examples").glob("*.parquet")]
    return {"mib": mib, "examples_mb": sum(sizes) / 1e6}


def _quiet(call: Callable[[], Any]) -> None:
    call()


def main(words: list[str]) -> None:
    """Print the peaks of a run."""
    print(json.dumps(carry_out(words[0], words[1], int(words[2]) or None)))


if __name__ == "__main__":
    main(sys.argv[1:])
