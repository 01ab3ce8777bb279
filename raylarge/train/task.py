"""The nouns of training: a recipe, what data tell a task, and what source and task are to the loop.

A task owns a network whose loss is a pure function of the batch. All that is random about a sample
(noise, timestep, dropout, flips) is drawn by `TrainTask.draw` with `raylarge.diffusion.noise` at
the address (seed, batch["sample"]), the sample's global index: rank, world size and the split into
micro-batches change nothing (resume and Ray equivalence).

Every raylarge/train/tasks/<model>.py has a config, `source(config, run, split)` and
`build(config, run, facts)`; `registry.py` lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import UInt8
from numpy import ndarray
from torch import Tensor, nn

from raylarge import storage

Batch = dict[str, Tensor]
"""Columns of samples, the first axis theirs; always `sample`, the global indices (int64)."""


@dataclass(frozen=True)
class Recipe:
    """How any network is trained: how long, how fast, in which precision."""

    steps: int = 1000  # optimiser steps
    minutes: float | None = None  # of training, all resumptions together; None: no limit
    batch: int = 16  # samples of one step over all workers
    micro_batch: int | None = None  # most samples of a worker in one pass; None: its whole share
    lr: float = 1e-4  # learning rate after the warm-up
    warmup: int = 100  # steps
    schedule: str = "constant"  # after the warm-up: constant, or cosine down to 0 at the end
    optimizer: str = "adamw"  # or adamw8bit (bitsandbytes, on a GPU, not under DeepSpeed)
    betas: tuple[float, float] = (0.9, 0.999)  # of Adam
    weight_decay: float = 0.01  # of AdamW
    clip: float = 1.0  # largest norm of the gradient; 0: no limit
    precision: str = "fp32"  # or bf16: autocast, weights and optimiser stay fp32
    zero: int = 1  # ZeRO stage 0-3 under DeepSpeed
    offload: bool = False  # the optimiser's states to the host's memory (ZeRO 1-3)
    checkpointing: bool = False  # compute activations again instead of keeping them
    channels_last: bool = False  # the layout that half-precision convolutions want
    seed: int = 0  # of weights, order of samples and noise
    scale_weights: tuple[float, ...] = ()  # one per scale of the table; empty: all alike
    super_block: int = 16  # row groups among which samples are shuffled
    checkpoint_every: int = 200  # steps
    checkpoint_minutes: float = 10.0  # and no later than this after the one before
    keep: int = 2  # newest checkpoints kept, beside the best
    result: str = "last"  # or best: the checkpoint, by held-out loss, that the bundle is made of
    validate: int = 64  # held-out samples whose loss each checkpoint tells; 0: none
    log_every: int = 10  # steps
    sheet_every: int = 0  # steps between sheets of samples; 0: none but the last
    workers: int = 0  # 0: the local twin, in this process; n: Ray Train
    strategy: str = "deepspeed"  # among workers: deepspeed or torch (DDP); the twin is torch
    spike: float = 10.0  # times the running loss that count as a spike, which is skipped; 0: none
    patience: int = 10  # steps skipped running before giving up

    @property
    def by_deepspeed(self) -> bool:
        """Whether DeepSpeed does the work."""
        return self.workers > 0 and self.strategy == "deepspeed"


@dataclass(frozen=True)
class Run:
    """One training, with its paths: which model learns from which data, into which bundle.

    Attributes:
        recipe: how it is trained.
        data: folder of the tables.
        out: folder of the bundle.
        model: one of `registry.TASKS`.
        name: of what is trained, where a model has several: `vae_small`, `mil-0`.
        config: the model's own.
    """

    recipe: Recipe
    data: str = ""
    out: str = ""
    model: str = ""
    name: str = ""
    config: Any = None

    @property
    def folder(self) -> str:
        """Where its checkpoints and its history are."""
        return storage.join(self.out, ".train", self.name or self.model)


@dataclass(frozen=True)
class DataFacts:
    """What the data tell a task before its network is built."""

    channels: int  # of one embedding; 0 where there are none
    counts: dict[int, int]  # training rows by scale k
    image: tuple[int, int, int]  # (3, P, P)
    latent: tuple[int, int, int] | None  # (c, h, w), where the table holds latents
    base_mpp: float | None  # micrometres per pixel of scale 0, where the data know them
    encoder: dict[str, Any]  # that made the embeddings: its card (`models/ssl_cards.py`)
    vector: int = 0  # width of the vectors beside the rows; 0 where there are none
    classes: tuple[str, ...] = ()  # of a label, in the order of their indices

    @property
    def scales(self) -> tuple[int, ...]:
        """The scales k with rows, the base first."""
        return tuple(sorted(self.counts))


@runtime_checkable
class SampleSource(Protocol):
    """Where samples come from: which sample is which row is a pure function."""

    digest: str  # of the rows; a run is only ever gone on with on the same
    facts: DataFacts

    def batch(self, samples: Sequence[int]) -> Batch:
        """The rows that global sample indices stand for, on the CPU."""
        ...


@runtime_checkable
class TrainTask(Protocol):
    """A network to train and the parts of the bundle it becomes."""

    network: nn.Module  # everything trainable; network(batch) -> loss per sample, float32 [b]
    averaged: nn.Module | None  # the part of it whose exponential moving average is kept

    def draw(self, batch: Batch) -> Batch:
        """The batch with all that is random about its samples, drawn on the CPU, ahead of time.

        `t` (int64 timesteps), where there is one, is also what the loss is told apart by.
        """
        ...

    def sheet(self, batch: Batch) -> UInt8[ndarray, "H W 3"] | None:
        """A picture of what the network makes of some held-out samples, beside references.

        Called now and then, with averaged weights in place, in evaluation mode, on one rank.
        """
        ...

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


BuildTask = Callable[[Any, DataFacts], TrainTask]
"""(`raylarge.train.config.Train`, facts of the data) -> the task, its weights drawn."""
