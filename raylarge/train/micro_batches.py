"""Splitting a worker's share of a step into micro batches, and summing their losses.

The loss of a step is the mean over the global batch, for any number of workers and micro
batches: sums are divided by the global batch once, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from raylarge.train.context import Context
from raylarge.train.task import Batch, Recipe


class MicroBatch(NamedTuple):
    """Samples of one pass; only the losses of the first `real` ones count."""

    batch: Batch
    real: int


class StepResult(NamedTuple):
    """The result of a step.

    Attributes:
        loss: mean over the global batch.
        applied: whether the weights changed.
        norm: of the gradient, before clipping; NaN where it is not known.
        losses: of this worker's samples, in their order, on the CPU.
    """

    loss: float
    applied: bool
    norm: float
    losses: Tensor


def passes(batch: int, world_size: int, micro_batch: int | None) -> int:
    """Return the number of micro batches of each worker in a step."""
    share = -(-batch // world_size)
    return 1 if micro_batch is None else -(-share // micro_batch)


def split(batch: Batch, count: int) -> list[MicroBatch]:
    """Split a share into `count` micro batches of similar size; an empty one repeats sample 0."""
    size = len(batch["sample"])
    edges = [size * i // count for i in range(count + 1)]
    return [
        MicroBatch({name: value[a : max(b, a + 1)] for name, value in batch.items()}, b - a)
        if a < size
        else MicroBatch({name: value[:1] for name, value in batch.items()}, 0)
        for a, b in pairwise(edges)
    ]


class LossAccumulator:
    """Collects the losses of a step over its micro batches."""

    def __init__(self, batch: int, most: float) -> None:
        """Take the global batch size, and the mean loss above which a step is skipped."""
        self._batch, self._most = batch, most
        self._losses: list[Tensor] = []
        self.loss, self.is_finite = math.nan, False

    def add(self, losses: Tensor, micro_batch: MicroBatch) -> Tensor:
        """Add the losses of a micro batch; return their sum."""
        losses = losses.float()[: micro_batch.real]
        self._losses.append(losses.detach())
        return losses.sum()

    def check(self, context: Context) -> bool:
        """Return whether the loss over all workers allows the step; call after the last `add`."""
        total = torch.cat(self._losses).double().sum()
        self.loss = context.all_reduce_sum([float(total)])[0] / self._batch
        self.is_finite = math.isfinite(self.loss) and self.loss <= self._most
        return self.is_finite

    def step(self, applied: bool, norm: float) -> StepResult:
        """Return the result of the step."""
        return StepResult(self.loss, applied, norm, torch.cat(self._losses).cpu())


def nan_loss(loss: Tensor) -> Tensor:
    """Return a loss whose gradient is NaN, so that no engine applies it on any worker."""
    return loss * float("nan")


def to(batch: Batch, device: torch.device, recipe: Recipe) -> Batch:
    """Copy a batch to a device, images and latents in the recipe's memory format."""
    moved = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    if not recipe.channels_last:
        return moved
    return {
        name: value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value
        for name, value in moved.items()
    }


def joined(batches: Sequence[Batch]) -> Batch:
    """Concatenate batches."""
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
