"""Losses told apart by scale and by timestep: a small sum over many steps and all workers.

    add(batch, losses) ... -> totals() -all-reduce, sum-> take(totals) -> {"loss/scale 3": mean}

Early timesteps are hard for a prediction of the noise and coarse scales have few rows, so the
mean of all hides which of them does not learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from raylarge.train.task import Batch


class Bins:
    """Sums and counts of this worker's losses, by scale and by bucket of timesteps."""

    def __init__(self, scales: Sequence[int], buckets: int = 10, length: int = 1000) -> None:
        """Begin empty.

        Args:
            scales: the scales k that are told apart; losses of others count by timestep alone.
            buckets: equal shares of the schedule.
            length: timesteps of the schedule.
        """
        self.scales, self.buckets, self.length = tuple(scales), buckets, length
        self._kept = self._empty()

    def add(self, batch: Batch, losses: Float[Tensor, " b"]) -> None:
        """Count the losses of a batch in; those that are not finite are left out.

        Args:
            batch: has `scale` and `t` (timesteps), or one of them, or none.
            losses: of each sample, on the CPU.
        """
        good = losses.isfinite()
        values, none = losses[good].double(), torch.full((int(good.sum()),), -1)
        scale = batch["scale"].cpu()[good] if "scale" in batch else none
        t = batch["t"].cpu()[good] if "t" in batch else none
        bucket = torch.where(t < 0, t, t * self.buckets // self.length)
        where = [scale == k for k in self.scales] + [bucket == i for i in range(self.buckets)]
        for i, places in enumerate(where):
            self._kept[0, i] += values[places].sum()
            self._kept[1, i] += places.sum()

    def totals(self) -> Float64[Tensor, " n"]:
        """Sums, then counts; those of all workers add up."""
        return self._kept.flatten().clone()

    def take(self, totals: Float64[Tensor, " n"]) -> dict[str, float]:
        """The means, of bins that hold anything; this worker's are empty afterwards.

        Args:
            totals: of all workers, added up.
        """
        sums, counts = totals.cpu().view(2, -1).tolist()
        self._kept = self._empty()
        found = zip(self._names(), sums, counts, strict=True)
        return {name: total / count for name, total, count in found if count}

    def _names(self) -> list[str]:
        edges = [f"{i / self.buckets:.3g}" for i in range(self.buckets + 1)]
        by_t = [f"loss/t {a}-{b}" for a, b in pairwise(edges)]
        return [f"loss/scale {k}" for k in self.scales] + by_t

    def _empty(self) -> Float64[Tensor, "2 m"]:
        return torch.zeros(2, len(self.scales) + self.buckets, dtype=torch.float64)
