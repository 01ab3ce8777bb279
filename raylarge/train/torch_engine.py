"""Plain torch: one process, or DistributedDataParallel among several."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from raylarge.train import optimizer as optimizers
from raylarge.train.context import Context
from raylarge.train.ema import EMA
from raylarge.train.micro_batches import LossAccumulator, MicroBatch, StepResult, nan_loss, to
from raylarge.train.state import StoredState, TrainState, gathered, moments, put_buffers
from raylarge.train.task import Batch, Recipe, TrainTask


class TorchEngine:
    """Whole weights on every worker; see `engine.Engine`."""

    def __init__(self, task: TrainTask, recipe: Recipe, context: Context) -> None:
        """Move the task's network to the device and make its optimiser."""
        self.network, self.recipe, self.context = task.network, recipe, context
        self.network.to(context.device).train()
        self.model = _parallel(self.network, context)
        self.optimizer = optimizers.make(self.network, recipe, context.device)
        self.ema = EMA(task.averaged) if task.averaged is not None else None
        self.updates = 0

    def step(self, micro_batches: Sequence[MicroBatch], lr: float, most: float) -> StepResult:
        """See `Engine`."""
        accumulator = LossAccumulator(self.recipe.batch, most)
        for micro_batch in micro_batches:
            last = micro_batch is micro_batches[-1]
            with nullcontext() if last or self.context.world_size == 1 else self.model.no_sync():
                with self._autocast():
                    losses = self.model(to(micro_batch.batch, self.context.device, self.recipe))
                loss = accumulator.add(losses, micro_batch)
                if last and not accumulator.check(self.context):
                    loss = nan_loss(loss)
                # DDP takes the mean over workers of what is a sum over samples.
                (loss * self.context.world_size / self.recipe.batch).backward()
        norm = optimizers.clip(self.network, self.recipe.clip)
        applied = accumulator.is_finite and norm == norm and norm != float("inf")
        if applied:
            optimizers.set_lr(self.optimizer, lr)
            self.optimizer.step()
            self.updates += 1
            if self.ema is not None:
                self.ema.update()
        self.optimizer.zero_grad(set_to_none=True)
        return accumulator.step(applied, norm)

    @torch.no_grad()
    def losses(self, batch: Batch) -> Tensor:
        """See `Engine`."""
        self.network.eval()
        with self._autocast():
            losses: Tensor = self.network(to(batch, self.context.device, self.recipe))
        self.network.train()
        return losses.float().cpu()

    def state(self) -> TrainState:
        """See `Engine`."""
        moments_of = {p: moments(values) for p, values in self.optimizer.state.items()}
        kinds: dict[str, Any] = {"weights": lambda _, p: p}
        for kind in sorted({kind for values in moments_of.values() for kind in values}):
            kinds[kind] = lambda _, p, kind=kind: moments_of.get(p, {}).get(kind)
        if self.ema is not None:
            names = {id(p): name for name, p in self.ema.parameters.items()}
            shadow = self.ema.shadow
            kinds["average"] = lambda _, p: shadow[names[id(p)]] if id(p) in names else None
        tensors = gathered(self.network, kinds, self.context.rank, self.context.world_size)
        return TrainState(tensors, self.updates, self.ema.count if self.ema is not None else 0)

    @torch.no_grad()
    def load(self, stored: StoredState) -> None:
        """See `Engine`."""
        self.updates = stored.updates
        trained = {p: n for n, p in self.network.named_parameters() if p.requires_grad}
        for parameter, name in trained.items():
            parameter.copy_(stored[f"weights/{name}"])
        put_buffers(self.network, stored)
        ours = self.optimizer.state_dict()
        order = [p for group in self.optimizer.param_groups for p in group["params"]]
        plain = isinstance(self.optimizer, torch.optim.AdamW)  # others count in whole numbers
        count = stored.updates
        ours["state"] = {
            i: {"step": torch.tensor(float(count)) if plain else count}
            | {k: stored[f"{k}/{trained[p]}"] for k in kinds}
            for i, p in enumerate(order)
            if (kinds := stored.kinds(trained[p]))
        }
        self.optimizer.load_state_dict(ours)
        if self.ema is not None:
            self.ema.count = stored.averaged
            names = {id(p): name for p, name in trained.items()}
            for name, parameter in self.ema.parameters.items():
                self.ema.shadow[name].copy_(stored[f"average/{names[id(parameter)]}"])

    def whole(self) -> AbstractContextManager[None]:
        """Weights are whole at all times."""
        return nullcontext()

    def average(self) -> dict[str, Tensor] | None:
        """See `Engine`."""
        return self.ema.whole() if self.ema is not None else None

    def averaged(self) -> AbstractContextManager[None]:
        """See `Engine`."""
        return self.ema.in_place() if self.ema is not None else nullcontext()

    def _autocast(self) -> AbstractContextManager[Any]:
        enabled = self.recipe.precision == "bf16"
        return torch.autocast(self.context.device.type, torch.bfloat16, enabled=enabled)


def _parallel(network: nn.Module, context: Context) -> nn.Module:
    if context.world_size == 1:
        return network
    return nn.parallel.DistributedDataParallel(network, gradient_as_bucket_view=True)
