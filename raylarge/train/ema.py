"""Exponential moving average of weights, as the published `LitEma`.

d_n = min(0.9999, (1 + n) / (10 + n)),   avg <- avg + (1 - d_n) (weights - avg)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

EMA_DECAY = 0.9999


class EMA:
    """Moving average of a module's parameters, or of this rank's shards of them."""

    def __init__(self, module: nn.Module, shard: Callable[[Tensor], Tensor] = Tensor.detach):
        """Start from the module's present weights.

        Args:
            module: whose parameters are averaged.
            shard: returns this rank's shard of a parameter.
        """
        self.module = module
        self.shard = shard
        self.count = 0
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.shadow = {name: self._now(p).clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the present weights."""
        self.count += 1
        decay = min(EMA_DECAY, (1 + self.count) / (10 + self.count))
        now = [self._now(parameter) for parameter in self.parameters.values()]
        torch._foreach_lerp_(list(self.shadow.values()), now, 1 - decay)

    def whole(self) -> dict[str, Tensor]:
        """Return the module's state dict (on the CPU) with averaged parameters; not for shards."""
        state = {name: value.detach().cpu().clone() for name, value in _state(self.module)}
        return state | {name: value.cpu().clone() for name, value in self.shadow.items()}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block, the module uses the averaged weights; not for shards."""
        before = {name: p.detach().clone() for name, p in self.parameters.items()}
        try:
            self._put(self.shadow)
            yield
        finally:
            self._put(before)

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    def _now(self, parameter: Tensor) -> Tensor:
        return self.shard(parameter).float()


def _state(module: nn.Module) -> list[tuple[str, Tensor]]:
    return list(module.state_dict().items())
