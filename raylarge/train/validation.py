"""The loss of held-out samples: always the same samples, at the same noise."""

from __future__ import annotations

import torch

from raylarge.train.context import Context
from raylarge.train.engine import Engine
from raylarge.train.history import number
from raylarge.train.ingest import share
from raylarge.train.micro_batches import passes, split
from raylarge.train.task import Recipe, SampleSource, TrainTask


class Validator:
    """One rank's share of the held-out samples."""

    def __init__(
        self, task: TrainTask, source: SampleSource | None, recipe: Recipe, context: Context
    ) -> None:
        """Read and draw this rank's samples; none where there is no source or `validate` is 0."""
        self._context, self._batch = context, None
        if source is None or not recipe.validate:
            return
        world_size, rows = context.world_size, sum(source.facts.counts.values())
        self._count = max(min(recipe.validate, rows), world_size)  # at least one for each rank
        micro_batch = recipe.micro_batch or -(-recipe.batch // world_size)
        self._passes = passes(self._count, world_size, micro_batch)
        samples = share(0, self._count, context.rank, world_size)
        self._batch = task.draw(source.batch(samples))

    def loss(self, engine: Engine) -> float | None:
        """Return the mean loss over all ranks; None without samples or if it is not finite."""
        if self._batch is None:
            return None
        losses = [
            engine.losses(micro_batch.batch)[: micro_batch.real]
            for micro_batch in split(self._batch, self._passes)
        ]
        total = self._context.all_reduce_sum([float(torch.cat(losses).double().sum())])[0]
        return number(total / self._count)
