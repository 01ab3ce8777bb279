"""Peak memory of one large order, above that after the imports.

    parent -> python -m benchmarks.memory SIZE STEPS BATCH -> one line of JSON: MiB by phase

Replies are stored on disk and the pyramid is written band by band. The peak of a phase (planning, a
kind of request, the store, writing) is `VmHWM`, reset before it.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.bundles import oracle
from benchmarks.page import Section
from raylarge import order as orders
from raylarge.execution import result
from raylarge.execution.reply_store import ReplyStore
from raylarge.models.denoiser import GaussianDenoiser
from raylarge.sampling import joint
from raylarge.sampling.bundle_facts import BundleFacts
from raylarge.sampling.plan import run
from raylarge.workers.worker import Worker

GOAL = 1.3
"""Times the memory of the first size that the last may take."""


def section(sizes: Sequence[str]) -> Section:
    """Compare the peak memory of orders by phase."""
    orders = [measured(size, 4, 16) for size in sizes]
    peaks = [each["mib"] for each in orders]
    rows = [[phase, *(f"{each[phase]:.0f}" for each in peaks)] for phase in peaks[0]]
    totals = [max(each.values()) for each in peaks]
    rows.append(["whole order", *(f"{total:.0f}" for total in totals)])
    rows.append(["times the first", *(f"{total / totals[0]:.2f}" for total in totals)])
    rows.append(["requests", *(str(each["requests"]) for each in orders)])
    rows.append(["seconds", *(f"{each['seconds']:.0f}" for each in orders)])
    ratio = totals[-1] / totals[0]
    return Section(
        "Peak memory above an idle process, MiB",
        ["while", *sizes],
        rows,
        [
            f"VmHWM of a process less its memory after the imports, {orders[-1]['start']:.0f} MiB; "
            f"patches of 256 px, Gaussian denoiser, S = 4, an orthogonal autoencoder without "
            f"weights, the ledger on disk, the pyramid streamed. A phase's figure includes what "
            f"earlier ones left resident. The aim is {GOAL} times."
        ],
        [_growth(sizes[-1], max(peaks[-1], key=peaks[-1].__getitem__), ratio)]
        if ratio > GOAL
        else [],
    )


def _growth(size: str, phase: str, ratio: float) -> str:
    """Return a sentence on what grows."""
    return (
        f"Memory: {size} takes {ratio:.2f} times what the first size takes; the aim is "
        f"{GOAL}. The peak is in `{phase}`. It follows the width of the canvas and not the "
        "number of windows or requests: a band of decoded rows is as wide as the image, and the "
        "ledger keeps its last two replies open, bands among them. The plan is small."
    )


def measured(size: str, steps: int, batch: int) -> dict[str, Any]:
    """Measure one order in a new process."""
    words = [sys.executable, "-m", "benchmarks.memory", size, str(steps), str(batch)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    peaks: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return peaks


class Peaks:
    """Largest resident memory during each phase, above that at the start."""

    def __init__(self) -> None:
        self.start = _mib("VmRSS")
        self.mib: dict[str, float] = {}

    def during(self, phase: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """Call something and note how much memory there was at most meanwhile."""
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as stream:
            stream.write("5")  # the peak begins anew at what is resident now
        reply = call(*arguments)
        peak = _mib("VmHWM") - self.start
        self.mib[phase] = max(self.mib.get(phase, 0.0), peak)
        return reply


class MeasuredStore(ReplyStore):
    """A reply store whose reading and writing are phases."""

    peaks: Peaks

    def keep(self, name: str, reply: Any) -> Any:
        """See `ReplyStore`."""
        return self.peaks.during("ledger", super().keep, name, reply)

    def open(self, kept: Any) -> Any:
        """See `ReplyStore`."""
        return self.peaks.during("ledger", super().open, kept)


def carry_out(size: str, steps: int, batch: int, folder: str) -> dict[str, Any]:
    """Carry out an order: peaks in MiB, seconds, number of requests."""
    bundle = oracle()
    sampler = {"steps": steps, "derivative": "difference"}
    order = orders.parse({"size": size, "batch": batch, "sampler": sampler})
    worker = Worker(bundle, GaussianDenoiser(0.0, 1.0, bundle.schedule))
    began, peaks = time.monotonic(), Peaks()
    plan = peaks.during("plan", joint.plan, order, bundle.patch)
    store = MeasuredStore(folder, order, bundle.digest)
    store.peaks = peaks
    peaks.during("plan", store.resume, plan)

    def answer(task: Any, **inputs: Any) -> Any:
        return peaks.during(type(task).__name__.lower(), worker.answer, task, **inputs)

    image = run(plan, answer)
    facts = BundleFacts.of(bundle)
    peaks.during("write", lambda: result.write(folder, order, facts, image, pyramid=True))
    seconds, count = time.monotonic() - began, len(plan.requests)
    return {"mib": peaks.mib, "start": peaks.start, "seconds": seconds, "requests": count}


def _mib(field: str) -> float:
    with open("/proc/self/status") as stream:
        lines = dict(line.split(":", 1) for line in stream)
    return int(lines[field].split()[0]) / 1024


def main(words: list[str]) -> None:
    """Print the peaks of an order."""
    torch.set_num_threads(1)
    size, steps, batch = words[0], int(words[1]), int(words[2])
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(carry_out(size, steps, batch, folder)))


if __name__ == "__main__":
    main(sys.argv[1:])
