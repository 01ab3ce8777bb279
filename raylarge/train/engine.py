"""What turns batches into better weights: plain torch (DDP) or DeepSpeed (ZeRO 0-3).

    step(micro-batches, lr) -> mean loss over the global batch; NaN where the step was skipped

Both engines clip the same norm, run the same AdamW and skip a step whose loss or gradient is
not finite, so one seed gives one curve (law 7). bf16 means autocast: weights, gradients'
sums and optimiser stay fp32. The moving average follows the published `LitEma`:

    d_n = min(0.9999, (1 + n) / (10 + n)),   avg <- avg + (1 - d_n) (weights - avg)
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed
from torch import Tensor, nn

from raylarge.train.context import Context
from raylarge.train.task import Batch, Recipe, Task

EMA_DECAY = 0.9999
REDUCE_BUCKET = 50_000_000  # elements; DeepSpeed's own 500 M would reserve 2 GB a worker


@runtime_checkable
class Engine(Protocol):
    """One worker's hand on the network. Every rank makes the same calls."""

    def step(self, batches: Sequence[Batch], lr: float) -> float:
        """One optimiser step over this rank's micro-batches."""
        ...

    def save(self, folder: Path) -> None:
        """Write this rank's share of the state into a local folder."""
        ...

    def load(self, folder: Path) -> None:
        """Go on from a folder that holds what every rank saved."""
        ...

    def whole(self) -> AbstractContextManager[None]:
        """Within, the network holds whole weights on every rank."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """The network's whole state dict, on the CPU."""
        ...

    def average(self) -> dict[str, Tensor] | None:
        """The averaged part's whole state dict, on the CPU."""
        ...


class Average:
    """Exponential moving average of a module's parameters, or of this rank's shards of them."""

    def __init__(self, module: nn.Module, shard: Callable[[Tensor], Tensor] = Tensor.detach):
        """Begin at the module's present weights."""
        self.module = module
        self.shard = shard
        self.count = 0
        self.shadow = {name: self._now(p).clone() for name, p in module.named_parameters()}

    def update(self) -> None:
        """Take one step's weights in."""
        self.count += 1
        decay = min(EMA_DECAY, (1 + self.count) / (10 + self.count))
        for name, parameter in self.module.named_parameters():
            self.shadow[name].lerp_(self._now(parameter), 1 - decay)

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return {"count": self.count, "shadow": self.shadow}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.count = state["count"]
        for name, value in state["shadow"].items():
            self.shadow[name].copy_(value)

    def whole(self, join: Callable[[Tensor, Tensor], Tensor] | None = None) -> dict[str, Tensor]:
        """State dict of the module with averaged parameters.

        Args:
            join: (parameter, this rank's shard of its average) -> the whole average.
        """
        state = _on_cpu(self.module)
        for name, parameter in self.module.named_parameters():
            value = self.shadow[name]
            state[name] = (join(parameter, value) if join else value).cpu().clone()
        return state

    def _now(self, parameter: Tensor) -> Tensor:
        return self.shard(parameter).float()


class TorchEngine:
    """Plain torch; DistributedDataParallel where there is more than one worker."""

    def __init__(self, task: Task, recipe: Recipe, context: Context) -> None:
        """Move the task's network to the device and make its optimiser."""
        self.network, self.recipe, self.context = task.network, recipe, context
        self.network.to(context.device).train()
        self.model = _parallel(self.network, context)
        self.optimizer = _adamw(self.network, recipe)
        self.ema = Average(task.averaged) if task.averaged is not None else None

    def step(self, batches: Sequence[Batch], lr: float) -> float:
        """See `Engine`."""
        total = torch.zeros((), device=self.context.device)
        for i, batch in enumerate(batches):
            alone = self.context.world_size == 1 or i == len(batches) - 1
            with nullcontext() if alone else self.model.no_sync():
                with self._autocast():
                    loss = self.model(_to(batch, self.context.device)).float().mean()
                (_poisoned(loss) / len(batches)).backward()
            total += loss.detach() / len(batches)
        applied = _clip(self.network, self.recipe.clip)
        if applied:
            _set_lr(self.optimizer, lr)
            self.optimizer.step()
            if self.ema is not None:
                self.ema.update()
        self.optimizer.zero_grad(set_to_none=True)
        return _mean(total, self.context) if applied else float("nan")

    def save(self, folder: Path) -> None:
        """Rank 0 holds all there is."""
        if self.context.rank == 0:
            state = {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
            state["average"] = self.ema.state() if self.ema is not None else None
            torch.save(state, folder / "torch.pt")

    def load(self, folder: Path) -> None:
        """See `Engine`."""
        state = torch.load(folder / "torch.pt", map_location=self.context.device)
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.restore(state["average"])

    def whole(self) -> AbstractContextManager[None]:
        """Weights are whole at all times."""
        return nullcontext()

    def weights(self) -> dict[str, Tensor]:
        """See `Engine`."""
        return _on_cpu(self.network)

    def average(self) -> dict[str, Tensor] | None:
        """See `Engine`."""
        return self.ema.whole() if self.ema is not None else None

    def _autocast(self) -> AbstractContextManager[Any]:
        enabled = self.recipe.precision == "bf16"
        return torch.autocast(self.context.device.type, torch.bfloat16, enabled=enabled)


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
            optimizer=_adamw(self.network, recipe),
            config=deepspeed_config(recipe, context.world_size),
            dist_init_required=False,
        )
        shard = deepspeed.utils.safe_get_local_fp32_param if self.sharded else Tensor.detach
        self.ema = Average(task.averaged, shard) if task.averaged is not None else None

    def step(self, batches: Sequence[Batch], lr: float) -> float:
        """See `Engine`."""
        total = torch.zeros((), device=self.context.device)
        _set_lr(self.engine.optimizer, lr)
        for batch in batches:
            loss = self.engine(_to(batch, self.context.device)).float().mean()
            self.engine.backward(_poisoned(loss))
            total += loss.detach() / len(batches)
            last = self.engine.is_gradient_accumulation_boundary()
            # Without ZeRO there is no check of the gradient, and clipping is left to us.
            finite = not (last and self.recipe.zero == 0) or _clip(self.network, self.recipe.clip)
            if not finite:
                self.network.zero_grad(set_to_none=True)
            self.engine.step()
        applied = finite and self.engine.was_step_applied()
        if applied and self.ema is not None:
            self.ema.update()
        return _mean(total, self.context) if applied else float("nan")

    def save(self, folder: Path) -> None:
        """See `Engine`; DeepSpeed's own layout below `deepspeed/`."""
        self.engine.save_checkpoint(str(folder), tag="deepspeed", save_latest=False)
        if self.ema is not None and (self.sharded or self.context.rank == 0):
            torch.save(self.ema.state(), folder / self._average_file())

    def load(self, folder: Path) -> None:
        """See `Engine`; the world size must be the one that saved."""
        self.engine.load_checkpoint(str(folder), tag="deepspeed")
        if self.ema is not None:
            self.ema.restore(torch.load(folder / self._average_file(), self.context.device))

    def whole(self) -> AbstractContextManager[None]:
        """Under ZeRO-3 the shards are gathered for as long as the block lasts."""
        if not self.sharded:
            return nullcontext()
        deepspeed = _import_deepspeed(self.context.device)
        return deepspeed.zero.GatheredParameters(list(self.network.parameters()))

    def weights(self) -> dict[str, Tensor]:
        """See `Engine`."""
        with self.whole():
            return _on_cpu(self.network)

    def average(self) -> dict[str, Tensor] | None:
        """See `Engine`."""
        if self.ema is None:
            return None
        return self.ema.whole(self._join if self.sharded else None)

    def _join(self, parameter: Tensor, shard: Tensor) -> Tensor:
        parts = [torch.empty_like(shard) for _ in range(self.context.world_size)]
        torch.distributed.all_gather(parts, shard.contiguous())
        flat = torch.cat([part.flatten() for part in parts])
        return flat[: parameter.ds_numel].view(parameter.ds_shape)

    def _average_file(self) -> str:
        return f"average-{self.context.rank if self.sharded else 0}.pt"


def deepspeed_config(recipe: Recipe, world_size: int) -> dict[str, Any]:
    """DeepSpeed's JSON, derived from our recipe."""
    return {
        "train_batch_size": recipe.batch,
        "train_micro_batch_size_per_gpu": recipe.batch // (world_size * recipe.accumulation),
        "gradient_accumulation_steps": recipe.accumulation,
        "gradient_clipping": recipe.clip if recipe.zero else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": recipe.zero,
            "reduce_bucket_size": REDUCE_BUCKET,
            "allgather_bucket_size": REDUCE_BUCKET,
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


def _parallel(network: nn.Module, context: Context) -> nn.Module:
    if context.world_size == 1:
        return network
    return nn.parallel.DistributedDataParallel(network)


def _adamw(network: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        network.parameters(), recipe.lr, recipe.betas, weight_decay=recipe.weight_decay
    )


def _set_lr(optimizer: Any, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def _poisoned(loss: Tensor) -> Tensor:
    """The loss, or NaN with NaN gradients where it is not finite: every rank then skips."""
    return loss if torch.isfinite(loss) else loss * float("nan")


def _clip(network: nn.Module, largest: float) -> bool:
    """Clip the gradient's norm; whether it was finite."""
    norm = nn.utils.clip_grad_norm_(network.parameters(), largest or float("inf"))
    return bool(torch.isfinite(norm))


def _mean(value: Tensor, context: Context) -> float:
    if context.world_size > 1:
        torch.distributed.all_reduce(value)
    return float(value) / context.world_size


def _to(batch: Batch, device: torch.device) -> Batch:
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def _on_cpu(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}
