"""Sampling on a GPU with full-size networks of random weights; needs no Ray and no network.

python -m benchmarks.gpu [size=1024,4096] [steps=50] [batch=16] [shares=16,8,4,2]
    [derivative=jvp] [out=PAGE.md]        device=cpu tiny=true runs the same on tiny networks

Rates of the networks in bf16, channels-last, beside the card's measured rate of one large
matrix product; the joint image (paper recipe) and strided sampling, beside their floor: the
FLOPs at that rate. Writes results/gpu_<card>_<yyyymm>.md.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import bundles, page
from benchmarks.page import Section
from raylarge import order as orders
from raylarge import report
from raylarge.config import parse
from raylarge.diffusion.linearize import linearize
from raylarge.errors import UserError
from raylarge.models import cost
from raylarge.models.bundle import Bundle
from raylarge.order import Condition, Order
from raylarge.sampling import joint
from raylarge.sampling.cost import count_calls
from raylarge.sampling.plan import run
from raylarge.sampling.tasks import Task
from raylarge.workers.worker import Worker

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
LEVELS = ((384, 32), (576, 16), (960, 8))
"""Head width and side of the latent at each attention of the published U-Net (one head)."""


@dataclass(frozen=True)
class GpuBench:
    """Sizes of the benchmark.

    Attributes:
        size: sides of joint images in pixels.
        steps: of the joint image and of strided sampling.
        batch: windows per request.
        shares: strides, as windows per patch side, of a canvas of 4 x 4 patches.
        strided_steps: of strided sampling, whose cost per step is constant.
        repeats: calls per rate.
    """

    size: str = "1024,4096"
    steps: int = 50
    batch: int = 16
    shares: str = "16,8,4,2"
    strided_steps: int = 5
    derivative: str = "jvp"
    repeats: int = 10
    device: str = "cuda"
    tiny: bool = False
    out: str = ""


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"size": "128", "steps": 1, "batch": 2, "shares": "2", "strided_steps": 1, "repeats": 1}
}


class Card:
    """A device: name, timer, peak memory and measured rate."""

    def __init__(self, device: str, tiny: bool) -> None:
        self.device, self.cuda = device, device.startswith("cuda")
        self.name = torch.cuda.get_device_name(device) if self.cuda else "cpu"
        self.rate = self._matmul(256 if tiny else 8192)

    def seconds(self, call: Callable[[], Any], repeats: int = 1) -> float:
        """Return the median seconds of a call, after one that warms up."""
        call()
        spent = []
        for _ in range(repeats):
            self._wait()
            began = time.perf_counter()
            call()
            self._wait()
            spent.append(time.perf_counter() - began)
        return statistics.median(spent)

    def once(self, call: Callable[[], Any]) -> tuple[float, float]:
        """Return the seconds of one call, and its peak memory in GiB."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        began = time.perf_counter()
        call()
        self._wait()
        spent = time.perf_counter() - began
        if self.cuda:
            return spent, torch.cuda.max_memory_allocated(self.device) / 2**30
        return spent, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def _matmul(self, side: int) -> float:
        """Measure the FLOP/s of a bf16 matrix product."""
        a = torch.randn(side, side, device=self.device, dtype=torch.bfloat16)
        return 2 * side**3 / self.seconds(lambda: a @ a, 20)


def main(words: list[str]) -> None:
    """Measure, print and write."""
    tiny = "tiny=true" in words
    config = parse(GpuBench, ["preset=tiny", *words] if tiny else words, PRESETS)
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("there is no CUDA device here; device=cpu tiny=true tries the code out.")
    card = Card(config.device, config.tiny)
    bundle, costs = networks(config)
    sections = [rates(config, card, bundle, costs), attention(config, card)]
    page.show(sections[0])
    page.show(sections[1])
    for make in (joint_images, strided_images):
        sections.append(make(config, card, bundle, costs))
        page.show(sections[-1])
    if "ray" in sys.modules:
        raise AssertionError("Ray was imported")
    name = card.name.lower().replace(" ", "-")
    out = config.out or ("" if tiny else page.place("gpu", name))
    if out:
        command = page.command("benchmarks.gpu")
        page.write(out, f"Sampling on {card.name}", command, sections)


def networks(config: GpuBench) -> tuple[Bundle, cost.CallFlops]:
    """Return the bundle in bf16, channels-last, and the FLOPs of its networks."""
    bundle = bundles.tiny() if config.tiny else bundles.full(config.device)
    context = bundle.summarizer.null(1).shape[1:]
    costs = cost.network_flops(bundle.unet, bundle.vae, bundle.patch, (context[0], context[1]))
    return bundles.in_precision(bundle, torch.bfloat16), costs


@torch.no_grad()
def rates(config: GpuBench, card: Card, bundle: Bundle, costs: cost.CallFlops) -> Section:
    """Measure each network by batch size: milliseconds and TFLOP/s."""
    rows, more = [], () if config.tiny else (2 * config.batch, 4 * config.batch)
    for batch in (1, config.batch, *more):
        for name, (call, flops) in _calls(config, bundle, costs, batch).items():
            try:
                seconds = card.seconds(call, config.repeats) / batch
            except torch.OutOfMemoryError:
                rows.append([name, str(batch), "out of memory", "–", "–"])
                continue
            rate = flops / seconds
            cells = [f"{1000 * seconds:.2f}", f"{rate / 1e12:.4g}", f"{rate / card.rate:.0%}"]
            rows.append([name, str(batch), *cells])
    return Section(
        "Networks in bf16, channels-last",
        ["network", "batch", "ms per window", "TFLOP/s", "of the matrix product"],
        rows,
        [
            f"Matrix product on {card.name}: {card.rate / 1e12:.4g} TFLOP/s in bf16. "
            f"Medians of {config.repeats} calls. Forward mode is the value and a "
            f"derivative, two passes; attention of the latter is written out."
        ],
    )


def _calls(
    config: GpuBench, bundle: Bundle, costs: cost.CallFlops, batch: int
) -> dict[str, tuple[Callable[[], Any], float]]:
    """Return the calls of the networks in sampling, with their FLOPs per window."""
    patch, like = bundle.patch, {"device": config.device, "dtype": torch.bfloat16}
    z = torch.randn(batch, *patch.latent, **like)
    image = torch.randn(batch, 3, patch.side_px, patch.side_px, **like)
    unet = partial(_predict, bundle.unet, 500, bundle.summarizer.null(batch))
    encode = bundle.vae.encode
    return {
        "U-Net": (partial(unet, z), costs.unet),
        "U-Net, forward mode": (partial(_forward_mode, unet, z), 2 * costs.unet),
        "decoder": (partial(bundle.vae.decode, z), costs.decode),
        "encoder": (partial(encode, image), costs.encode),
        "encoder, forward mode": (partial(_forward_mode, encode, image), 2 * costs.encode),
    }


def attention(config: GpuBench, card: Card) -> Section:
    """Time the attention kernels that support the head widths of the published U-Net."""
    rows = []
    batch = 2 * config.batch
    for width, side in LEVELS[2:] if config.tiny else LEVELS:
        q = torch.randn(batch, 1, side**2, width, device=config.device, dtype=torch.bfloat16)
        call = partial(torch.nn.functional.scaled_dot_product_attention, q, q, q)
        chosen = card.seconds(call, config.repeats)
        cells = [_kernel(card, call, backend, config.repeats) for backend in BACKENDS.values()]
        rows.append([width, side**2, f"{1000 * chosen:.3f}", *cells])
    return Section(
        "Self-attention by kernel, milliseconds",
        ["head width", "tokens", "as chosen", *BACKENDS],
        rows,
        [f"Batch {batch}, one head; – where the kernel refuses the width."],
    )


def joint_images(config: GpuBench, card: Card, bundle: Bundle, costs: cost.CallFlops) -> Section:
    """Time joint images by the paper's recipe."""
    rows = []
    for size in map(int, config.size.split(",")):
        order = _order(config, bundle, {"size": size, "sampler": _sampler(config)})
        rows.append([f"{size}²", *_carried_out(card, bundle, order, costs)])
    return Section(
        f"Joint images, recipe `paper` with S = {config.steps}, {config.derivative}",
        ["size", *COLUMNS],
        rows,
        [_NOTE.format(batch=config.batch)],
    )


def strided_images(config: GpuBench, card: Card, bundle: Bundle, costs: cost.CallFlops) -> Section:
    """Time strided sampling of a square canvas by stride."""
    rows, side = [], 2 if config.tiny else 4
    for share in map(int, config.shares.split(",")):
        values = {
            "size": side * bundle.patch.side_px,
            "algorithm": "strided",
            "strided": {"share": share},
            "sampler": {"steps": config.strided_steps},
        }
        order = _order(config, bundle, values)
        rows.append([64 // share, *_carried_out(card, bundle, order, costs)])
    return Section(
        f"Strided sampling of {side} x {side} patches, S = {config.strided_steps}",
        ["stride of 64", *COLUMNS],
        rows,
        [f"{_NOTE.format(batch=config.batch)} The published table takes 50 steps."],
    )


COLUMNS = ("seconds", "TFLOP/s", "floor, s", "times floor", "U-Net", "VAE", "draw", "peak, GiB")
_NOTE = (
    "Batches of {batch}, guidance 2 (two passes per estimate), blended decode included. The floor "
    "is all FLOPs at the measured rate of the matrix product; U-Net and VAE are shares of the "
    "FLOPs; draw is the share of the time that conditions took."
)


def _carried_out(card: Card, bundle: Bundle, order: Order, costs: cost.CallFlops) -> list[str]:
    """Carry out an order: seconds, rate, lower bound, shares and peak memory."""
    plan, phases = joint.plan(order, bundle.patch), {"EncodeContext": 0.0}
    worker = Worker(bundle)

    def answer(task: Task, **inputs: Any) -> Any:
        began = time.perf_counter()
        reply = worker.answer(task, **inputs)
        name = type(task).__name__
        phases[name] = phases.get(name, 0.0) + time.perf_counter() - began
        return reply

    seconds, peak = card.once(lambda: run(plan, answer))
    counts = count_calls(plan, order, bundle.patch)
    flops, floor = cost.total_flops(counts, costs), cost.total_flops(counts, costs) / card.rate
    share, context = counts.unet * costs.unet / flops, phases["EncodeContext"] / seconds
    return [
        f"{seconds:.2f}", f"{flops / seconds / 1e12:.2f}", f"{floor:.2f}", f"{seconds / floor:.2f}",
        f"{share:.0%}", f"{1 - share:.0%}", f"{context:.0%}", f"{peak:.2f}",
    ]  # fmt: skip


def _order(config: GpuBench, bundle: Bundle, values: dict[str, Any]) -> Order:
    """Return an order with random embeddings, one per patch, so that guidance needs two passes."""
    order = orders.parse({**values, "batch": config.batch})
    rows, columns = (length // bundle.patch.side_px for length in order.size)
    shape = (rows, columns, bundle.summarizer.config.channels)
    grid = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return order.replace(condition=Condition.of(grid.numpy()))


def _sampler(config: GpuBench) -> dict[str, Any]:
    return {"steps": config.steps, "derivative": config.derivative}


def _kernel(card: Card, call: Callable[[], Any], backend: SDPBackend, repeats: int) -> str:
    try:
        with warnings.catch_warnings(), sdpa_kernel(backend):
            warnings.simplefilter("ignore")  # each refusal is explained at length
            return f"{1000 * card.seconds(call, repeats):.3f}"
    except RuntimeError:
        return "–"


def _predict(network: Callable[..., Tensor], t: int, tokens: Tensor, z: Tensor) -> Tensor:
    return network(z, t, tokens)


def _forward_mode(f: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    _, along = linearize(f, at)
    return along(torch.ones_like(at))


if __name__ == "__main__":
    report.entry(main)
