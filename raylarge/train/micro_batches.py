"""One step's samples on one worker: cut into passes, their losses told and added up.

The loss of a step is the mean over the global batch, whatever share of it a worker has and in
how many passes it goes: sums are divided by the batch once, at the end.
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
    """Samples of one pass; of those after the first `real` ones the loss does not count."""

    batch: Batch
    real: int


class StepResult(NamedTuple):
    """What became of a step.

    Attributes:
        loss: mean over the global batch.
        applied: whether the weights moved.
        norm: of the gradient, before clipping; NaN where nobody asked.
        losses: of this worker's samples, in their order, on the CPU.
    """

    loss: float
    applied: bool
    norm: float
    losses: Tensor


def passes(batch: int, world_size: int, micro_batch: int | None) -> int:
    """In how many passes every worker does its share of a step."""
    share = -(-batch // world_size)
    return 1 if micro_batch is None else -(-share // micro_batch)


def split(batch: Batch, count: int) -> list[MicroBatch]:
    """A share in so many passes of about one size; an empty pass repeats the first sample."""
    size = len(batch["sample"])
    edges = [size * i // count for i in range(count + 1)]
    return [
        MicroBatch({name: value[a : max(b, a + 1)] for name, value in batch.items()}, b - a)
        if a < size
        else MicroBatch({name: value[:1] for name, value in batch.items()}, 0)
        for a, b in pairwise(edges)
    ]


class LossAccumulator:
    """The losses of a step while its passes are made."""

    def __init__(self, batch: int, most: float) -> None:
        """Take the global batch, and above which mean loss a step is not made."""
        self._batch, self._most = batch, most
        self._losses: list[Tensor] = []
        self.loss, self.is_fine = math.nan, False

    def add(self, losses: Tensor, piece: MicroBatch) -> Tensor:
        """Enter a pass; the sum of its losses."""
        losses = losses.float()[: piece.real]
        self._losses.append(losses.detach())
        return losses.sum()

    def fine(self, context: Context) -> bool:
        """Whether the step may be made, by the losses of all workers; asked in the last pass."""
        total = torch.cat(self._losses).double().sum()
        self.loss = context.all_reduce_sum([float(total)])[0] / self._batch
        self.is_fine = math.isfinite(self.loss) and self.loss <= self._most
        return self.is_fine

    def step(self, applied: bool, norm: float) -> StepResult:
        """What became of it."""
        return StepResult(self.loss, applied, norm, torch.cat(self._losses).cpu())


def nan_loss(loss: Tensor) -> Tensor:
    """A loss whose gradient is NaN on every worker: whoever applies gradients will not."""
    return loss * float("nan")


def to(batch: Batch, device: torch.device, recipe: Recipe) -> Batch:
    """The batch on a device, images and latents in the layout that the recipe asks for."""
    moved = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    if not recipe.channels_last:
        return moved
    return {
        name: value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value
        for name, value in moved.items()
    }


def joined(batches: Sequence[Batch]) -> Batch:
    """Several batches as one."""
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
