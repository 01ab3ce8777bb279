"""What is watched of a training, gathered from all ranks and told by rank 0.

steps -> losses by scale and timestep, speed, memory, waiting -> a tracker (`trackers.py`)
averaged networks, held-out samples -> ROOT/sheets/step-00001000.png
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from jaxtyping import UInt8

from raylarge import images, report, storage
from raylarge.train.context import Context
from raylarge.train.micro_batches import StepResult
from raylarge.train.monitor.bins import Bins
from raylarge.train.monitor.meter import Meter
from raylarge.train.monitor.sample_grid import spread
from raylarge.train.monitor.trackers import Tracker
from raylarge.train.task import Batch, SampleSource, TrainTask

Pixels = UInt8[np.ndarray, "H W 3"]
SHOWN = 64  # held-out samples among which those of a sheet are found
PER_SCALE = 4


class Monitor:
    """One rank's part in watching; only rank 0's has a tracker."""

    def __init__(
        self, root: str, bins: Bins, meter: Meter, begin: Callable[[int], Tracker] | None
    ) -> None:
        """Take where sheets go, what is counted, and how a tracker is begun at a step."""
        self._root, self._bins, self._meter, self._begin = root, bins, meter, begin
        self._tracker: Tracker | None = None

    def open(self, step: int) -> None:
        """The run begins, or goes on, after so many steps."""
        if self._begin is not None:
            self._tracker = self._begin(step)

    def step(self, batch: Batch, made: StepResult, size: int, waited: float) -> None:
        """A step was made over `size` samples of all ranks; its batch was waited for so long."""
        self._bins.add(batch, made.losses)
        self._meter.stepped(size)
        self._meter.waited(waited)

    def figures_of(self, context: Context) -> dict[str, float]:
        """Losses over all ranks, and speed, since the last time; every rank calls it."""
        totals = torch.tensor(
            context.all_reduce_sum(self._bins.totals().tolist()), dtype=torch.float64
        )
        speed = {f"speed/{name}": value for name, value in self._meter.read().items()}
        return {**self._bins.take(totals), **speed}

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Figures that rank 0 knows already."""
        if self._tracker is not None:
            self._tracker.scalars(step, values)

    def picture(self, step: int, task: TrainTask, source: SampleSource) -> None:
        """Have a task draw what it makes of some samples; keep it beside the checkpoints."""
        try:
            sheet = draw(self._root, step, task, source.batch(range(SHOWN)))
        except Exception as error:  # of torch, of a card that is full: no reason to stop
            report.say(f"training goes on without a sheet of step {step}: {error!r}")
            return
        if self._tracker is not None and sheet is not None:
            self._tracker.picture(step, "sheet", sheet)

    def figures(self) -> dict[str, float]:
        """Speed and memory of the whole run."""
        return self._meter.whole()

    def flush(self) -> None:
        """With every checkpoint."""
        if self._tracker is not None:
            self._tracker.flush()

    def close(self) -> None:
        """The run ends."""
        if self._tracker is not None:
            self._tracker.close()


def draw(root: str, step: int, task: TrainTask, batch: Batch) -> Pixels | None:
    """A sheet of what a task makes of some samples, kept below the run's folder."""
    task.network.eval()
    with torch.no_grad():
        sheet = task.sheet(spread(task.draw(batch), PER_SCALE))
    task.network.train()
    if sheet is not None:
        path = storage.join(root, "sheets", f"step-{step:08d}.png")
        images.write_png(path, sheet, {"Title": f"samples after {step} steps, and references"})
    return sheet
