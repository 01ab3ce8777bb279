"""A training on paper: parameters, memory of a card, FLOPs, days, dollars. `plan=true` shows it.

    config, facts of the data, task -> TrainEstimate -format_plan-> text

Nothing is started and nothing allocated: networks come from the meta device (`on_meta`), passes
are of fake tensors (`memory.py`), states by ZeRO stage (`held.py`). What of a card's peak is
reached, and what a card costs, is assumed: `card.utilisation=0.2 card.card_gib=24`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from raylarge import report
from raylarge.config import require
from raylarge.models.conditioner import SIDE, SLOTS
from raylarge.train.estimate.memory import Activations, activations
from raylarge.train.estimate.model_states import (
    ModelStates,
    PartSize,
    WorkerGroup,
    fixed_bytes,
    parts,
    states,
)
from raylarge.train.micro_batches import passes
from raylarge.train.task import Batch, DataFacts, Recipe, TrainTask

GIB = 1 << 30
_LEAST, _MOST = 1e-6, 1e9  # of what a card can be said to have
LATE = 1 << 40
"""Index of an example's first sample: what joins a training only later on counts, too."""

LEFT_OUT = (
    "Left out: workspaces of cuDNN, gaps of the allocator and what CUDA and NCCL keep (the share "
    "of the card that stays free is for them), time for gradients on the wire, for checkpoints "
    "and for data that come too slowly. Attention is taken as fused."
)


BRCA = DataFacts(
    channels=1024,
    counts=dict(enumerate((12509760, 3036288, 752000, 187280, 57090, 20679, 7923, 2489))),
    image=(3, 256, 256),
    latent=(3, 64, 64),
    base_mpp=0.5,
    encoder={"name": "uni"},
)
"""The published training set of ZoomLDM (its code, `brca.py`)."""
ASSUMED = "ZoomLDM's TCGA-BRCA, 256 px patches at 8 scales under UNI, latents of VQ-f4"


@dataclass(frozen=True)
class PlanConfig:
    """The card that a training is planned for: its data sheet, and what is assumed of it."""

    card_tflops: float = 989.4  # dense bf16: H100 SXM, H200
    card_tflops_fp32: float = 66.9  # of the same card without TF32
    card_gib: float = 80.0  # memory of one card
    utilisation: float = 0.35  # share of the peak that training reaches
    free: float = 0.1  # share of the memory that stays free
    dollars_per_hour: float = 2.5  # of one card

    def check(self) -> None:
        """Refuse values that make no sense.

        Raises:
            UserError: naming the key, its value and what it may be.
        """
        for key in ("card_tflops", "card_tflops_fp32", "card_gib", "utilisation"):
            value = getattr(self, key)
            most = 1 if key == "utilisation" else _MOST
            wish = f"above 0: from {_LEAST:g} to {most:g}"
            require((f"card.{key}", value, _LEAST <= value <= most, wish))
        free, dollars = self.free, self.dollars_per_hour
        require(
            ("card.free", free, 0 <= free < 1, "0 or more and below 1"),
            ("card.dollars_per_hour", dollars, 0 <= dollars <= _MOST, f"from 0 to {_MOST:g}"),
        )


@dataclass(frozen=True)
class TrainEstimate:
    """What a training takes.

    Attributes:
        parts: of the network.
        states: what a card holds all the time.
        activations: what a pass adds to it.
        workers: cards.
        batch: samples of a step, over all of them.
        passes: of each card in a step.
        steps: of the training.
        minutes: after which it ends before that; None: no limit.
        rows: training rows that there are.
        half: bfloat16 under autocast.
        card: what was assumed.
    """

    parts: tuple[PartSize, ...]
    states: ModelStates
    activations: Activations
    workers: int
    batch: int
    passes: int
    steps: int
    minutes: float | None
    rows: int
    half: bool
    card: PlanConfig

    @property
    def micro_batch(self) -> int:
        """Samples of a card's largest pass."""
        share = math.ceil(self.batch / self.workers)
        return math.ceil(share / self.passes)

    @property
    def memory(self) -> float:
        """Bytes of a card at the worst moment."""
        return self.states.total + self.activations.peak(self.micro_batch)

    @property
    def usable(self) -> float:
        """Bytes of a card that may be taken."""
        return self.card.card_gib * GIB * (1 - self.card.free)

    @property
    def largest(self) -> int:
        """Samples of the largest pass that a card holds; 0: not even one."""
        return self.activations.most(self.usable - self.states.total)

    @property
    def fits(self) -> bool:
        """Whether a card holds the passes that are meant."""
        return self.micro_batch <= self.largest

    @property
    def samples_per_s(self) -> float:
        """Of all cards together, at the utilisation that was assumed."""
        tflops = self.card.card_tflops if self.half else self.card.card_tflops_fp32
        reached = 1e12 * tflops * self.card.utilisation
        return self.workers * reached / self.activations.flops

    @property
    def seconds(self) -> float:
        """From the first step to the last."""
        seconds = self.steps * self.batch / self.samples_per_s
        return seconds if self.minutes is None else min(seconds, self.minutes * 60)

    @property
    def epochs(self) -> float:
        """How often a training row is seen, on average over all scales."""
        return self.seconds * self.samples_per_s / self.rows

    @property
    def days(self) -> float:
        """From the first step to the last."""
        return self.seconds / 86400

    @property
    def dollars(self) -> float:
        """For all cards."""
        return self.seconds / 3600 * self.workers * self.card.dollars_per_hour


def on_meta(build: Callable[..., TrainTask], *arguments: Any) -> TrainTask:
    """A task whose new networks have shapes and no weights; what it loads is there as ever."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*which is a no-op")  # weights into no weights
        task: TrainTask = build(*arguments)
    return task


def example(facts: DataFacts, size: int) -> Batch:
    """Samples as a source gives them, all zeros, of the coarsest scale.

    Returns:
        On the CPU: sample and scale; image; latent, grid with its rows and columns, vector and
        label where the data have them.
    """
    k = max(facts.scales)
    side = min(1 << k, SIDE)
    batch = {
        "sample": torch.arange(LATE, LATE + size),
        "scale": torch.full((size,), k),
        "image": torch.zeros(size, *facts.image),
    }
    if facts.latent is not None:
        batch["latent"] = torch.zeros(size, *facts.latent)
    if facts.channels:
        batch["grid"] = torch.zeros(size, SLOTS, facts.channels)
        batch["grid_rows"] = batch["grid_columns"] = torch.full((size,), side)
    if facts.vector:
        batch["vector"] = torch.zeros(size, facts.vector)
    if facts.classes:
        batch["label"] = torch.zeros(size, dtype=torch.int64)
    return batch


def plan(
    recipe: Recipe,
    workers: WorkerGroup,
    card: PlanConfig,
    facts: DataFacts,
    task: TrainTask,
    batch: Batch | None = None,
) -> TrainEstimate:
    """What a training takes, by the shapes of its networks alone.

    Args:
        recipe: of the training.
        workers: which train.
        card: the GPU of each of them.
        facts: of the data.
        task: its networks on any device, none of which are computed with.
        batch: some samples of the source; left out, `example` stands for them.

    Raises:
        UserError: a card that cannot be, or a network whose forward pass looks at values.
    """
    card.check()
    drawn = task.draw(example(facts, 2) if batch is None else _late(batch))
    half = recipe.precision == "bf16"
    grown = activations(task.network, drawn, half, recipe.checkpointing)
    return of(recipe, workers, card, facts, task, grown)


def of(
    recipe: Recipe,
    workers: WorkerGroup,
    card: PlanConfig,
    facts: DataFacts,
    task: TrainTask,
    grown: Activations,
) -> TrainEstimate:
    """The plan of a training whose passes are known; arguments as of `plan`."""
    sizes, count = tuple(parts(task)), max(1, workers.count)
    return TrainEstimate(
        parts=sizes,
        states=states(sizes, fixed_bytes(task.network), recipe, workers),
        activations=grown,
        workers=count,
        batch=recipe.batch,
        passes=passes(recipe.batch, count, recipe.micro_batch),
        steps=recipe.steps,
        minutes=recipe.minutes,
        rows=sum(facts.counts.values()),
        half=recipe.precision == "bf16",
        card=card,
    )


def _late(batch: Batch) -> Batch:
    return {**batch, "sample": batch["sample"] + LATE}


def format_plan(needs: TrainEstimate) -> str:
    """Return a plan as text."""
    parts = report.table(
        ["part", "trained", "fixed", "averaged"],
        [
            [part.name, *(f"{count:,}" for count in (part.trained, part.fixed, part.averaged))]
            for part in needs.parts
        ],
    )
    held = report.table(["memory of one card", "GiB"], _memory_rows(needs))
    work = report.table(["the training", ""], _work_rows(needs))
    return "\n\n".join([parts, held, work, verdict(needs), LEFT_OUT])


def _memory_rows(needs: TrainEstimate) -> list[list[str]]:
    grown, samples = needs.activations, needs.micro_batch
    saved = grown.saved.sample * samples
    brief = grown.peak(samples) - grown.saved.at(samples)
    least = needs.memory / 1000
    rows = [(name, size) for name, size in needs.states.card.items() if size > least]
    rows += [("weights in half precision", grown.saved.fixed)] if grown.saved.fixed > 0 else []
    rows += [
        (f"activations of {samples} samples ({grown.saved.sample / 2**20:.1f} MiB each)", saved),
        ("more at the worst moment", brief),
        ("in all", needs.memory),
        (f"card, {needs.card.free:.0%} of which stay free", needs.usable),
    ]
    rows += [("host, per worker: optimiser", needs.states.host)] if needs.states.host else []
    return [[name, f"{size / GIB:.2f}"] for name, size in rows]


def _work_rows(needs: TrainEstimate) -> list[list[str]]:
    grown, card = needs.activations, needs.card
    share = f"{needs.workers} x {needs.passes} x {needs.micro_batch} (cards, passes, samples)"
    return [
        ["a step", f"{needs.batch} samples = {share}"],
        ["FLOPs of a sample", f"{grown.flops / 1e9:.1f} G, {grown.forward / 1e9:.1f} G forward"],
        ["FLOPs of a step", f"{_figure(grown.flops * needs.batch / 1e12)} T"],
        ["samples/s", f"{_figure(needs.samples_per_s)}, at {card.utilisation:.0%} of the peak"],
        ["steps", f"{needs.steps:,}, {_figure(needs.epochs)} epochs"],
        [
            "days",
            f"{needs.days:.2g}, {_figure(needs.days * 24 * needs.workers)} hours of a card",
        ],
        ["dollars", f"{needs.dollars:,.2f}, at {card.dollars_per_hour:g} an hour"],
    ]


def _figure(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def verdict(needs: TrainEstimate) -> str:
    """Whether it fits, in a sentence, with the largest pass that does."""
    card, needed = f"{needs.card.card_gib:g} GiB", f"{needs.memory / GIB:.1f} GiB"
    if needs.fits:
        return (
            f"It fits: {needed} of a card of {card} with passes of {needs.micro_batch}; the "
            f"largest pass that fits has {needs.largest} samples."
        )
    if needs.largest:
        return (
            f"It does not fit: passes of {needs.micro_batch} take {needed} and a card has {card}; "
            f"micro_batch={needs.largest} is the largest that fits."
        )
    return (
        f"It does not fit: a card of {card} does not hold one sample beside what is there all "
        f"the time; try checkpointing=true, precision=bf16, a higher zero= with more workers, or "
        f"offload=true."
    )
