"""Benchmark of sampling: against the published loops, by stride, memory, conditions.

python -m benchmarks.sample [quick=true] [only=speed,strides] [bundle=DIR data=DIR] [out=PAGE.md]

Networks are tiny with random weights unless `bundle` names others, so seconds measure the loops
around them. A full run writes results/sample_<cores>cores_<yyyymm>.md; quick runs write only to
out=.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import bundles, memory, page, quality
from benchmarks.baseline import Average, Published
from benchmarks.page import Section
from raylarge import order as orders
from raylarge import report
from raylarge.config import parse
from raylarge.errors import UserError
from raylarge.geometry import windows
from raylarge.images import to_float, to_uint8
from raylarge.metrics.lines import window_lines
from raylarge.metrics.seams import seam_ratio
from raylarge.models.bundle import Bundle, load
from raylarge.order import Condition, Order
from raylarge.sampling import joint
from raylarge.sampling.cost import count_calls, passes
from raylarge.sampling.plan import run
from raylarge.sampling.tasks import DenoiseWindows, Task
from raylarge.workers.worker import Worker

AGREE = 1e-5
"""Tolerance of latents in float64; frames of the guide are float32."""
STRIDE_GOAL = 0.1
"""Tolerance of the cost per window between strides."""


@dataclass(frozen=True)
class SampleBench:
    """Sections and sizes of the benchmark.

    Attributes:
        only: of speed, strides, memory, conditions, constraints and trading.
        side: patches along the side of the canvas of `speed`.
        pairs: how often speed and strides are measured.
        steps: of the sampler, in speed; strides and conditions take twice as many.
        shares: strides, as windows per patch side: 16 is a stride of 4 of 64 latent cells.
        sizes: of `memory`; the last is compared with the first, between them a wide one.
        bundle: trained models for strides, conditions, constraints and trading.
        data: the folder that they were trained on, for the last three.
        patches: side of the pictures that are judged, in patches.
        seeds: how many pictures are judged of each way.
        out: the page to write.
    """

    quick: bool = False
    only: str = "speed,strides,memory"
    side: int = 16
    pairs: int = 3
    steps: int = 1
    shares: str = "16,8,4,2,1"
    sizes: str = "4096,4096x16384,16384"
    bundle: str = ""
    data: str = ""
    patches: int = 4
    seeds: int = 6
    out: str = ""


PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "seeds": 1,
        "patches": 2,
        "side": 4,
        "pairs": 1,
        "steps": 1,
        "shares": "4,2,1",
        "sizes": "512,1024",
    }
}


def main(words: list[str]) -> None:
    """Measure, print and write."""
    torch.set_num_threads(1)
    quick = "quick=true" in words
    config = parse(SampleBench, ["preset=quick", *words] if quick else words, PRESETS)
    parts = config.only.split(",")
    if unknown := set(parts) - PARTS.keys():
        raise UserError(f"only={','.join(sorted(unknown))} is not of {', '.join(PARTS)}.")
    sections = []
    for part in parts:
        sections.append(PARTS[part](config))
        page.show(sections[-1])
    cores = f"{os.cpu_count()}cores"
    out = config.out or ("" if quick else page.place("sample", cores))
    if out:
        title = f"Sampling on {os.cpu_count()} cores"
        page.write(out, title, page.command("benchmarks.sample"), sections)


def speed(config: SampleBench) -> Section:
    """Compare with the published loops: the same image, interleaved."""
    difference = disagreement()
    bundle = bundles.tiny()
    order, grid = conditioned(bundle, config.side, config.steps)
    ways = {
        "ours, batches of 16": lambda: image_of(bundle, order),
        "published loop, one window per call": lambda: published(bundle, order, grid, 1),
        "published loop, 16 windows per call": lambda: published(bundle, order, grid, 16),
    }
    interleaved(ways, 1 if config.quick else 0)  # tiny runs would measure the first call
    spent = interleaved(ways, config.pairs)
    ours, *_ = spent.values()
    rows, short = [], []
    for name, seconds in spent.items():
        ratio = [theirs / own for theirs, own in zip(seconds, ours, strict=True)]
        rows.append(
            [name, _median(seconds), _median(ratio), f"{min(ratio):.2f} to {max(ratio):.2f}"]
        )
        if statistics.median(ratio) < 1:
            short.append(f"Speed: `{name}` is no slower than ours ({_median(ratio)} times).")
    return Section(
        f"Joint image of {config.side} x {config.side} windows, S = {config.steps}, K = 1",
        ["way", "seconds, median", "times ours, median", "range"],
        rows,
        [
            f"{config.pairs} interleaved runs in one process, the same weights, decoding "
            f"included. The loop swaps averaged parameters on every call; conditional and "
            f"unconditional are separate calls; it decodes window by window. Latents of both in "
            f"float64 differ by at most {difference:.1e} (asserted: {AGREE:g}), images by one "
            f"grey level. Finite differences in both. S is small because time is; more steps weigh "
            f"the decode less. With networks this small the ratio is "
            f"that of calls and copies, not of arithmetic."
        ],
        short,
    )


def disagreement() -> float:
    """Return the largest difference from the published loop's latents; at most rounding."""
    bundle = bundles.in_precision(bundles.tiny(), torch.float64)
    order, grid = conditioned(bundle, 2, 2)
    loop = Published(bundle, order, Average(bundle.unet))
    theirs = loop.latents(grid.double())
    latents: dict[tuple[int, int], Tensor] = {}

    def answer(task: Task, **inputs: Any) -> Any:
        reply = Worker(bundle).answer(task, **inputs)
        if isinstance(task, DenoiseWindows):
            latents.update(zip(task.windows, reply, strict=True))
        return reply

    image = run(joint.plan(order, bundle.patch), answer).image
    ours = torch.stack([latents[place] for place in windows((2, 2), 1, 1)])
    difference = float((ours - theirs).abs().max())
    levels = to_uint8(loop.image(theirs, 2).float()).astype(int) - image
    if difference > AGREE or abs(levels).max() > 1:
        raise AssertionError(f"latents differ by {difference}, pixels by {abs(levels).max()}")
    return difference


def conditioned(bundle: Bundle, side: int, steps: int) -> tuple[Order, Tensor]:
    """Return an order of side x side patches, and its random embeddings [C, side, side]."""
    grid = torch.randn(side, side, bundles.WIDTH, generator=torch.Generator().manual_seed(0))
    condition = Condition.of(grid.numpy())
    sampler = {"steps": steps, "derivative": "difference"}
    order = orders.parse({"size": side * bundle.patch.side_px, "sampler": sampler})
    order = order.replace(condition=condition)
    return order, torch.from_numpy(condition.grid()).movedim(-1, 0)


def image_of(bundle: Bundle, order: Order) -> Any:
    """Return our result."""
    result = run(joint.plan(order, bundle.patch), Worker(bundle).answer)
    return result, result.image


def published(bundle: Bundle, order: Order, grid: Tensor, together: int) -> Tensor:
    """Return the image of the published loop."""
    loop = Published(bundle, order, Average(bundle.unet), together)
    return loop.image(loop.latents(grid), grid.shape[1])


def strides(config: SampleBench) -> Section:
    """Time and seams of overlapping windows by stride (Table 8 of Graikos et al.)."""
    bundle = load(config.bundle) if config.bundle else bundles.tiny()
    side, steps = bundle.patch.side_lat, 2 * config.steps
    base = canvas_order(bundle, steps)
    each = {
        share: base.replace(strided=base.strided.replace(share=share))
        for share in map(int, config.shares.split(","))
    }
    images: dict[int, Tensor] = {}

    def make(share: int) -> None:
        images[share] = to_float(image_of(bundle, each[share])[1])

    spent = interleaved({share: (lambda s=share: make(s)) for share in each}, config.pairs)
    decoding = decoding_seconds(bundle, base, config.pairs)
    rows, rates = [], []
    for share, seconds in spent.items():
        order, sampling = each[share], statistics.median(seconds) - decoding
        length = order.size[0] // bundle.patch.factor
        count = len(windows((length, length), side, side // share))
        computed = count_calls(joint.plan(order, bundle.patch), order, bundle.patch).unet
        computed //= steps * passes(order, order.condition.kind)
        rates.append(1000 * sampling / steps / computed)
        seam = seam_ratio(images[share], bundle.patch.side_px // share)
        edge = seam_ratio(images[share], bundle.patch.side_px)
        lines = window_lines(images[share], bundle.patch.side_px)
        rows.append(
            [64 // share, count, computed, f"{sampling:.2f}", f"{rates[-1]:.2f}",
             f"{1000 * sampling / steps / count:.2f}", f"{seam:.3f}", f"{edge:.3f}", f"{lines:.2f}"]
        )  # fmt: skip
    return _strides_section(config, rows, rates, steps, decoding)


def _strides_section(
    config: SampleBench, rows: list[list[Any]], rates: list[float], steps: int, decoding: float
) -> Section:
    """Return the table, and whether the cost per window is constant."""
    middle = statistics.median(rates)
    overlapping = [rate for row, rate in zip(rows, rates, strict=True) if row[0] < 64]
    spread = max(abs(rate / middle - 1) for rate in overlapping)
    short = []
    if spread > STRIDE_GOAL:
        short.append(
            f"Strides: milliseconds per computed window and step stray by {spread:.0%} from their "
            f"median, {middle:.2f}; the aim is {STRIDE_GOAL:.0%}."
        )
    if not config.bundle:
        short.append("Strides: with random weights no stride shows a seam; quality needs a bundle.")
    network = "trained networks" if config.bundle else "random weights"
    return Section(
        f"Strided sampling by stride, 4 x 4 patches, S = {steps}, {network}",
        ["stride of 64", "windows", "computed", "seconds", "ms per computed window-step",
         "ms per window-step", "seam ratio at the stride", "at patch borders", "window lines"],
        rows,
        [
            f"Medians of {config.pairs} interleaved runs, the decode's {decoding:.2f} s taken "
            f"off. `computed` counts the windows that fill up batches of 16. Largest deviation "
            f"from the median cost per computed window: {spread:.0%}. A stride of 64 is no "
            f"overlap, for comparison. The published strides are of 64 latent cells; with "
            f"smaller patches these are the same fractions."
        ],
        short,
    )  # fmt: skip


def canvas_order(bundle: Bundle, steps: int) -> Order:
    """Return an order for strided sampling of 4 x 4 patches."""
    values = {"size": 4 * bundle.patch.side_px, "algorithm": "strided", "sampler": {"steps": steps}}
    order = orders.parse(values)
    if bundle.summarizer.config.channels != bundles.WIDTH:
        return order
    return order.replace(condition=conditioned(bundle, 4, steps)[0].condition)


def decoding_seconds(bundle: Bundle, order: Order, pairs: int) -> float:
    """Measure the final decode, which all strides share."""
    spent, worker = [], Worker(bundle)
    once = order.replace(strided=order.strided.replace(share=1))
    for _ in range(pairs):
        here = 0.0

        def answer(task: Task, **inputs: Any) -> Any:
            nonlocal here
            began = time.perf_counter()
            reply = worker.answer(task, **inputs)
            here += (type(task).__name__ == "DecodeBand") * (time.perf_counter() - began)
            return reply

        run(joint.plan(once, bundle.patch), answer)
        spent.append(here)
    return statistics.median(spent)


def judged(section: Callable[[quality.ImageJudge], Section]) -> Callable[[SampleBench], Section]:
    """Wrap a section that compares images of a trained bundle."""

    def section_of(config: SampleBench) -> Section:
        if not (config.bundle and config.data):
            raise UserError(
                "pictures are judged of a trained bundle: give bundle=DIR data=DIR, such as "
                "out/demo/bundle and out/demo/data after make demo."
            )
        return section(
            quality.ImageJudge.open(config.bundle, config.data, config.patches, config.seeds)
        )

    return section_of


def interleaved(ways: dict[Any, Callable[[], Any]], pairs: int) -> dict[Any, list[float]]:
    """Time all ways alternately, `pairs` times."""
    spent: dict[Any, list[float]] = {name: [] for name in ways}
    for _ in range(pairs):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            spent[name].append(time.perf_counter() - began)
    return spent


def _median(values: list[float]) -> str:
    return f"{statistics.median(values):.2f}"


PARTS: dict[str, Callable[[SampleBench], Section]] = {
    "speed": speed,
    "strides": strides,
    "memory": lambda config: memory.section(config.sizes.split(",")),
    "conditions": judged(quality.conditions),
    "constraints": judged(quality.constraints),
    "trading": judged(quality.trading),
}

if __name__ == "__main__":
    report.entry(main)
