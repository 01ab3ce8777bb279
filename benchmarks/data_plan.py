"""Estimate the preparation of the paper's data set on 8 and 64 GPUs from costs measured here.

1,136 slides, 12.5 M base tiles at 20x, 16.6 M examples of 8 scales (ZoomLDM, section 4). Cores,
GPUs and the store work concurrently, so a stage lasts as long as its slowest resource. Assumptions
are in `Cluster`.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import numpy as np

from benchmarks import data_makers as makers
from benchmarks.data_slides import PATCH_PX, Slides
from benchmarks.data_speed import BATCH, DataMeasure, median
from benchmarks.page import Section
from raylarge import images
from raylarge.data import embed, shard, tile
from raylarge.data.embed_config import EmbedConfig
from raylarge.data.grid import TileGrid
from raylarge.data.pipeline import ExecutorConfig
from raylarge.data.shard import ShardConfig
from raylarge.data.tile_candidates import TileConfig

SLIDES, TILES, EXAMPLES = 1136, 12.5e6, 16.6e6


@dataclass(frozen=True)
class Cluster:
    """Assumptions of an estimate.

    Attributes:
        gpus: H100s.
        cores_per_gpu: such as 192 of a machine with 8.
        tflops: that ViT-L/16 achieves in bf16, a quarter of the card's peak of 989.
        store_gb_s: that 8 GPUs' machine reads from or writes to S3.
        slide_gb: of a slide's file.
    """

    gpus: int
    cores_per_gpu: float = 24
    tflops: float = 250
    store_gb_s: float = 2.0
    slide_gb: float = 1.0

    @property
    def cores(self) -> float:
        """Total number."""
        return self.gpus * self.cores_per_gpu

    @property
    def store(self) -> float:
        """Bandwidth of all machines, GB/s."""
        return self.store_gb_s * self.gpus / 8


@dataclass(frozen=True)
class Costs:
    """Measured costs, in milliseconds of one core and in kilobytes.

    Attributes:
        read_ms: of a base tile, by zoom.
        shard_ms: of the examples over a base tile, by zoom: reading, A and PNG.
        jpeg_ms: by zoom, as `shard_ms` with JPEG of quality 90.
        png_kb: of an example of scale 0.
        jpeg_kb: of an example.
    """

    read_ms: dict[int, float]
    shard_ms: dict[int, float]
    jpeg_ms: dict[int, float]
    png_kb: float
    jpeg_kb: float


def vit_flops(
    side_px: int = 224, patch_px: int = 16, width: int = 1024, depth: int = 24
) -> float:  # fmt: skip
    """Return the FLOPs of one image through a ViT (ViT-L/16: 61.6 GMAC, 123 GFLOP).

    A block of N tokens of width D has 12 N D² multiplications in its matrices (4 of attention, 8
    of the MLP) and 2 N² D between tokens; a FLOP is half of a multiply-add.
    """
    patches = (side_px // patch_px) ** 2
    tokens = patches + 1
    block = 12 * tokens * width**2 + 2 * tokens**2 * width
    return 2.0 * (depth * block + patches * 3 * patch_px**2 * width)


def section(measure: DataMeasure) -> Section:
    """Estimate minutes of each stage on both clusters, and the limiting resource."""
    costs = measured(measure)
    measure.samples["plan"] = {"costs": {"all": [asdict(costs)]}}
    rows = [row for gpus in (8, 64) for row in rows_of(Cluster(gpus), costs)]
    one = Cluster(8)
    per_gpu = 1e12 * one.tflops / vit_flops()
    notes = [
        f"On paper: {SLIDES:,} slides, {TILES / 1e6:.1f} M base tiles, {EXAMPLES / 1e6:.1f} M "
        f"examples. Assumed: {one.cores_per_gpu:g} cores per GPU as fast as this machine's, "
        f"{one.tflops:g} TFLOP/s of an H100 for ViT-L/16 (UNI) at 224 px, which is "
        f"{vit_flops() / 2e9:.1f} GMAC or {vit_flops() / 1e9:.0f} GFLOP a tile, so "
        f"{per_gpu:,.0f} tiles/s; S3 at {one.store_gb_s:g} GB/s per 8 GPUs; {one.slide_gb:g} GB a "
        f"slide. A stage lasts as long as its slowest resource.",
        f"Measured in this run, of one core: a base tile is read in {costs.read_ms[1]:.2f} ms at "
        f"20x and {costs.read_ms[2]:.2f} ms at 40x; the examples over it, all scales, are read, "
        f"shrunk and coded in {costs.shard_ms[1]:.1f} and {costs.shard_ms[2]:.1f} ms as PNG, in "
        f"{costs.jpeg_ms[1]:.1f} and {costs.jpeg_ms[2]:.1f} ms as JPEG of quality 90; an example "
        f"is {costs.png_kb:.0f} KB or {costs.jpeg_kb:.0f} KB.",
        f"One GPU is fed by {per_gpu * costs.read_ms[1] / 1000:.0f} cores that read 20x, "
        f"{per_gpu * costs.read_ms[2] / 1000:.0f} at 40x.",
    ]
    header = ["GPUs", "stage", "GPUs, min", "cores, min", "store, min", "minutes", "binds"]
    return Section("Planned for 1,136 slides", header, rows, notes)


def rows_of(cluster: Cluster, costs: Costs) -> list[list[str]]:
    """Return the rows of one cluster."""
    files = SLIDES * cluster.slide_gb
    gpu = TILES * vit_flops() / (1e12 * cluster.tflops)
    items = []
    for zoom, power in ((1, "20x"), (2, "40x")):
        stages = [(f"embed, {power} slides", gpu, costs.read_ms[zoom], files)]
        for name, per_tile, kb in (
            ("PNG", costs.shard_ms[zoom], costs.png_kb),
            ("JPEG", costs.jpeg_ms[zoom], costs.jpeg_kb),
        ):
            # Blocks are written, read and mixed: three times their bytes.
            stages.append((f"shard, {power}, {name}", 0.0, per_tile, files + 3e-6 * EXAMPLES * kb))
        items += [_row(cluster, *stage) for stage in stages]
    return items


def _row(cluster: Cluster, stage: str, gpu_s: float, tile_ms: float, gb: float) -> list[str]:
    seconds = {
        "GPUs": gpu_s / cluster.gpus,
        "cores": TILES * tile_ms / 1000 / cluster.cores,
        "store": gb / cluster.store,
    }
    binds = max(seconds, key=seconds.__getitem__)
    each = [f"{value / 60:.1f}" for value in seconds.values()]
    return [str(cluster.gpus), stage, *each, f"{seconds[binds] / 60:.0f}", binds]


def measured(measure: DataMeasure) -> Costs:
    """Measure the costs on one core."""
    units = {1: min(2, measure.units), 2: min(4, 2 * measure.units)}
    slides = {
        zoom: measure.create_slide("square", (side, side), 0.5 / zoom)
        for zoom, side in units.items()
    }
    wide = {1: measure.part(measure.twenty), 2: measure.part(measure.forty)}
    none = EmbedConfig(encoder="none", batch=BATCH)
    read = {}
    for zoom, each in wide.items():
        job = measure.job(each, none, measure.block, 0.0)
        runs = [makers.here(job) for _ in range(measure.pairs)]
        read[zoom] = median([1000 * one.cpu_s / one.tiles for one in runs])
    sharded = {
        quality: {zoom: _shard_ms(measure, one, quality) for zoom, one in slides.items()}
        for quality in (0, 90)
    }
    tiles = _some_tiles(slides[1])
    kb = {
        quality: np.mean([len(images.encoded(one, quality)) for one in tiles]) / 1000
        for quality in sharded
    }
    return Costs(read, sharded[0], sharded[90], float(kb[0]), float(kb[90]))


def _some_tiles(slides: Slides) -> list[np.ndarray]:
    grid = TileGrid(TileConfig(patch_px=PATCH_PX))
    grid.open(SimpleNamespace(path=slides.paths[0], mpp_override=None, view=0))
    items: list[np.ndarray] = grid.read(3, 0, min(slides.grid[1], 30))
    grid.close()
    return items


def _shard_ms(measure: DataMeasure, slides: Slides, quality: int) -> float:
    """Measure CPU milliseconds of `shard` per base tile, over all scales of the slide."""
    root = measure.folder / f"shard-{slides.zoom}-{quality}"
    scales = [k for k in range(8) if 1 << k <= min(slides.grid)]
    config = TileConfig(patch_px=PATCH_PX, scales=scales, mask="all")
    means = EmbedConfig(encoder="toy", batch=BATCH)
    tile.run(str(root), slides.paths, config, ExecutorConfig())
    embed.run(str(root), config, means, ExecutorConfig())
    began = time.process_time()
    shard.run(str(root), config, means, ShardConfig(quality=quality), ExecutorConfig())
    return 1000 * (time.process_time() - began) / slides.tiles
