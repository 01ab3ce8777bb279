"""Training, measured per step: what Ray, DeepSpeed, the loop itself and a checkpoint add.

python -m benchmarks.train [quick=true] [only=overhead,loop,resume,ingest,two] [out=PAGE.md]

All train the same real `ldm` on the same random rows, in turns (`train_turns.py`); a step is all
from one pass of the network to the next. Start-up is in no figure. The whole run writes
results/train_<cores>cores_<yyyymm>.md and a .json beside it with every sample; quick runs write
only where told. Resuming and the ingest: `train_resume.py`.
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

from benchmarks import page, train_resume, train_tables, train_turns
from benchmarks import train_figures as figures
from benchmarks.page import Section
from benchmarks.train_figures import STEP_S
from benchmarks.train_turns import LOOPS, Found, Way
from jobs.presets import TRAIN
from raylarge import report, storage
from raylarge.compute.session import QUIET, session
from raylarge.config import build, parse
from raylarge.errors import UserError
from raylarge.train.launch import Train
from raylarge.train.tasks import ldm

GOALS = {"Ray, torch": 0.03, "Ray, DeepSpeed": 0.08}
SAME = 1e-3
"""How far the losses of two ways may be apart, as a share."""
TWIN = "local twin"


@dataclass(frozen=True)
class Bench:
    """What is measured, and how long.

    Attributes:
        only: of overhead, loop, resume, ingest and two.
        pairs: turns of each way that count.
        steps: of a turn; even, and 6 or more.
        batch: samples of a step; few, as what is sought does not depend on them.
        zero: ZeRO stages of `overhead`; empty: no DeepSpeed.
        network: tiny (of `preset=tiny`) or toy.
        times: that resuming is measured.
        blocks: super-blocks that `ingest` reads.
        large: the table of `resume` and `ingest` is as large as TCGA-BRCA's.
        out: the page to write.
    """

    quick: bool = False
    only: str = "overhead,loop,resume,ingest,two"
    pairs: int = 30
    steps: int = 16
    batch: int = 4
    zero: str = "1,2,3"
    network: str = "tiny"
    times: int = 3
    blocks: int = 2
    large: bool = True
    out: str = ""


QUICK = {"only": "loop,resume,ingest", "pairs": 2, "steps": 6, "zero": "1", "network": "toy"}
PRESETS: dict[str, dict[str, Any]] = {"quick": {**QUICK, "times": 1, "blocks": 1, "large": False}}

TOY = {
    "unet": {"channels": [16], "attention": [True], "layers": 1, "heads": 2, "groups": 8},
    "summarizer": {"width": 32, "layers": 1, "heads": 2},
}


@dataclass
class Measure:
    """What is trained on what, and every sample that was taken."""

    bench: Bench
    folder: Path
    samples: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def config(self) -> Train:
        """The training that all ways share: rows in memory after a few steps, as in the demo."""
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

    def turns(self, section: str, ways: Sequence[Way], address: str = "") -> Found:
        """Turns of some ways, whose losses must be one."""
        report.say(f"{section}: {len(ways)} ways, {self.bench.pairs} turns each ...")
        bench = self.bench
        found = train_turns.conduct(ways, bench.steps, bench.pairs, address)
        self.samples[section] = {name: some.tolist() for name, some in found.seconds.items()}
        losses = np.array([[one["first_loss"], one["loss"]] for one in found.facts.values()])
        apart = np.abs(losses / losses[0] - 1).max(axis=0)
        if apart[0] > 1e-5 or apart[1] > SAME:
            raise AssertionError(f"{section}: losses are apart by {apart}")
        return found

    def about(self, found: Sequence[Found]) -> str:
        """How turns were taken."""
        bench, count = self.bench, _parameters(self.config)
        loads = [load for one in found for load in one.load]
        return (
            f"Networks of preset={bench.network}, {count / 1e6:.1f} M parameters, fp32, batches of "
            f"{bench.batch}, one torch thread each. {bench.pairs} turns of {bench.steps} steps by "
            f"each way in a new order each time, all set up and warm before; the losses of all "
            f"ways agree (asserted: {SAME:g}). Wall: the median step of a turn. CPU: the mean "
            f"step's, of all threads of the process that trains, rare work included. Differences "
            f"within a turn; their medians, and 95 % intervals by bootstrap over turns. Load "
            f"averages at their starts and ends: {min(loads):.1f} to {max(loads):.1f} on "
            f"{os.cpu_count()} cores, of which the turns themselves take one."
        )


def _parameters(config: Train) -> int:
    task = ldm.build(config, ldm.source(config).facts)
    return sum(parameter.numel() for parameter in task.network.parameters())


def overhead(measure: Measure) -> Section:
    """One worker of Ray, under plain torch and DeepSpeed, against the local twin."""
    one = replace(measure.config, workers=1)
    ways = [Way("Ray, torch", replace(one, strategy="torch"))]
    for stage in map(int, filter(None, measure.bench.zero.split(","))):
        ways.append(Way(f"Ray, DeepSpeed, ZeRO-{stage}", replace(one, zero=stage)))
    found, short = on_ray(measure, ways), []
    for way, one_found in zip(ways, found, strict=True):
        goal = next(value for start, value in GOALS.items() if way.name.startswith(start))
        share = figures.over_first(one_found, way.name)[0].share
        if share.value > goal:
            short.append(
                f"{way.name}: {share.value:.1%} of a {STEP_S:g} s step ({share.low:.1%} to "
                f"{share.high:.1%}); the aim is {goal:.0%}."
            )
    beside = found[0].beside
    names = sorted(beside, key=beside.__getitem__, reverse=True)[:5]
    told = (
        f"Beside the two that train, processes of one training under Ray took "
        f"{sum(beside.values()):.1%} of a core, the most of it: "
        f"{', '.join(f'{name} {beside[name]:.1%}' for name in names)}."
    )
    title = "A step of one worker of Ray beside the local twin"
    notes = [measure.about(found), f"{_NICE} {told}"]
    return Section(title, figures.HEADER, figures.table(found), notes, short)


_NICE = (
    "Ray starts workers at niceness 15, which beside other work on the same cores would be "
    "measured and nothing else; here it is told to leave it (RAY_worker_niceness=0)."
)


def two(measure: Measure) -> Section:
    """Two workers, which share one machine: for information."""
    both = replace(measure.config, workers=2)
    ways = [Way("Ray, torch, 2 workers", replace(both, strategy="torch"))]
    ways.append(Way("Ray, DeepSpeed, ZeRO-1, 2 workers", replace(both, zero=1)))
    found = on_ray(measure, ways)
    note = (
        "For information: both workers share this machine's cores, with each other and whatever "
        "else runs, and speak over gloo; the batch is the twin's, half for each. CPU is rank 0's."
    )
    title = "A step of two workers, the same batch"
    notes = [note, measure.about(found)]
    return Section(title, figures.HEADER, figures.table(found), notes)


def on_ray(measure: Measure, ways: Sequence[Way]) -> list[Found]:
    """Turns of each way with the local twin, in one Ray of ours."""
    workers = max(way.config.workers for way in ways)
    with session(workers, str(measure.folder / "ray")):
        import ray

        address = ray.get_runtime_context().gcs_address
        twin = Way(TWIN, measure.config)
        return [measure.turns(way.name, [twin, way], address) for way in ways]


def loop(measure: Measure) -> Section:
    """The local twin against a loop of plain torch, and what a checkpoint costs it."""
    config, turn = measure.config, measure.bench.steps
    ways = [Way(name, config, name) for name in LOOPS]
    saving = f"{TWIN}, a checkpoint a turn"
    ways += [Way(TWIN, config), Way(saving, replace(config, checkpoint_every=turn))]
    found = measure.turns("loop", ways)
    note = (
        "`bare` is forward, backward, clipping, AdamW and the moving average, the loss read every "
        "step, and nothing else; its batches lie in memory, or are made and drawn in the step. "
        "The twin makes them in a thread meanwhile."
    )
    stall, after, work = figures.checkpoint(found.seconds[saving])
    size, at_once = written_at_once(measure)
    told = (
        f"A checkpoint (about {size / 1e6:.0f} MB: weights, two moments, average) stops training "
        f"for {stall.value:.0f} ms ({stall.interval}), in which the state is copied; while a "
        f"thread writes it, the steps after it in the turn take {after.value:.0f} ms more in all "
        f"({after.interval}). Its CPU time is {work.value:.0f} ms ({work.interval}). `torch.save` "
        f"of as much into a file takes {at_once:.0f} ms."
    )
    title = "A step of the loop beside plain torch, and a checkpoint"
    notes = [measure.about([found]), note, told]
    return Section(title, figures.HEADER, figures.table([found]), notes)


def written_at_once(measure: Measure) -> tuple[int, float]:
    """Bytes of the state, and the median milliseconds of saving as much as plain torch does."""
    floats = 4 * _parameters(measure.config)
    state = {str(i): torch.randn(floats // 16) for i in range(16)}
    path, spent = measure.folder / "plain.pt", []
    for _ in range(5):
        spent.append(train_resume.timed(lambda: torch.save(state, path))[1][0])
    path.unlink()
    return 4 * floats, 1000 * float(np.median(spent))


def resume(measure: Measure) -> Section:
    """Going on with a training that is a million steps old."""
    section, measure.samples["resume"] = train_resume.resume(measure.large, measure.bench.times)
    return section


def ingest(measure: Measure) -> Section:
    """Rows per second."""
    section, measure.samples["ingest"] = train_resume.ingest(measure.large, measure.bench.blocks)
    return section


PARTS: dict[str, Callable[[Measure], Section]] = {
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
    config = parse(Bench, ["preset=quick", *words] if quick else words, PRESETS)
    names = config.only.split(",")
    if unknown := set(names) - PARTS.keys():
        raise UserError(f"only={','.join(sorted(unknown))} is not of {', '.join(PARTS)}.")
    if config.steps < 6 or config.steps % 2:
        raise UserError(f"steps={config.steps} must be even, and 6 or more.")
    sections = []
    with tempfile.TemporaryDirectory(prefix="raylarge-train-") as folder:
        measure = Measure(config, Path(folder))
        for name in names:
            sections.append(PARTS[name](measure))
            page.show(sections[-1])
    cores = f"{os.cpu_count()}cores"
    if out := config.out or ("" if quick else page.place("train", cores)):
        _write(out, sections, measure)


def _write(out: str, sections: list[Section], measure: Measure) -> None:
    """The page, and beside it the tables and every sample as JSON."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("ray", "deepspeed", "pyarrow"))
    sections[0].notes.insert(0, f"{versions}.")
    command = page.command("benchmarks.train")
    page.write(out, f"Training on {os.cpu_count()} cores", command, sections)
    tables = [asdict(section) for section in sections]
    document = {"command": command, "tables": tables, "samples": measure.samples}
    storage.write_json(storage.absolute(str(Path(out).with_suffix(".json"))), document)


if __name__ == "__main__":
    report.entry(main)
