"""Everything that training goes on from, as whole tensors that belong to no engine.

    weights/<parameter>  exp_avg/<parameter>  exp_avg_sq/<parameter>  average/<parameter>  buffers/…

Every rank writes its share of them (`state-<rank>.safetensors`), so any number of workers,
under plain torch or any ZeRO stage, reads them again: a tensor is whole wherever it lies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from raylarge.errors import UserError
from raylarge.models.weights import is_finite


@dataclass
class TrainState:
    """One rank's share, on the CPU.

    Attributes:
        tensors: by the names above.
        updates: steps that the optimiser has made.
        averaged: steps that the average has taken in.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    updates: int = 0
    averaged: int = 0

    def write(self, folder: Path, rank: int) -> None:
        """One safetensors file."""
        counts = {"updates": str(self.updates), "averaged": str(self.averaged)}
        save_file(self.tensors, folder / f"state-{rank}.safetensors", metadata=counts)


class StoredState:
    """What all ranks wrote into a folder; tensors are read when they are asked for."""

    def __init__(self, folder: Path) -> None:
        """Open the files.

        Raises:
            UserError: there are none.
        """
        files = sorted(folder.glob("state-*.safetensors"))
        if not files:
            raise UserError(f"{folder} holds no state of a training; remove it, or copy it again.")
        self.folder = folder
        self._files = [safe_open(file, "pt") for file in files]
        self._where = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118
        counts = self._files[0].metadata()
        self.updates, self.averaged = int(counts["updates"]), int(counts["averaged"])

    def __getitem__(self, name: str) -> Tensor:
        try:
            found: Tensor = self._where[name].get_tensor(name)
        except KeyError as error:
            raise UserError(
                f"{self.folder} holds no {name}: it was written by another model or optimiser; "
                f"give the old settings, or remove that folder to begin anew."
            ) from error
        if not is_finite(found):
            raise UserError(
                f"{self.folder}: {name} holds NaN or infinite values; the checkpoint is damaged: "
                f"remove that folder to go on from the one before."
            )
        return found

    def kinds(self, name: str) -> list[str]:
        """The optimiser's kinds of state of a parameter."""
        known = ("weights", "average", "buffers")
        pairs = (key.split("/", 1) for key in self._where)
        return sorted(kind for kind, its in pairs if its == name and kind not in known)


def shares(names: Iterable[str], rank: int, world_size: int) -> set[str]:
    """Which of all names one rank keeps: every world_size-th."""
    return set(list(names)[rank::world_size])


def gathered(
    network: nn.Module,
    kinds: dict[str, Callable[[str, nn.Parameter], Tensor | None]],
    rank: int,
    world_size: int,
) -> dict[str, Tensor]:
    """One rank's share of the whole tensors of a network, on the CPU.

    Args:
        network: whose parameters and buffers are meant.
        kinds: by kind of tensor, what makes it whole; called by all ranks alike.
        rank: of this process.
        world_size: of the run.
    """
    found: dict[str, Tensor] = {}
    parameters = dict(network.named_parameters())
    mine = shares(parameters, rank, world_size)
    for name, parameter in parameters.items():
        for kind, whole in kinds.items():
            value = whole(name, parameter)
            if value is not None and name in mine:
                found[f"{kind}/{name}"] = _copy(value)
    if rank == 0:
        found |= {f"buffers/{name}": _copy(value) for name, value in network.named_buffers()}
    return found


@torch.no_grad()
def put_buffers(network: nn.Module, stored: StoredState) -> None:
    """The stored buffers into a network."""
    for name, value in network.named_buffers():
        value.copy_(stored[f"buffers/{name}"])


def _copy(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True).contiguous()


def moments(state: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of an optimiser's state of one parameter, without its count of steps."""
    return {k: v for k, v in state.items() if k != "step" and isinstance(v, Tensor)}
