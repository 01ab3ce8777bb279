"""The nouns of training: a recipe, what a table tells a task, and what a task is to the loop.

A task owns a network whose loss is a pure function of the batch. Whatever is random about a
sample (noise, timestep, dropout, flips) is drawn inside by `raylarge.diffusion.noise` at the
address (seed, batch["sample"]), the sample's global index: rank, world size and the split
into micro-batches change nothing (laws 6 and 7).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

Batch = dict[str, Tensor]
"""What `Ingest.batch` makes: sample, scale, image or latent, grid, grid_rows, grid_columns."""


@dataclass(frozen=True)
class Recipe:
    """How any network is trained: how long, how fast, in which precision."""

    steps: int = 1000
    minutes: float | None = None  # of training, all resumptions together; None: no limit
    batch: int = 16  # samples of one step over all workers
    accumulation: int = 1  # micro-batches of a worker in one step
    lr: float = 1e-4
    warmup: int = 100  # steps
    schedule: str = "constant"  # after the warm-up: constant, or cosine down to 0 at the end
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    clip: float = 1.0  # largest norm of the gradient; 0: no limit
    precision: str = "fp32"  # or bf16: autocast, weights and optimiser stay fp32
    zero: int = 1  # ZeRO stage 0-3 under DeepSpeed
    seed: int = 0
    scale_weights: tuple[float, ...] = ()  # one per scale of the table; empty: all alike
    checkpoint_every: int = 200  # steps
    keep: int = 2  # newest checkpoints kept
    log_every: int = 10  # steps
    patience: int = 10  # steps running without a finite gradient before giving up


@dataclass(frozen=True)
class Facts:
    """What a table tells a task before its network is built."""

    channels: int  # of one embedding
    counts: dict[int, int]  # training rows by scale k
    image: tuple[int, int, int]  # (3, P, P)
    latent: tuple[int, int, int] | None  # (c, h, w), where the table holds latents
    base_mpp: float | None  # micrometres per pixel of scale 0, where the data know them
    encoder: dict[str, Any]  # that made the embeddings: its card (`models/ssl_cards.py`)

    @property
    def scales(self) -> tuple[int, ...]:
        """The scales k with rows, the base first."""
        return tuple(sorted(self.counts))


@runtime_checkable
class Task(Protocol):
    """A network to train and the parts of the bundle it becomes."""

    network: nn.Module  # everything trainable; network(batch) -> loss per sample, float32 [b]
    averaged: nn.Module | None  # the part of it whose exponential moving average is kept

    def finish(
        self,
        bundle: str,
        averaged: dict[str, Tensor] | None,
        facts: dict[str, Any],
        batch: Batch,
    ) -> None:
        """Write the parts into the bundle; rank 0 only, `network` holding whole weights.

        Args:
            bundle: the bundle's folder.
            averaged: state dict of `averaged` with averaged parameters (float32, CPU).
            facts: steps, samples, seconds, loss and the config of this training.
            batch: at least 64 training samples, on the CPU, for statistics.
        """
        ...


Build = Callable[[Any, Facts], Task]
"""(config: raylarge.train.launch.Train, facts of the table) -> the task, its weights drawn."""
