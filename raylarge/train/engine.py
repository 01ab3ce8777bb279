"""The interface of an engine, which turns batches into gradient steps.

    step(micro_batches, lr, most) -> mean loss over the global batch, whether the weights changed

`torch_engine.py` is plain torch (DDP), `deepspeed_engine.py` DeepSpeed (ZeRO 0-3). Both clip the
same norm, run the same AdamW and skip a step whose loss or gradient is not finite or whose loss
is above `most`, so one seed gives one curve. bf16 means autocast: weights, sums of gradients
and optimizer states stay in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from torch import Tensor

from raylarge.train.micro_batches import (
    MicroBatch,
    StepResult,
)
from raylarge.train.state import StoredState, TrainState
from raylarge.train.task import Batch


@runtime_checkable
class Engine(Protocol):
    """Trains a network on one worker. Every rank makes the same calls."""

    def step(self, micro_batches: Sequence[MicroBatch], lr: float, most: float) -> StepResult:
        """Make one optimizer step over this rank's batches, unless its loss is above `most`."""
        ...

    def losses(self, batch: Batch) -> Tensor:
        """Return the losses of held-out samples, on the CPU; no gradient."""
        ...

    def state(self) -> TrainState:
        """Return this rank's share of the state that a checkpoint holds."""
        ...

    def load(self, stored: StoredState) -> None:
        """Load the state that any number of ranks stored."""
        ...

    def whole(self) -> AbstractContextManager[None]:
        """Within the block, the network holds whole weights on every rank."""
        ...

    def average(self) -> dict[str, Tensor] | None:
        """Return the whole state dict of the averaged module, on the CPU."""
        ...

    def averaged(self) -> AbstractContextManager[None]:
        """Within the block, the network uses averaged weights; not where they are sharded."""
        ...
