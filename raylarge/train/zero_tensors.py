"""Whole tensors in and out of DeepSpeed's optimizer, at every ZeRO stage.

Stage 0 keeps whole parameters and moments; stages 1 and 2 shard moments and fp32 copies of the
weights; stage 3 shards the weights as well. Follows DeepSpeed 0.19.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import Tensor

from raylarge.train.context import Context

MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroTensors:
    """Reads and writes whole fp32 parameters and moments; every rank makes the same calls."""

    def __init__(self, engine: Any, fragments: Any, stage: int, context: Context) -> None:
        """Take DeepSpeed's engine, its `deepspeed.utils`, the ZeRO stage and this rank."""
        self.engine, self.fragments, self.context = engine, fragments, context
        self.stage, self.sharded = stage, stage == 3

    def whole(self, parameter: Tensor, kind: str | None) -> Tensor | None:
        """Return a parameter in fp32, or a moment of it (`kind`), whole on every rank."""
        if not parameter.requires_grad:
            return None
        if self.stage == 0:
            stored = self.engine.optimizer.state.get(parameter, {})
            return parameter if kind is None else stored.get(kind)
        if self.sharded:
            return self.join(parameter, self._local(parameter, kind))
        if kind is None:
            return self.fragments.safe_get_full_fp32_param(parameter)
        return self.fragments.safe_get_full_optimizer_state(parameter, kind)

    def put(self, parameter: Tensor, value: Tensor, kind: str | None) -> None:
        """Copy a whole fp32 value to where this rank stores it, or its shard."""
        value = value.to(parameter.device)
        if self.sharded:
            shard = self.shard(parameter, value)
            self._local(parameter, kind).copy_(shard)
            if kind is None:
                parameter.ds_tensor.copy_(shard)  # type: ignore[attr-defined]
                if parameter.numel():  # DeepSpeed keeps small parameters whole after a step
                    parameter.copy_(value)
        elif self.stage == 0:
            stored = parameter if kind is None else self.engine.optimizer.state[parameter][kind]
            stored.copy_(value)
        elif kind is None:
            parameter.copy_(value)
            self.fragments.safe_set_full_fp32_param(parameter, value)
        else:
            self.fragments.safe_set_full_optimizer_state(parameter, value, kind)

    def _local(self, parameter: Tensor, kind: str | None) -> Tensor:
        """Return a view of this rank's fp32 shard of a parameter, or of a moment."""
        optimizer = self.engine.optimizer
        return optimizer._get_fp32_opt_state_partition(parameter, False, kind)[0]

    def shard(self, parameter: Tensor, value: Tensor) -> Tensor:
        """Return this rank's shard of a whole value; the last one is padded with zeros."""
        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        flat = value.new_zeros(size * self.context.world_size)
        flat[: value.numel()] = value.flatten()
        return flat.narrow(0, size * self.context.rank, size)

    def join(self, parameter: Tensor, shard: Tensor) -> Tensor:
        """Return the whole value of which every rank has a shard."""
        shard = shard.to(self.context.device)  # offloaded ones lie in the host's memory
        flat = shard.new_empty(shard.numel() * self.context.world_size)
        torch.distributed.all_gather_into_tensor(flat, shard.detach().contiguous())
        whole: Tensor = flat[: parameter.ds_numel].view(parameter.ds_shape)  # type: ignore[attr-defined]
        return whole

    def create_moments(self, updates: int) -> None:
        """Set the optimizer's count of updates; create moments that do not exist, as zeros."""
        optimizer = self.engine.optimizer
        base = getattr(optimizer, "optimizer", optimizer)
        fused = base.param_groups[0].get("fused")  # its kernel reads the count on the GPU
        if self.sharded:
            parameters = optimizer.fp32_partitioned_groups_flat
        else:
            parameters = [p for group in base.param_groups for p in group["params"]]
        first = not base.state
        for parameter in parameters:
            state = base.state[parameter]  # DeepSpeed's fragments point into existing state
            for kind in MOMENTS:
                state.setdefault(kind, torch.zeros_like(parameter))
            device = parameter.device if fused else "cpu"
            state["step"] = torch.tensor(float(updates), device=device)
        if first and self.stage in (1, 2):
            optimizer._lazy_init_hp_params_optimizer_state()
