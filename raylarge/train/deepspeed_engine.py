"""Training under DeepSpeed, ZeRO stages 0 to 3; the only module that imports DeepSpeed."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from raylarge.train import optimizer as optimizers
from raylarge.train.context import Context
from raylarge.train.ema import EMA
from raylarge.train.micro_batches import (
    LossAccumulator,
    MicroBatch,
    StepResult,
    nan_loss,
    passes,
    to,
)
from raylarge.train.state import StoredState, TrainState, gathered, put_buffers
from raylarge.train.task import Batch, Recipe, TrainTask
from raylarge.train.zero_tensors import MOMENTS, ZeroTensors

REDUCE_BUCKET = 50_000_000  # elements; DeepSpeed's own 500 M would reserve 2 GB a worker


class DeepSpeedEngine:
    """DeepSpeed; states, gradients and weights are sharded as the ZeRO stage says."""

    def __init__(self, task: TrainTask, recipe: Recipe, context: Context) -> None:
        """Hand the task's network to DeepSpeed; the process group is up."""
        deepspeed = _import_deepspeed(context.device)
        self.network, self.recipe, self.context = task.network, recipe, context
        self.sharded = recipe.zero == 3
        self.network.to(context.device).train()
        self.engine, *_ = deepspeed.initialize(
            model=self.network,
            optimizer=optimizers.make(self.network, recipe, context.device),
            config=deepspeed_config(recipe, context.world_size),
            dist_init_required=False,
        )
        self.tensors = ZeroTensors(self.engine, deepspeed.utils, recipe.zero, context)
        shard = deepspeed.utils.safe_get_local_fp32_param if self.sharded else Tensor.detach
        self.ema = EMA(task.averaged, shard) if task.averaged is not None else None
        self.updates = 0

    def step(self, micro_batches: Sequence[MicroBatch], lr: float, most: float) -> StepResult:
        """See `Engine`."""
        accumulator, norm = LossAccumulator(self.recipe.batch, most), math.nan
        optimizers.set_lr(self.engine.optimizer, lr)
        factor = self.context.world_size * len(micro_batches) / self.recipe.batch
        for micro_batch in micro_batches:
            last = micro_batch is micro_batches[-1]
            losses = self.engine(to(micro_batch.batch, self.context.device, self.recipe))
            loss = accumulator.add(losses, micro_batch)
            if last and not accumulator.check(self.context):
                loss = nan_loss(loss)
            self.engine.backward(loss * factor)  # it takes the mean over workers and passes
            if last and self.recipe.zero == 0:  # nobody else looks at the gradient
                norm = optimizers.clip(self.network, self.recipe.clip)
                if not math.isfinite(norm):
                    self.network.zero_grad(set_to_none=True)
            self.engine.step()
        applied = accumulator.is_finite and self.engine.was_step_applied()
        if self.recipe.zero:
            norm = float(self.engine.get_global_grad_norm() or math.nan)
        elif not math.isfinite(norm):
            applied = False
        if applied:
            self.updates += 1
            if self.ema is not None:
                self.ema.update()
        return accumulator.step(applied, norm)

    @torch.no_grad()
    def losses(self, batch: Batch) -> Tensor:
        """See `Engine`."""
        self.engine.eval()
        losses: Tensor = self.engine(to(batch, self.context.device, self.recipe))
        self.engine.train()
        return losses.float().cpu()

    @torch.no_grad()
    def state(self) -> TrainState:
        """See `Engine`."""
        kinds: dict[str, Any] = {"weights": lambda _, p: self.tensors.whole(p, None)}
        if self.updates:
            kinds |= {kind: lambda _, p, kind=kind: self.tensors.whole(p, kind) for kind in MOMENTS}
        if self.ema is not None:
            names = {id(p): name for name, p in self.ema.parameters.items()}
            kinds["average"] = lambda _, p: self._average(p, names.get(id(p)))
        tensors = gathered(self.network, kinds, self.context.rank, self.context.world_size)
        return TrainState(tensors, self.updates, self.ema.count if self.ema is not None else 0)

    @torch.no_grad()
    def load(self, stored: StoredState) -> None:
        """See `Engine`."""
        self.updates = stored.updates
        if stored.updates:
            self.tensors.create_moments(stored.updates)
        names = {id(p): name for name, p in self.network.named_parameters()}
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad:
                self.tensors.put(parameter, stored[f"weights/{name}"], None)
                for kind in MOMENTS if stored.updates else ():
                    self.tensors.put(parameter, stored[f"{kind}/{name}"], kind)
        put_buffers(self.network, stored)
        if self.ema is not None:
            self.ema.count = stored.averaged
            for name, parameter in self.ema.parameters.items():
                value = stored[f"average/{names[id(parameter)]}"]
                value = self.tensors.shard(parameter, value) if self.sharded else value
                self.ema.shadow[name].copy_(value)

    def whole(self) -> AbstractContextManager[None]:
        """Under ZeRO-3 the shards are gathered for as long as the block lasts."""
        if not self.sharded:
            return nullcontext()
        deepspeed = _import_deepspeed(self.context.device)
        return deepspeed.zero.GatheredParameters(list(self.network.parameters()))

    @torch.no_grad()
    def average(self) -> dict[str, Tensor] | None:
        """See `Engine`."""
        if self.ema is None or not self.sharded:
            return self.ema.whole() if self.ema is not None else None
        with self.whole():
            state = {k: v.detach().cpu().clone() for k, v in self.ema.module.state_dict().items()}
        for name, parameter in self.ema.parameters.items():
            state[name] = self.tensors.join(parameter, self.ema.shadow[name]).cpu()
        return state

    def averaged(self) -> AbstractContextManager[None]:
        """See `Engine`."""
        return self.ema.in_place() if self.ema is not None else nullcontext()

    def _average(self, parameter: Tensor, name: str | None) -> Tensor | None:
        if name is None or self.ema is None:
            return None
        shadow = self.ema.shadow[name]
        return self.tensors.join(parameter, shadow) if self.sharded else shadow


def deepspeed_config(recipe: Recipe, world_size: int) -> dict[str, Any]:
    """DeepSpeed's JSON, derived from our recipe.

    Shares of workers may differ by a sample, so DeepSpeed counts passes, not samples.
    """
    count = passes(recipe.batch, world_size, recipe.micro_batch)
    offload = {"offload_optimizer": {"device": "cpu"}} if recipe.offload and recipe.zero else {}
    return {
        "train_batch_size": world_size * count,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": count,
        "gradient_clipping": recipe.clip if recipe.zero else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": recipe.zero,
            "reduce_bucket_size": REDUCE_BUCKET,
            "allgather_bucket_size": REDUCE_BUCKET,
            "stage3_max_live_parameters": REDUCE_BUCKET,
            "stage3_max_reuse_distance": REDUCE_BUCKET,  # its own 10^9 would keep all of ours
            **offload,
        },
        "torch_autocast": {
            "enabled": recipe.precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],  # gradients travel in fp32
        },
    }


def _import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed without what costs seconds at its start and is of no use to us.

    On a CPU it would compile shared-memory kernels (42 s with g++, an error without) that only
    inference calls; and it compiles its Muon optimiser, for which torch loads all of inductor
    (2 s): the eager backend compiles nothing.
    """
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if device.type == "cpu":
        vars(deepspeed.ops)["__compatible_ops__"] = {}
    if hasattr(torch.compiler, "set_default_backend"):
        backend = torch.compiler.get_default_backend()
        torch.compiler.set_default_backend("eager")
        import deepspeed.runtime.zero.muon.muon_optimizer

        torch.compiler.set_default_backend(backend)
    return deepspeed
