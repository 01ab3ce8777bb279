"""Files of other people's weights: opened without running what is in them, loaded whole.

    file -> {name: tensor} without wrappers and prefixes (`state_dicts.py`) -> network, strictly

A safetensors file, whatever it is called, holds tensors alone. A torch file is a pickle: torch's
restricted unpickler builds tensors, plain containers and the few inert classes listed here, and
refuses everything else. No name is missing or left over in silence, and a network owns its
tensors: it shares none with the file or with whoever gave them.
"""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from raylarge.errors import UserError
from raylarge.models import state_dicts
from raylarge.models.state_dicts import State

Module = TypeVar("Module", bound=nn.Module)


class _Inert:
    """Stands for a class of another package; its content is read and never used."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...


ALLOWED: tuple[Any, ...] = (
    argparse.Namespace,  # DiT's and DINO's training codes store their arguments
    # Lightning's checkpoints name their callbacks by class.
    (_Inert, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
    (_Inert, "pytorch_lightning.callbacks.early_stopping.EarlyStopping"),
    (_Inert, "pytorch_lightning.utilities.parsing.AttributeDict"),
)


def open_checkpoint(path: str | Path) -> dict[str, Any]:
    """What a weight file holds, wrappers and all; tensors stay on the disk until they are used.

    Raises:
        UserError: no such file, no such format, no dictionary, or a pickle that holds more than
            tensors and plain values.
    """
    if not Path(path).is_file():
        raise UserError(f"there are no weights at {path}; check the path.")
    try:
        if _is_safetensors(Path(path)):
            return dict(load_file(path))
        with torch.serialization.safe_globals(list(ALLOWED)):
            found = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except Exception as error:  # of a damaged file torch's unpickler raises anything at all
        raise UserError(
            f"{path} cannot be opened as a file of tensors ({_reason(error)}); give a "
            f".safetensors file, or a torch file of tensors only."
        ) from error
    if not isinstance(found, Mapping):
        raise UserError(f"{path} holds no named tensors but a {type(found).__name__}.")
    return dict(found)


def read_tensors(path: str | Path) -> State:
    """Return the tensors of a weight file, of several copies the preferred one (`state_dicts.py`).

    Raises:
        UserError: as `open_checkpoint`, or no tensors in it.
    """
    stored = open_checkpoint(path)
    state = state_dicts.preferred_tensors(stored)
    if not state:
        raise UserError(
            f"{path} holds no named tensors, but the keys {state_dicts.key_list(stored)}; give "
            "a file of a network's weights."
        )
    return state


def without_prefixes(state: State, prefixes: tuple[str, ...]) -> State:
    """A state less the tensors whose names start with one of the prefixes."""
    return {name: value for name, value in state.items() if not name.startswith(prefixes)}


@dataclass(frozen=True)
class FittedNetwork(Generic[Module]):
    """A network on the meta device and the tensors that fit it; none of them is read yet.

    Attributes:
        network: without values.
        state: tensors by the network's own names, each of the shape that it wants.
        whose: what the network is called in messages.
    """

    network: Module
    state: State
    whose: str

    def load(self) -> Module:
        """The network with the tensors, as float32, in evaluation mode.

        Raises:
            UserError: as `fill`.
        """
        return fill(self.network, self.state, self.whose)


def fit(
    network: Module, found: Mapping[str, Tensor], stored: Callable[[str], str], whose: str
) -> FittedNetwork[Module]:
    """Fit tensors to a network, in the names of the file.

    Args:
        network: on the meta device.
        found: the file's tensors.
        stored: from a name of the network to the one that the file has for it.
        whose: what the network is called in messages.

    Raises:
        UserError: names or shapes differ; tells the first ones, as the file names them.
    """
    wanted = network.state_dict()
    check_names({stored(name): tensor for name, tensor in wanted.items()}, found, whose)
    return FittedNetwork(network, {name: found[stored(name)] for name in wanted}, whose)


def fill(network: Module, state: Mapping[str, Tensor], whose: str) -> Module:
    """Copy tensors into a network (which may be on the meta device), as float32 and strictly.

    Raises:
        UserError: names or shapes differ, integers stand where fractions belong, or values are
            NaN or infinite; tells the first ones.
    """
    wanted = network.state_dict()
    check_names(wanted, state, whose)
    mistyped = [
        f"{name} {tensor.dtype}"
        for name, tensor in state.items()
        if tensor.is_floating_point() != wanted[name].is_floating_point()
    ]
    refuse(whose, mistyped=mistyped)
    own = {name: _own(tensor) for name, tensor in state.items()}
    check_finite(own, whose)
    network.load_state_dict(own, assign=True)
    return network.float().eval().requires_grad_(False)


def is_finite(tensor: Tensor) -> bool:
    """Return whether no value of a tensor is NaN or infinite: one pass without temporaries.

    A tensor on the meta device has no values.
    """
    if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
        return True
    low, high = torch.aminmax(tensor.detach())  # NaN if any value is
    return bool(low.isfinite() and high.isfinite())


def check_finite(state: Mapping[str, Tensor], whose: str) -> None:
    """Refuse tensors that hold NaN or infinity; a network would compute black pictures of them.

    This is checked whenever weights are loaded, not once per digest: a file may change after its
    digest was written, and the pass takes a few per cent of the time of loading.

    Raises:
        UserError: names the first such tensors.
    """
    broken = [name for name, tensor in state.items() if not is_finite(tensor)]
    if broken:
        some = f"{', '.join(broken[:3])}{', …' if len(broken) > 3 else ''}"
        raise UserError(
            f"{whose}: {len(broken)} of {len(state)} tensors hold NaN or infinite values ({some}); "
            f"the weights are damaged or come from a training that diverged: use an earlier "
            f"checkpoint, or copy the file again."
        )


def check_names(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], whose: str) -> None:
    """Refuse tensors that are not exactly those wanted.

    Raises:
        UserError: names or shapes differ; tells the first ones.
    """
    refuse(
        whose,
        missing=[name for name in wanted if name not in found],
        unexpected=[name for name in found if name not in wanted],
        misshaped=[
            f"{name} {list(found[name].shape)} instead of {list(tensor.shape)}"
            for name, tensor in wanted.items()
            if name in found and found[name].shape != tensor.shape
        ],
    )


def fill_transformers(
    kind: Any, config: Any, state: State, whose: str, **options: Any
) -> nn.Module:
    """A network of transformers with the tensors of a state, as float32 and strictly.

    Tensors under old names are renamed by transformers itself.

    Raises:
        UserError: names or shapes differ, or values are NaN or infinite; tells the first ones.
    """
    own = {name: _own(tensor) for name, tensor in state.items()}
    check_finite(own, whose)
    network, info = kind.from_pretrained(
        None,
        config=config,
        state_dict=own,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # told below, by name
        **options,
    )
    faults = {kind: sorted(map(str, info[f"{kind}_keys"])) for kind in ("missing", "unexpected")}
    misshaped = sorted(str(fault[0]) for fault in info["mismatched_keys"])
    refuse(whose, **faults, misshaped=misshaped)
    filled: nn.Module = network.float().eval().requires_grad_(False)
    return filled


def refuse(whose: str, **faults: Sequence[str]) -> None:
    """Refuse a file of weights where any kind of fault has names.

    Raises:
        UserError: tells the first names of each kind.
    """
    told = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for kind, names in faults.items()
        if names
    ]
    if told:
        raise UserError(f"these are not the weights of {whose}: {'; '.join(told)}; check the file.")


def _own(tensor: Tensor) -> Tensor:
    """A copy that shares nothing with a caller or a mapped file; fractions as float32."""
    kind = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to(kind, copy=True, memory_format=torch.contiguous_format)


def _is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors does: the length of a header in JSON, then that."""
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size


def _reason(error: Exception) -> str:
    """What is wrong with a file; torch's own advice, how to trust it, is not passed on."""
    refused = re.search(r"GLOBAL ([\w.]+)", str(error))
    if refused:
        return f"it holds a {refused[1]}, which is no tensor"
    if isinstance(error, PermissionError):
        return "it may not be read"
    return "it is damaged, or of another kind"
