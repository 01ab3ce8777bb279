"""Our side of the data benchmark: the stage of `embed` with timing, in several executors.

    slides -tile (mask=all)-> units of `embed` -> this process | Ray | plain processes -> Timing

The encoder may cost nothing (reading alone) or sleep (scaling on few cores). Everything else is as
for users: units, parts, stamps, atomic writes. Ray and plain processes start from a new process,
so that caches are equally cold.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks.data_slides import PATCH_PX, Slides
from raylarge.compute.session import session
from raylarge.data import embed, embed_config, parts, tile, tile_table
from raylarge.data.embed import EmbedStage
from raylarge.data.embed_config import EmbedConfig
from raylarge.data.parts import Facts, PartBuilder
from raylarge.data.pipeline import ExecutorConfig
from raylarge.data.tile_candidates import TileConfig
from raylarge.data.units import BlockUnit


@dataclass(frozen=True)
class Timing:
    """Timing of some tiles.

    Attributes:
        tiles: how many.
        whole_s: from the call to the answer.
        first_s: from the call until the first part was begun: processes, imports, weights.
        steady: tiles per second once every worker has finished a part; of all parts, where
            nothing came after that.
        cpu_s: of the processes that did the work, their threads included.
    """

    tiles: int
    whole_s: float
    first_s: float
    steady: float
    cpu_s: float

    @property
    def whole(self) -> float:
        """Tiles per second, start-up included."""
        return self.tiles / self.whole_s

    @classmethod
    def of(cls, facts: Sequence[Facts], began: float, ended: float) -> Timing:
        """Compute from the parts' own records."""
        tiles, first = sum(one["tiles"] for one in facts), min(one["began"] for one in facts)
        return cls(
            tiles,
            ended - began,
            first - began,
            steady(facts) or tiles / (max(one["ended"] for one in facts) - first),
            sum(one["cpu_s"] for one in facts),
        )


@dataclass(frozen=True)
class Job:
    """Parts to build; picklable.

    Attributes:
        root: a data folder where `tile` has run.
        cost_s: what a tile costs an encoder that sleeps; None: the config's encoder computes.
        units: of `embed`.
    """

    root: str
    tile: TileConfig
    embed: EmbedConfig
    cost_s: float | None
    units: list[BlockUnit]

    @property
    def make_stage(self) -> Callable[[], Watched]:
        """Return a function that builds the stage."""
        return partial(Watched, self.root, self.tile, self.embed, self.cost_s)


class Sleeper:
    """An encoder that sleeps."""

    card = embed.ssl.card("none")

    def __init__(self, cost_s: float) -> None:
        self._cost_s = cost_s

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Return zeros."""
        if self._cost_s:
            time.sleep(self._cost_s * len(images))
        return np.zeros((len(images), self.card.width), np.float16)


class Watched(EmbedStage):
    """Builds EMBEDDINGS, and records time, process and CPU use."""

    def __init__(
        self, root: str, tile: TileConfig, config: EmbedConfig, cost_s: float | None
    ) -> None:
        """See `Job`."""
        if cost_s is None:
            super().__init__(root, tile, config)
        else:
            super().__init__(root, tile, replace(config, encoder="none"))
            self._encoder: Any = Sleeper(cost_s)

    def make(self, unit: BlockUnit) -> tuple[pa.Table, Facts]:
        """See `EmbedStage`."""
        began, cpu = time.time(), time.process_time()
        table, facts = super().make(unit)
        watched = {"began": began, "cpu_s": time.process_time() - cpu, "pid": os.getpid()}
        return table, {**facts, **watched, "ended": time.time()}


def steady(facts: Sequence[Facts]) -> float:
    """Return tiles per second after every worker has finished a part; 0 if nothing came after.

    A part that was begun before counts with the share of its time that lies after.
    """
    by_worker: dict[int, list[Facts]] = defaultdict(list)
    for one in facts:
        by_worker[one["pid"]].append(one)
    start = max(min(one["ended"] for one in own) for own in by_worker.values())
    stop = max(one["ended"] for one in facts)
    tiles = sum(
        one["tiles"] * max(0.0, one["ended"] - max(start, one["began"]))
        / (one["ended"] - one["began"])
        for one in facts
    )  # fmt: skip
    return float(tiles / (stop - start)) if stop > start else 0.0


def tiled(slides: Slides, folder: Path, block_tiles: int) -> tuple[str, TileConfig]:
    """Create a data folder with all base tiles of the slides."""
    config = TileConfig(patch_px=PATCH_PX, scales=[0], mask="all", block_tiles=block_tiles)
    shutil.rmtree(folder, ignore_errors=True)
    tile.run(str(folder), slides.paths, config, ExecutorConfig())
    return str(folder), config


def job(
    root: str, config: TileConfig, slides: Slides, means: EmbedConfig, cost_s: float | None = None
) -> Job:
    """Return the parts with the rows to measure."""
    sections = {"tile": tile_table.section(config), "embed": embed_config.section(means)}
    units = embed.units_of(root, config, sections)
    units = [unit for unit in units if unit.rows[1] <= slides.grid[0]]
    return Job(root, config, means, cost_s, units)


def here(job: Job) -> Timing:
    """Run in this process."""
    return _run(job, ExecutorConfig())


def on_ray(job: Job, workers: int) -> Timing:
    """Run on a new Ray session."""
    return _apart(_on_ray, job, workers)


def _on_ray(job: Job, workers: int) -> Timing:
    began = time.time()
    with session(workers + 1):
        started = time.time() - began
        timing = _run(job, ExecutorConfig(workers=workers))
    return replace(timing, whole_s=time.time() - began, first_s=timing.first_s + started)


def plain(job: Job, workers: int) -> Timing:
    """Run in plain processes, each with every workers-th part."""
    _forget(job)
    began = time.time()
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        shares = [replace(job, units=job.units[i::workers]) for i in range(workers)]
        facts = [one for share in pool.map(_share, shares) for one in share]
    return Timing.of(facts, began, time.time())


def _share(job: Job) -> list[Facts]:
    torch.set_num_threads(1)
    work = PartBuilder(job.root, job.make_stage)
    return [work(unit) for unit in job.units]


def _run(job: Job, executor: ExecutorConfig) -> Timing:
    _forget(job)
    began = time.time()
    built = parts.build(job.root, job.units, job.make_stage, executor, "embed")
    return Timing.of(built.facts, began, time.time())


def _forget(job: Job) -> None:
    shutil.rmtree(Path(job.root, "embeddings"), ignore_errors=True)


def _apart(call: Callable[..., Timing], *arguments: Any) -> Timing:
    """Call in a process of its own: Ray leaves threads behind, and others fork here."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(call, *arguments).result()
