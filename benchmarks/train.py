"""The cost per step of Ray, DeepSpeed, the training loop and a checkpoint.

python -m benchmarks.train [quick=true] [only=overhead,loop,resume,ingest,two] [out=PAGE.md]

All ways train the same real `ldm` on the same random rows, in interleaved runs (`train_runs.py`); a
step lasts from one forward pass to the next, so start-up is in no figure. A full run writes
results/train_<cores>cores_<yyyymm>.md and a .json beside it with every sample; quick runs write
only to out=. Resuming and the ingest: `train_resume.py`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import page, train_resume, train_runs, train_tables
from benchmarks import train_figures as figures
from benchmarks.page import Section
from benchmarks.train_figures import STEP_S
from benchmarks.train_runs import LOOPS, Timings, Way
from jobs.presets import TRAIN
from raylarge import report, storage
from raylarge.compute.session import QUIET, session
from raylarge.config import build, parse
from raylarge.errors import UserError
from raylarge.train import registry
from raylarge.train.launch import Train

GOALS = {"Ray, torch": 0.03, "Ray, DeepSpeed": 0.08}
SAME = 1e-3
"""Largest relative difference of the losses of two ways."""
TWIN = "local twin"


@dataclass(frozen=True)
class TrainBench:
    """Sections and sizes of the benchmark.

    Attributes:
        only: some of overhead, loop, resume, ingest and two.
        rounds: runs of each way.
        steps: of a run that count; even, and 6 or more.
        batch: samples of a step; few, as overheads do not depend on them.
        zero: ZeRO stages of `overhead`; empty: no DeepSpeed.
        network: tiny (of `preset=tiny`) or toy.
        times: measurements of resuming.
        blocks: super-blocks that `ingest` reads.
        large: the table of `resume` and `ingest` is as large as TCGA-BRCA's.
        out: the page to write.
    """

    quick: bool = False
    only: str = "overhead,loop,resume,ingest,two"
    rounds: int = 5
    steps: int = 100
    batch: int = 4
    zero: str = "1,2,3"
    network: str = "tiny"
    times: int = 3
    blocks: int = 2
    large: bool = True
    out: str = ""


QUICK = {"only": "loop,resume,ingest", "rounds": 2, "steps": 6, "zero": "1", "network": "toy"}
PRESETS: dict[str, dict[str, Any]] = {"quick": {**QUICK, "times": 1, "blocks": 1, "large": False}}

TOY = {
    "unet": {"channels": [16], "attention": [True], "layers": 1, "heads": 2, "groups": 8},
    "summarizer": {"width": 32, "layers": 1, "heads": 2},
}


@dataclass
class TrainMeasure:
    """The training to measure, its tables, and all samples."""

    bench: TrainBench
    folder: Path
    samples: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def config(self) -> Train:
        """The training of all ways: its rows are in memory after a few steps, as in the demo."""
        data = str(self.folder / "small")
        channels = 64 if self.bench.network == "toy" else 1280
        train_tables.write(data, (2, 2, 2, 2), latent=(3, 16, 16), channels=channels)
        return self._config(data, self.bench.batch)

    @cached_property
    def large(self) -> Train:
        """The training on the large table."""
        data = str(self.folder / "large")
        if self.bench.large:
            train_tables.write(data, train_tables.BRCA_GROUPS, train_tables.BRCA)
        else:
            train_tables.write(data, (2, 2), (1024, 512), (3, 16, 16), 64)
        return replace(self._config(data, 32), super_block=16 if self.bench.large else 2)

    def _config(self, data: str, batch: int) -> Train:
        networks = {"tiny": TRAIN["ldm"]["tiny"]["ldm"], "toy": TOY}
        if self.bench.network not in networks:
            raise UserError(f"network={self.bench.network} is not of {', '.join(networks)}.")
        values = {
            "model": "ldm",
            "data": data,
            "out": f"{data}-out",
            "batch": batch,
            "warmup": 1,
            "checkpoint_every": 10**9,
            "checkpoint_minutes": 1e9,
            "max_failures": 0,
            "ldm": networks[self.bench.network],
        }
        return build(Train, values)

    def compare(self, section: str, ways: Sequence[Way], address: str = "") -> Timings:
        """Time some ways, and check that their losses agree."""
        bench = self.bench
        report.say(f"{section}: {len(ways)} ways, {bench.rounds} runs each ...")
        timings = train_runs.compare(ways, bench.steps, bench.rounds, address)
        self.samples[section] = {name: s.tolist() for name, s in timings.seconds.items()}
        losses = np.array([[f["first_loss"], f["loss"]] for f in timings.facts.values()])
        difference = np.abs(losses / losses[0] - 1).max(axis=0)
        if difference[0] > 1e-5 or difference[1] > SAME:
            raise AssertionError(f"{section}: losses differ by {difference}")
        return timings

    def about(self, timings: Sequence[Timings]) -> str:
        """Describe how runs were timed."""
        bench, count = self.bench, _parameters(self.config)
        loads = [load for each in timings for load in each.load]
        return (
            f"Networks of preset={bench.network}, {count / 1e6:.1f} M parameters, fp32, batches of "
            f"{bench.batch}, one torch thread each. {bench.rounds} rounds, in each of which every "
            f"way runs {bench.steps} steps after {train_runs.WARMUP} for warming up, in a new "
            f"process and a new order; the losses of all ways agree (asserted: {SAME:g}). Wall: "
            f"median step of a run. CPU: mean step, all threads of the process that trains. "
            f"Differences within a round; their medians, and 95 % intervals by bootstrap over "
            f"rounds. Load averages: {min(loads):.1f} to {max(loads):.1f} on {os.cpu_count()} "
            f"cores, of which a run takes one."
        )


def _parameters(config: Train) -> int:
    task = registry.build(config.run, registry.source(config.run).facts)
    return sum(parameter.numel() for parameter in task.network.parameters())


def overhead(measure: TrainMeasure) -> Section:
    """Compare one worker of Ray, with plain torch and DeepSpeed, to the local twin."""
    single = replace(measure.config, workers=1)
    ways = [Way("Ray, torch", replace(single, strategy="torch"))]
    for stage in map(int, filter(None, measure.bench.zero.split(","))):
        ways.append(Way(f"Ray, DeepSpeed, ZeRO-{stage}", replace(single, zero=stage)))
    timings, short = on_ray(measure, ways), []
    for way, each in zip(ways, timings, strict=True):
        goal = next(value for start, value in GOALS.items() if way.name.startswith(start))
        share = figures.over_first(each, way.name)[0].share
        if share.value > goal:
            short.append(
                f"{way.name}: {share.value:.1%} of a {STEP_S:g} s step ({share.low:.1%} to "
                f"{share.high:.1%}); the aim is {goal:.0%}."
            )
    title = "A step of one worker of Ray beside the local twin"
    notes = [measure.about(timings), _NICE]
    return Section(title, figures.HEADER, figures.table(timings), notes, short)


_NICE = (
    "Ray starts workers at niceness 15, which would dominate the figures beside other work on the "
    "same cores; here RAY_worker_niceness=0."
)


def two(measure: TrainMeasure) -> Section:
    """Measure two workers on one machine, for information."""
    both = replace(measure.config, workers=2)
    ways = [Way("Ray, torch, 2 workers", replace(both, strategy="torch"))]
    ways.append(Way("Ray, DeepSpeed, ZeRO-1, 2 workers", replace(both, zero=1)))
    timings = on_ray(measure, ways)
    note = (
        "For information: both workers share the cores of this machine and communicate by gloo; "
        "each has half of the batch. CPU is that of rank 0."
    )
    title = "A step of two workers, the same batch"
    notes = [note, measure.about(timings)]
    return Section(title, figures.HEADER, figures.table(timings), notes)


def on_ray(measure: TrainMeasure, ways: Sequence[Way]) -> list[Timings]:
    """Compare each way with the local twin, in one Ray session."""
    workers = max(way.config.workers for way in ways)
    with session(workers, str(measure.folder / "ray")):
        import ray

        address = ray.get_runtime_context().gcs_address
        twin = Way(TWIN, measure.config)
        return [measure.compare(way.name, [twin, way], address) for way in ways]


def loop(measure: TrainMeasure) -> Section:
    """Compare the local twin with a loop of plain torch, and measure a checkpoint."""
    config, every = measure.config, train_runs.halfway(measure.bench.steps)
    ways = [Way(name, config, name) for name in LOOPS]
    saving = f"{TWIN}, with a checkpoint"
    ways += [Way(TWIN, config), Way(saving, replace(config, checkpoint_every=every))]
    timings = measure.compare("loop", ways)
    note = (
        "`bare` is forward, backward, clipping, AdamW, the moving average and reading the loss; "
        "its batches are in memory, or are read and drawn in each step. The twin prefetches "
        "them in a thread."
    )
    stall, after, work = figures.checkpoint(timings.seconds[saving])
    size, plain_ms = plain_save(measure)
    cost = (
        f"A checkpoint (about {size / 1e6:.0f} MB: weights, two moments, average) stops training "
        f"for {stall.value:.0f} ms ({stall.interval}), in which the state is copied; while a "
        f"thread writes it, the following steps take {after.value:.0f} ms more in total "
        f"({after.interval}). Its CPU time is {work.value:.0f} ms ({work.interval}). `torch.save` "
        f"of as many bytes takes {plain_ms:.0f} ms."
    )
    title = "A step of the loop beside plain torch, and a checkpoint"
    notes = [measure.about([timings]), note, cost]
    return Section(title, figures.HEADER, figures.table([timings]), notes)


def plain_save(measure: TrainMeasure) -> tuple[int, float]:
    """Return the bytes of the state, and the median milliseconds of `torch.save` of as many."""
    floats = 4 * _parameters(measure.config)
    state = {str(i): torch.randn(floats // 16) for i in range(16)}
    path, durations = measure.folder / "plain.pt", []
    for _ in range(5):
        durations.append(train_resume.timed(lambda: torch.save(state, path))[1][0])
    path.unlink()
    return 4 * floats, 1000 * float(np.median(durations))


def resume(measure: TrainMeasure) -> Section:
    """Measure resuming a training of a million steps."""
    section, measure.samples["resume"] = train_resume.resume(measure.large, measure.bench.times)
    return section


def ingest(measure: TrainMeasure) -> Section:
    """Measure rows per second."""
    section, measure.samples["ingest"] = train_resume.ingest(measure.large, measure.bench.blocks)
    return section


PARTS: dict[str, Callable[[TrainMeasure], Section]] = {
    "overhead": overhead,
    "loop": loop,
    "resume": resume,
    "ingest": ingest,
    "two": two,
}


def main(words: list[str]) -> None:
    """Measure, print and write."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("RAY_worker_niceness", "0")
    quiet = QUIET["RAY_DEDUP_LOGS_SKIP_REGEX"]
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", f"{quiet}|PYTHON worker processes")
    quick = "quick=true" in words
    config = parse(TrainBench, ["preset=quick", *words] if quick else words, PRESETS)
    names = config.only.split(",")
    if unknown := set(names) - PARTS.keys():
        raise UserError(f"only={','.join(sorted(unknown))} is not of {', '.join(PARTS)}.")
    if config.steps < 6 or config.steps % 2:
        raise UserError(f"steps={config.steps} must be even, and 6 or more.")
    sections = []
    with tempfile.TemporaryDirectory(prefix="raylarge-train-") as folder:
        measure = TrainMeasure(config, Path(folder))
        for name in names:
            sections.append(PARTS[name](measure))
            page.show(sections[-1])
    cores = f"{os.cpu_count()}cores"
    if out := config.out or ("" if quick else page.place("train", cores)):
        _write(out, sections, measure)


def _write(out: str, sections: list[Section], measure: TrainMeasure) -> None:
    """Write the page, and beside it tables and samples as JSON."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("ray", "deepspeed", "pyarrow"))
    sections[0].notes.insert(0, f"{versions}.")
    command = page.command("benchmarks.train")
    page.write(out, f"Training on {os.cpu_count()} cores", command, sections)
    tables = [asdict(section) for section in sections]
    document = {"command": command, "tables": tables, "samples": measure.samples}
    storage.write_json(storage.absolute(str(Path(out).with_suffix(".json"))), document)


if __name__ == "__main__":
    report.entry(main)
