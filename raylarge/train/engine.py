"""What turns batches into better weights: plain torch (DDP) or DeepSpeed (ZeRO 0-3).

    step(passes, lr, most) -> mean loss over the global batch, and whether the weights moved

Both engines clip the same norm, run the same AdamW and skip a step whose loss or gradient is
not finite or whose loss is above `most`, so one seed gives one curve (Ray equivalence). bf16 means
autocast: weights, sums of gradients and optimiser stay fp32. Only this file knows DeepSpeed.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed
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
from raylarge.train.task import Batch, Recipe, Task

REDUCE_BUCKET = 50_000_000  # elements; DeepSpeed's own 500 M would reserve 2 GB a worker
MOMENTS = ("exp_avg", "exp_avg_sq")


@runtime_checkable
class Engine(Protocol):
    """One worker's hand on the network. Every rank makes the same calls."""

    def step(self, pieces: Sequence[MicroBatch], lr: float, most: float) -> StepResult:
        """One optimiser step over this rank's passes, unless its loss is above `most`."""
        ...

    def losses(self, batch: Batch) -> Tensor:
        """The losses of held-out samples, on the CPU; no gradient."""
        ...

    def state(self) -> TrainState:
        """This rank's share of all that training goes on from."""
        ...

    def load(self, stored: StoredState) -> None:
        """Go on from what all ranks stored, however many they were."""
        ...

    def whole(self) -> AbstractContextManager[None]:
        """Within, the network holds whole weights on every rank."""
        ...

    def average(self) -> dict[str, Tensor] | None:
        """The averaged part's whole state dict, on the CPU."""
        ...

    def averaged(self) -> AbstractContextManager[None]:
        """Within, the network computes with averaged weights; not where they are sharded."""
        ...


class DeepSpeedEngine:
    """DeepSpeed; states, gradients and weights are sharded as the ZeRO stage says."""

    def __init__(self, task: Task, recipe: Recipe, context: Context) -> None:
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
        self.fragments = deepspeed.utils
        shard = self.fragments.safe_get_local_fp32_param if self.sharded else Tensor.detach
        self.ema = EMA(task.averaged, shard) if task.averaged is not None else None
        self.updates = 0

    def step(self, pieces: Sequence[MicroBatch], lr: float, most: float) -> StepResult:
        """See `Engine`."""
        tally, norm = LossAccumulator(self.recipe.batch, most), math.nan
        optimizers.set_lr(self.engine.optimizer, lr)
        factor = self.context.world_size * len(pieces) / self.recipe.batch
        for piece in pieces:
            last = piece is pieces[-1]
            losses = self.engine(to(piece.batch, self.context.device, self.recipe))
            loss = tally.add(losses, piece)
            if last and not tally.fine(self.context):
                loss = nan_loss(loss)
            self.engine.backward(loss * factor)  # it takes the mean over workers and passes
            if last and self.recipe.zero == 0:  # nobody else looks at the gradient
                norm = optimizers.clip(self.network, self.recipe.clip)
                if not math.isfinite(norm):
                    self.network.zero_grad(set_to_none=True)
            self.engine.step()
        applied = tally.is_fine and self.engine.was_step_applied()
        if self.recipe.zero:
            norm = float(self.engine.get_global_grad_norm() or math.nan)
        elif not math.isfinite(norm):
            applied = False
        if applied:
            self.updates += 1
            if self.ema is not None:
                self.ema.update()
        return tally.step(applied, norm)

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
        kinds: dict[str, Any] = {"weights": lambda _, p: self._whole(p, None)}
        if self.updates:
            kinds |= {kind: lambda _, p, kind=kind: self._whole(p, kind) for kind in MOMENTS}
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
            self._make_moments(stored.updates)
        names = {id(p): name for name, p in self.network.named_parameters()}
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad:
                self._put(parameter, stored[f"weights/{name}"], None)
                for kind in MOMENTS if stored.updates else ():
                    self._put(parameter, stored[f"{kind}/{name}"], kind)
        put_buffers(self.network, stored)
        if self.ema is not None:
            self.ema.count = stored.averaged
            for name, parameter in self.ema.parameters.items():
                value = stored[f"average/{names[id(parameter)]}"]
                value = self._shard(parameter, value) if self.sharded else value
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
            state[name] = self._join(parameter, self.ema.shadow[name]).cpu()
        return state

    def averaged(self) -> AbstractContextManager[None]:
        """See `Engine`."""
        return self.ema.in_place() if self.ema is not None else nullcontext()

    def _whole(self, parameter: Tensor, kind: str | None) -> Tensor | None:
        """A parameter in fp32, or a moment of it, put together from all ranks."""
        if not parameter.requires_grad:
            return None
        if self.recipe.zero == 0:
            held = self.engine.optimizer.state.get(parameter, {})
            return parameter if kind is None else held.get(kind)
        if self.sharded:
            return self._join(parameter, self._local(parameter, kind))
        if kind is None:
            return self.fragments.safe_get_full_fp32_param(parameter)
        return self.fragments.safe_get_full_optimizer_state(parameter, kind)

    def _average(self, parameter: Tensor, name: str | None) -> Tensor | None:
        if name is None or self.ema is None:
            return None
        shadow = self.ema.shadow[name]
        return self._join(parameter, shadow) if self.sharded else shadow

    def _put(self, parameter: Tensor, value: Tensor, kind: str | None) -> None:
        """A whole fp32 value into the place that this rank has for it."""
        value = value.to(parameter.device)
        if self.sharded:
            shard = self._shard(parameter, value)
            self._local(parameter, kind).copy_(shard)
            if kind is None:
                parameter.ds_tensor.copy_(shard)  # type: ignore[attr-defined]
                if parameter.numel():  # small ones stay whole after a step
                    parameter.copy_(value)
        elif self.recipe.zero == 0:
            held = parameter if kind is None else self.engine.optimizer.state[parameter][kind]
            held.copy_(value)
        elif kind is None:
            parameter.copy_(value)
            self.fragments.safe_set_full_fp32_param(parameter, value)
        else:
            self.fragments.safe_set_full_optimizer_state(parameter, value, kind)

    def _local(self, parameter: Tensor, kind: str | None) -> Tensor:
        """This rank's shard in fp32, or of a moment: a view."""
        optimizer = self.engine.optimizer
        return optimizer._get_fp32_opt_state_partition(parameter, False, kind)[0]

    def _shard(self, parameter: Tensor, value: Tensor) -> Tensor:
        """This rank's part of a whole value; the last one's is filled up with zeros."""
        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        flat = value.new_zeros(size * self.context.world_size)
        flat[: value.numel()] = value.flatten()
        return flat.narrow(0, size * self.context.rank, size)

    def _join(self, parameter: Tensor, shard: Tensor) -> Tensor:
        shard = shard.to(self.context.device)  # offloaded ones lie in the host's memory
        flat = shard.new_empty(shard.numel() * self.context.world_size)
        torch.distributed.all_gather_into_tensor(flat, shard.detach().contiguous())
        whole: Tensor = flat[: parameter.ds_numel].view(parameter.ds_shape)  # type: ignore[attr-defined]
        return whole

    def _make_moments(self, updates: int) -> None:
        """The optimiser's state as it is after some updates; moments that were not there are 0."""
        optimizer = self.engine.optimizer
        base = getattr(optimizer, "optimizer", optimizer)
        fused = base.param_groups[0].get("fused")  # its kernel reads the count from the card
        if self.sharded:
            held = optimizer.fp32_partitioned_groups_flat
        else:
            held = [p for group in base.param_groups for p in group["params"]]
        first = not base.state
        for parameter in held:
            state = base.state[parameter]  # what a step made is kept: fragments point into it
            for kind in MOMENTS:
                state.setdefault(kind, torch.zeros_like(parameter))
            device = parameter.device if fused else "cpu"
            state["step"] = torch.tensor(float(updates), device=device)
        if first and self.recipe.zero in (1, 2):
            optimizer._lazy_init_hp_params_optimizer_state()


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
