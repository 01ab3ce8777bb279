"""Speed of reading and embedding: baselines, Ray against this process, several workers.

Ways are timed alternately, `pairs` times each; ratios are computed within a round.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks import data_makers as makers
from benchmarks import data_rivals as rivals
from benchmarks import data_slides
from benchmarks.data_makers import Job, Timing
from benchmarks.data_slides import Slides
from benchmarks.page import Section
from raylarge import report
from raylarge.data.embed_config import EmbedConfig
from raylarge.data.grid import TileGrid
from raylarge.data.tile_candidates import TileConfig
from raylarge.models import ssl

OVERHEAD_GOAL = 0.1
PROCESSES_GOAL = 0.9
SLEEPING_GOALS = {2: 1.9, 4: 3.7}
BATCH = 30
"""Batch size; divides the rows of the slides of the full run."""
ENCODER = "efficientnet_lite0"
Ways = dict[str, Callable[[], Timing]]


@dataclass
class DataMeasure:
    """Settings of the measurements, and all samples.

    Attributes:
        folder: of slides and data folders.
        pairs: timings of each way.
        units: width of the slides in units of `UNIT_PX`; their height is a quarter.
        rows: of base tiles to read of a slide, at most.
        block: base tiles per part, about.
        minutes: duration of the comparison of Ray with this process.
        workers: of Ray and of the DataLoader in `read`.
        cost_ms: milliseconds per tile of the encoder that sleeps.
        samples: section -> case -> way -> timings.
    """

    folder: Path
    pairs: int
    units: int
    rows: int
    block: int
    minutes: float
    workers: int
    cost_ms: float
    samples: dict[str, dict[str, dict[str, list[Any]]]] = field(default_factory=dict)

    @cached_property
    def _picture(self) -> tuple[data_slides.Pixels, str]:
        return data_slides.picture()

    @property
    def about(self) -> str:
        """Describe the slides."""
        return (
            f"Slides of 20x and 40x have Aperio's layout (JPEG tiles of 240 px, 4:2:0) and repeat "
            f"{self._picture[1]}. One torch thread everywhere."
        )

    @cached_property
    def twenty(self) -> Slides:
        """A complete 20x slide."""
        return self.create_slide("wide", (max(1, self.units // 4), self.units), 0.5)

    @cached_property
    def forty(self) -> Slides:
        """A complete 40x slide."""
        return self.create_slide("wide", (max(1, self.units // 4), self.units), 0.25)

    def create_slide(self, name: str, units: tuple[int, int], mpp: float) -> Slides:
        """Create a slide of a size in units and a resolution."""
        path = self.folder / f"{name}-{units[0]}-{units[1]}-{round(10 / mpp)}x.svs"
        return data_slides.write(path, units, mpp, self._picture[0])

    def part(self, slides: Slides) -> Slides:
        """Return the rows of slides to read: complete blocks."""
        high = max(1, self.block // slides.grid[1])
        return slides.top(max(1, self.rows // high) * high)

    def job(
        self, slides: Slides, means: EmbedConfig, block_tiles: int, cost_s: float | None
    ) -> Job:
        """Return the parts of some slides, each in its own data folder."""
        name = f"{Path(slides.paths[0]).stem}-{len(slides.paths)}-{block_tiles}"
        root, tile = makers.tiled(slides, self.folder / name, block_tiles)
        job = makers.job(root, tile, slides, means, cost_s)
        if sum(unit.tiles or 0 for unit in job.units) != slides.tiles:
            raise AssertionError(f"{slides.title}: the parts are not the {slides.tiles} tiles")
        return job

    def timed(self, section: str, case: str, ways: Ways, pairs: int = 0) -> dict[str, list[Timing]]:
        """Time all ways alternately."""
        spent: dict[str, list[Timing]] = {name: [] for name in ways}
        for _ in range(pairs or self.pairs):
            for name, way in ways.items():
                spent[name].append(way())
                report.say(f"{section}, {case}: {name}, {spent[name][-1].steady:.1f} tiles/s")
        kept = self.samples.setdefault(section, {}).setdefault(case, {})
        kept.update({name: [asdict(one) for one in timings] for name, timings in spent.items()})
        return spent


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return float(statistics.median(values))


def ratio(of: Sequence[Timing], to: Sequence[Timing], name: str) -> float:
    """Return the median over rounds of the ratio of two ways."""
    return median([getattr(a, name) / getattr(b, name) for a, b in zip(of, to, strict=True)])


def read(measure: DataMeasure) -> Section:
    """Measure tiles per second of all methods, on three kinds of slides."""
    cases = [measure.part(measure.twenty)]
    cases.append(measure.part(measure.forty).copies(2, measure.folder / "forty"))
    if data_slides.REAL.exists():
        real = Slides.of(data_slides.REAL, data_slides.REAL.name)
        cases.append(real.copies(2 if measure.pairs == 1 else 16, measure.folder / "real"))
    rows: list[list[str]] = []
    short: list[str] = []
    agreed = [agreement(slides) for slides in cases]
    for slides in cases:
        for encoder in (None, "toy", ENCODER):
            timings = _rivals(measure, slides, encoder)
            rows += _read_rows(slides, encoder, timings)
            short += _slower(slides, encoder, timings)
    header = ["slides", "encoder", "who", "tiles/s", "start-up included", "times ours here",
              "CPU ms per tile"]  # fmt: skip
    title = f"Reading and embedding, {measure.workers} workers where there are several"
    return Section(title, header, rows, [*_read_notes(measure), *agreed], short)


def _rivals(measure: DataMeasure, slides: Slides, encoder: str | None) -> dict[str, list[Timing]]:
    """Time all ways to read (and embed) some slides."""
    means = EmbedConfig(encoder=encoder or "none", batch=BATCH)
    job = measure.job(slides, means, measure.block, 0.0 if encoder is None else None)
    count = measure.workers
    encode = None if encoder is None else ssl.load(encoder)
    ways: Ways = {
        "ours, this process": partial(makers.here, job),
        "read_region loop": partial(rivals.loop, slides, encode, BATCH),
        "CLAM, DataLoader": partial(rivals.clam, slides, encoder, BATCH, count),
        "ours over Ray": partial(makers.on_ray, job, count),
    }
    return measure.timed("read", f"{slides.title}, {encoder or 'reading'}", ways)


def _read_rows(
    slides: Slides, encoder: str | None, timings: dict[str, list[Timing]]
) -> list[list[str]]:
    ours, *_ = timings.values()
    return [
        [
            slides.title,
            encoder or "–, reading alone",
            who,
            f"{median([one.steady for one in all_]):.0f}",
            f"{median([one.whole for one in all_]):.0f}",
            f"{ratio(all_, ours, 'steady'):.2f}",
            f"{median([1000 * one.cpu_s / one.tiles for one in all_]):.2f}",
        ]
        for who, all_ in timings.items()
    ]


def _slower(slides: Slides, encoder: str | None, timings: dict[str, list[Timing]]) -> list[str]:
    """Return sentences on baselines that are faster in as many processes."""
    pairs = (("read_region loop", "ours, this process"), ("CLAM, DataLoader", "ours over Ray"))
    times = {theirs: (own, ratio(timings[theirs], timings[own], "steady")) for theirs, own in pairs}
    return [
        f"Reading: on {slides.title}, {encoder or 'reading alone'}, `{theirs}` gives "
        f"{value:.2f} times the tiles per second of `{own}`."
        for theirs, (own, value) in times.items()
        if value > 1
    ]


def _read_notes(measure: DataMeasure) -> list[str]:
    return [
        f"Medians of {measure.pairs} interleaved runs, of tiles per second after start-up (a "
        f"DataLoader's first batch, a worker's first part) and start-up included, which for Ray "
        f"is its own start. All read the same cells, whole rows of base tiles of 256 px at "
        f"0.5 µm/px, in batches of {BATCH}; the loop and CLAM go down columns, as CLAM's "
        f"coordinates do, and the rows are few enough that OpenSlide's cache holds a column: "
        f"that favours them.",
        "`ours` reads, looks for blank tiles, embeds and writes parts, with a thread that reads "
        "ahead of the encoder. `CLAM, DataLoader` has as many workers that read, and one more "
        "process for the encoder; `ours over Ray` that many actors in all, and a driver. CPU "
        "time is that of the processes that read and embed; Ray's own processes are not in it.",
    ]


def agreement(slides: Slides) -> str:
    """Compare pixels and embeddings of all methods; asserted at 20x."""
    cells = [cell for cell in rivals.cells(slides.top(2)) if cell[1] < 32]
    ours = TileGrid(TileConfig())
    ours.open(SimpleNamespace(path=slides.paths[0], mpp_override=None, view=0))
    mine = np.stack([ours.read(row, column, 1)[0] for row, column in cells])
    bag = rivals.Bag(slides.paths[0], slides.top(2), rivals.pixels_alone)
    seen = dict(zip(bag.cells, range(len(bag)), strict=True))
    theirs = torch.cat([bag[seen[cell]][0] for cell in cells]).numpy()
    ours.close()
    apart = np.abs(mine.astype(int) - theirs)
    if slides.zoom == 1 and apart.max():
        raise AssertionError(f"{slides.title}: pixels differ by {apart.max()}")
    transform, network = rivals.clam_encoder(ENCODER)
    with torch.inference_mode():
        images = [transform(rivals.Image.fromarray(one)) for one in theirs]
        a = network(torch.stack(images))
        b = torch.from_numpy(ssl.load(ENCODER)(mine)).float()
    cosines = torch.nn.functional.cosine_similarity(a, b)
    same = "the same pixels, asserted" if slides.zoom == 1 else (
        f"pixels that differ by {apart.mean():.2f} levels in the mean and {apart.max()} at most: "
        f"both resize by PIL's bicubic, they tile by tile, we over the borders"
    )  # fmt: skip
    return (
        f"Held against CLAM's {len(cells)} tiles of {slides.title}: {same}; embeddings by "
        f"{ENCODER} have a cosine of {cosines.median():.4f} in the median and {cosines.min():.4f} "
        f"at least: PIL rounds to whole levels while it resizes, torch does not."
    )


def overhead(measure: DataMeasure) -> Section:
    """Compare one worker of Ray with this process, for minutes."""
    slides = measure.twenty
    means = EmbedConfig(encoder=ENCODER, batch=BATCH)
    trial = measure.job(measure.part(slides), means, measure.block, None)
    rate = makers.here(trial).steady
    count = max(1, round(60 * measure.minutes * rate / slides.tiles))
    many = slides.copies(count, measure.folder / "many")
    job = measure.job(many, means, measure.block, None)
    ways: Ways = {
        "this process": partial(makers.here, job),
        "Ray, 1 worker": partial(makers.on_ray, job, 1),
    }
    timings = measure.timed("overhead", slides.title, ways)
    here, ray = timings.values()
    whole, steady = ratio(ray, here, "whole_s") - 1, ratio(here, ray, "steady") - 1
    rows = [
        [who, str(all_[0].tiles)]
        + [f"{median([getattr(one, name) for one in all_]):.1f}" for name in
           ("whole_s", "first_s", "steady")]
        + [f"{median([1000 * one.cpu_s / one.tiles for one in all_]):.2f}"]
        for who, all_ in timings.items()
    ]  # fmt: skip
    rows.append(["Ray's overhead", "", f"{whole:+.1%}", "", f"{steady:+.1%}", ""])
    short = [] if whole <= OVERHEAD_GOAL else [
        f"Overhead: one worker of Ray takes {whole:+.1%} of the time of this process, "
        f"{steady:+.1%} without start-up; the aim is {OVERHEAD_GOAL:.0%}."
    ]  # fmt: skip
    return Section(
        f"One worker of Ray beside this process, {ENCODER}",
        ["who", "tiles", "seconds", "of these before the first part", "tiles/s after it",
         "CPU ms per tile"],
        rows,
        [f"Medians of {measure.pairs} interleaved runs, each of Ray's in a session of its own, "
         f"whose start and end are in its seconds. The fixed cost does not grow with the run."],
        short,
    )  # fmt: skip


def scaling(measure: DataMeasure) -> Section:
    """Compare several workers with as many plain processes, and with one worker."""
    rows, short = [], []
    slides = measure.twenty.top(2 * measure.rows)
    means = EmbedConfig(encoder=ENCODER, batch=BATCH)
    job = measure.job(slides, means, slides.grid[1], None)
    for count in (2, 4):
        ways: Ways = {
            f"{count} plain processes": partial(makers.plain, job, count),
            f"{count} workers of Ray": partial(makers.on_ray, job, count),
        }
        timings = measure.timed("scaling", f"{count}", ways)
        alone, ray = timings.values()
        rows += _scaling_rows(ENCODER, timings, alone)
        if (share := ratio(ray, alone, "steady")) < PROCESSES_GOAL:
            short.append(
                f"Scaling: {count} workers of Ray give {share:.2f} times the tiles per second of "
                f"as many processes; the aim is {PROCESSES_GOAL}."
            )
    sleeping = _sleeping(measure)
    rows += _scaling_rows(f"sleeps {measure.cost_ms:g} ms", sleeping, sleeping["1 worker of Ray"])
    for count, goal in SLEEPING_GOALS.items():
        many = sleeping[f"{count} workers of Ray"]
        if (times := ratio(many, sleeping["1 worker of Ray"], "steady")) < goal:
            short.append(f"Scaling: {count} sleeping workers are {times:.2f}; the aim is {goal}.")
    return Section(
        "Several workers",
        ["encoder", "who", "tiles", "tiles/s", "start-up included", "times the first",
         "times, start-up included"],
        rows,
        [f"Medians of {measure.pairs} interleaved runs; one of the encoder that sleeps. Tiles per "
         f"second are from when every worker has finished a part until the last part. Plain "
         f"processes are spawned, each has every n-th part and the same stage. More workers than "
         f"cores share these; the encoder that sleeps stands for one on a device of its own, "
         f"while reading still takes cores."],
        short,
    )  # fmt: skip


def _sleeping(measure: DataMeasure) -> dict[str, list[Timing]]:
    """Time 1, 2 and 4 workers whose encoders sleep; parts of one batch."""
    side = min(2, measure.units)
    slides = measure.create_slide("small", (side, side), 0.5).copies(
        2 * side, measure.folder / "sleep"
    )
    cost_s = measure.cost_ms / 1000
    job = measure.job(slides, EmbedConfig(batch=BATCH), slides.grid[1], cost_s)
    ways: Ways = {
        f"{count} worker{'s' * (count > 1)} of Ray": partial(makers.on_ray, job, count)
        for count in (1, 2, 4)
    }
    return measure.timed("scaling", "sleeping", ways, pairs=1)


def _scaling_rows(
    encoder: str, timings: dict[str, list[Timing]], first: Sequence[Timing]
) -> list[list[str]]:
    return [
        [encoder, who, str(all_[0].tiles), f"{median([one.steady for one in all_]):.1f}"]
        + [f"{median([one.whole for one in all_]):.1f}"]
        + [f"{ratio(all_, first, name):.2f}" for name in ("steady", "whole")]
        for who, all_ in timings.items()
    ]
