"""What a worker holds from a training's first step to its last: parameters and all beside them.

    task -parts-> Part …  -states(config)-> bytes of weights, gradients, moments, average

What each ZeRO stage divides among workers is what DeepSpeed 0.19 does. Source of the stages:
ZeRO (Rajbhandari et al. 2020), section 5; here all of it is float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from raylarge.train.deepspeed_engine import REDUCE_BUCKET
from raylarge.train.estimate.memory import modules, tensors
from raylarge.train.task import Task

if TYPE_CHECKING:
    from raylarge.train.config import Train


@dataclass(frozen=True)
class PartSize:
    """Parameters of a part of a network."""

    name: str
    trained: int
    fixed: int
    averaged: int  # of which a moving average is kept


@dataclass(frozen=True)
class ModelStates:
    """Bytes that one worker holds all the time: on its card by name, and on its host."""

    card: dict[str, float]
    host: float = 0.0

    @property
    def total(self) -> float:
        """On the card."""
        return sum(self.card.values())


def parts(task: Task) -> list[PartSize]:
    """A task's network by its children; what is in none of them; what it uses beside them."""
    network, counted = task.network, set[int]()
    averaged = set(map(id, task.averaged.parameters())) if task.averaged is not None else set()
    own = set(network.modules())
    hidden = [one for one in modules(network) if one not in own]
    groups: list[tuple[str, Iterable[nn.Module]]] = [
        (name, child.modules()) for name, child in network.named_children()
    ]
    found = []
    for name, group in [*groups, ("itself", [network]), ("beside it", hidden)]:
        new = [p for one in group for p in one.parameters() if id(p) not in counted]
        unique = {id(p): p for p in new}.values()
        counted |= set(map(id, unique))
        count = _numel(unique)
        trained = _numel(p for p in unique if p.requires_grad)
        if count:
            kept = _numel(p for p in unique if id(p) in averaged)
            found.append(PartSize(name, trained, count - trained, kept))
    return found


def _numel(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def fixed_bytes(network: nn.Module) -> float:
    """Bytes of buffers and of parameters that nobody trains."""
    return float(sum(one.nbytes for one in tensors(network) if not one.requires_grad))


def states(parts: Iterable[PartSize], fixed: float, config: Train) -> ModelStates:
    """What one worker holds from the first step to the last.

    Args:
        parts: of the network.
        fixed: bytes of what is not trained.
        config: gives workers, strategy, zero, offload and optimizer.
    """
    parts = list(parts)
    sharded = bool(config.workers) and config.strategy == "deepspeed"
    stage, workers = config.zero if sharded else 0, max(1, config.workers)
    n = 4.0 * sum(part.trained for part in parts)  # bytes in float32
    bucket = min(n, 4.0 * REDUCE_BUCKET) if sharded else 0.0  # DDP's are the gradients themselves
    moments = (2 if config.optimizer == "adamw" else 0.5) * n
    # ZeRO-1 and 2 copy the weights that they update; ZeRO-3 updates its shards in place.
    optimizer = (moments + (n if stage in (1, 2) else 0.0)) / (workers if stage else 1)
    offloaded = bool(stage and config.offload)
    if offloaded and stage == 3:
        optimizer += n / workers
    average = 4.0 * sum(part.averaged for part in parts)
    whole = stage < 3
    card = {
        "weights": n if whole else n / workers,
        "weights gathered": 0.0 if whole else min(n, 4.0 * REDUCE_BUCKET),
        "weights that are fixed": fixed,
        "gradients": n if stage < 2 else n / workers,
        "optimiser": 0.0 if offloaded else optimizer,
        "average": average if whole else average / workers,
        "gradients under way": bucket,
    }
    return ModelStates(card, optimizer if offloaded else 0.0)
