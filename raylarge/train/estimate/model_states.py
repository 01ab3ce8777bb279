"""Bytes that a worker holds during all of a training: weights, gradients, moments and average.

    task -parts-> PartSize ...  -states(recipe, workers)-> ModelStates

What each ZeRO stage shards is what DeepSpeed 0.19 does. Source of the stages: ZeRO (Rajbhandari
et al. 2020), section 5; here all of it is float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from raylarge.train.deepspeed_engine import REDUCE_BUCKET
from raylarge.train.estimate.memory import modules, tensors
from raylarge.train.task import Recipe, TrainTask


@dataclass(frozen=True)
class WorkerGroup:
    """How many workers train, and whether by DeepSpeed; 0: one process with plain torch."""

    count: int
    by_deepspeed: bool


@dataclass(frozen=True)
class PartSize:
    """Numbers of parameters of a part of a network."""

    name: str
    trained: int
    fixed: int
    averaged: int  # of which a moving average is kept


@dataclass(frozen=True)
class ModelStates:
    """Bytes that one worker holds all the time: on its GPU by name, and on its host."""

    card: dict[str, float]
    host: float = 0.0

    @property
    def total(self) -> float:
        """Return the bytes on the GPU."""
        return sum(self.card.values())


def parts(task: TrainTask) -> list[PartSize]:
    """Return the sizes of a network's children, of its own parameters, and of modules it hides."""
    network, counted = task.network, set[int]()
    averaged = set(map(id, task.averaged.parameters())) if task.averaged is not None else set()
    own = set(network.modules())
    hidden = [module for module in modules(network) if module not in own]
    groups: list[tuple[str, Iterable[nn.Module]]] = [
        (name, child.modules()) for name, child in network.named_children()
    ]
    sizes = []
    for name, group in [*groups, ("itself", [network]), ("beside it", hidden)]:
        new = [p for module in group for p in module.parameters() if id(p) not in counted]
        unique = {id(p): p for p in new}.values()
        counted |= set(map(id, unique))
        count = _numel(unique)
        trained = _numel(p for p in unique if p.requires_grad)
        if count:
            kept = _numel(p for p in unique if id(p) in averaged)
            sizes.append(PartSize(name, trained, count - trained, kept))
    return sizes


def _numel(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def fixed_bytes(network: nn.Module) -> float:
    """Return the bytes of buffers and of parameters that are not trained."""
    return float(sum(t.nbytes for t in tensors(network) if not t.requires_grad))


def states(
    parts: Iterable[PartSize], fixed: float, recipe: Recipe, workers: WorkerGroup
) -> ModelStates:
    """Return the bytes that one worker holds from the first step to the last.

    Args:
        parts: of the network.
        fixed: bytes of what is not trained.
        recipe: gives zero, offload and optimizer.
        workers: which train.
    """
    parts = list(parts)
    sharded = workers.count > 0 and workers.by_deepspeed
    stage, count = recipe.zero if sharded else 0, max(1, workers.count)
    n = 4.0 * sum(part.trained for part in parts)  # bytes in float32
    bucket = min(n, 4.0 * REDUCE_BUCKET) if sharded else 0.0  # DDP's are the gradients themselves
    moments = (2 if recipe.optimizer == "adamw" else 0.5) * n
    # ZeRO-1 and 2 copy the weights that they update; ZeRO-3 updates its shards in place.
    optimizer = (moments + (n if stage in (1, 2) else 0.0)) / (count if stage else 1)
    offloaded = bool(stage and recipe.offload)
    if offloaded and stage == 3:
        optimizer += n / count
    average = 4.0 * sum(part.averaged for part in parts)
    whole = stage < 3
    card = {
        "weights": n if whole else n / count,
        "weights gathered": 0.0 if whole else min(n, 4.0 * REDUCE_BUCKET),
        "weights that are fixed": fixed,
        "gradients": n if stage < 2 else n / count,
        "optimiser": 0.0 if offloaded else optimizer,
        "average": average if whole else average / count,
        "gradients under way": bucket,
    }
    return ModelStates(card, optimizer if offloaded else 0.0)
