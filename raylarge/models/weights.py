"""Load weight files of any origin: safely and strictly.

    file -> {name: tensor} without wrappers and prefixes (`state_dicts.py`) -> network

A torch file is a pickle: torch's restricted unpickler builds tensors, plain containers and the
few inert classes listed here, and rejects everything else. Missing or unexpected names are
errors. A network gets copies of the tensors and shares no memory with the file.
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
    """Placeholder for a class of another package, whose content is not used."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...


ALLOWED: tuple[Any, ...] = (
    argparse.Namespace,  # DiT and DINO store their arguments
    # Lightning stores the classes of its callbacks.
    (_Inert, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
    (_Inert, "pytorch_lightning.callbacks.early_stopping.EarlyStopping"),
    (_Inert, "pytorch_lightning.utilities.parsing.AttributeDict"),
)


def open_checkpoint(path: str | Path) -> dict[str, Any]:
    """Open a weight file as a dictionary; tensors are memory-mapped where possible.

    Raises:
        UserError: no such file, another format, no dictionary, or a pickle with more than tensors
            and plain values.
    """
    if not Path(path).is_file():
        raise UserError(f"there are no weights at {path}; check the path.")
    try:
        if _is_safetensors(Path(path)):
            return dict(load_file(path))
        with torch.serialization.safe_globals(list(ALLOWED)):
            content = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except Exception as error:  # the unpickler raises anything for damaged files
        raise UserError(
            f"{path} cannot be opened as a file of tensors ({_reason(error)}); give a "
            f".safetensors file, or a torch file of tensors only."
        ) from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} contains no named tensors but a {type(content).__name__}.")
    return dict(content)


def read_tensors(path: str | Path) -> State:
    """Return the tensors of a weight file; of several copies the preferred one (`state_dicts.py`).

    Raises:
        UserError: as `open_checkpoint`, or no tensors.
    """
    content = open_checkpoint(path)
    state = state_dicts.preferred_tensors(content)
    if not state:
        raise UserError(
            f"{path} contains no named tensors, but the keys {state_dicts.key_list(content)}; give "
            "a file of a network's weights."
        )
    return state


def without_prefixes(state: State, prefixes: tuple[str, ...]) -> State:
    """Return a state without the tensors whose names start with one of the prefixes."""
    return {name: value for name, value in state.items() if not name.startswith(prefixes)}


@dataclass(frozen=True)
class FittedNetwork(Generic[Module]):
    """A network on the meta device, and tensors of its names and shapes that are not read yet.

    Attributes:
        network: without values.
        state: tensors by the network's own names.
        whose: name of the network in messages.
    """

    network: Module
    state: State
    whose: str

    def load(self) -> Module:
        """Return the network with the tensors; see `fill`."""
        return fill(self.network, self.state, self.whose)


def fit(
    network: Module, tensors: Mapping[str, Tensor], stored: Callable[[str], str], whose: str
) -> FittedNetwork[Module]:
    """Match tensors of a file to a network.

    Args:
        network: on the meta device.
        tensors: by their names in the file.
        stored: maps a name of the network to that in the file.
        whose: name of the network in messages.

    Raises:
        UserError: names or shapes differ; lists the first ones, as in the file.
    """
    expected = network.state_dict()
    check_names({stored(name): tensor for name, tensor in expected.items()}, tensors, whose)
    return FittedNetwork(network, {name: tensors[stored(name)] for name in expected}, whose)


def fill(network: Module, state: Mapping[str, Tensor], whose: str) -> Module:
    """Copy tensors into a network, which may be on the meta device, as float32 and strictly.

    Raises:
        UserError: names or shapes differ, integers replace floating-point values or vice versa,
            or values are NaN or infinite; lists the first ones.
    """
    expected = network.state_dict()
    check_names(expected, state, whose)
    mistyped = [
        f"{name} {tensor.dtype}"
        for name, tensor in state.items()
        if tensor.is_floating_point() != expected[name].is_floating_point()
    ]
    refuse(whose, mistyped=mistyped)
    copies = {name: _copy(tensor) for name, tensor in state.items()}
    check_finite(copies, whose)
    network.load_state_dict(copies, assign=True)
    return network.float().eval().requires_grad_(False)


def is_finite(tensor: Tensor) -> bool:
    """Return whether no value of a tensor is NaN or infinite, in one pass without temporaries."""
    if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
        return True
    low, high = torch.aminmax(tensor.detach())  # NaN if any value is
    return bool(low.isfinite() and high.isfinite())


def check_finite(state: Mapping[str, Tensor], whose: str) -> None:
    """Check that tensors contain no NaN and no infinity, which would give black images.

    Called at every load, not once per digest: a file may change after its digest was written, and
    the check takes a few per cent of the loading time.

    Raises:
        UserError: lists the first such tensors.
    """
    broken = [name for name, tensor in state.items() if not is_finite(tensor)]
    if broken:
        names = f"{', '.join(broken[:3])}{', …' if len(broken) > 3 else ''}"
        raise UserError(
            f"{whose}: {len(broken)} of {len(state)} tensors hold NaN or infinite values "
            f"({names}); the weights are damaged or come from a training that diverged: use an "
            f"earlier checkpoint, or copy the file again."
        )


def check_names(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], whose: str) -> None:
    """Check that a state has exactly the expected names and shapes.

    Raises:
        UserError: names or shapes differ; lists the first ones.
    """
    refuse(
        whose,
        missing=[name for name in expected if name not in state],
        unexpected=[name for name in state if name not in expected],
        misshaped=[
            f"{name} {list(state[name].shape)} instead of {list(tensor.shape)}"
            for name, tensor in expected.items()
            if name in state and state[name].shape != tensor.shape
        ],
    )


def fill_transformers(
    kind: Any, config: Any, state: State, whose: str, **options: Any
) -> nn.Module:
    """Build a network of transformers with the tensors of a state, as float32 and strictly.

    transformers renames tensors with old names.

    Raises:
        UserError: names or shapes differ, or values are NaN or infinite; lists the first ones.
    """
    copies = {name: _copy(tensor) for name, tensor in state.items()}
    check_finite(copies, whose)
    network, info = kind.from_pretrained(
        None,
        config=config,
        state_dict=copies,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported below, by name
        **options,
    )
    faults = {kind: sorted(map(str, info[f"{kind}_keys"])) for kind in ("missing", "unexpected")}
    misshaped = sorted(str(fault[0]) for fault in info["mismatched_keys"])
    refuse(whose, **faults, misshaped=misshaped)
    loaded: nn.Module = network.float().eval().requires_grad_(False)
    return loaded


def refuse(whose: str, **faults: Sequence[str]) -> None:
    """Raise if any kind of fault has names.

    Raises:
        UserError: lists the first names of each kind.
    """
    messages = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for kind, names in faults.items()
        if names
    ]
    if messages:
        raise UserError(
            f"these are not the weights of {whose}: {'; '.join(messages)}; check the file."
        )


def _copy(tensor: Tensor) -> Tensor:
    """Return a copy that shares no memory; floating-point values as float32."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)


def _is_safetensors(path: Path) -> bool:
    """Return whether a file starts with the length of a JSON header, as safetensors do."""
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size


def _reason(error: Exception) -> str:
    """Return what is wrong with a file, without torch's advice on how to trust it."""
    rejected = re.search(r"GLOBAL ([\w.]+)", str(error))
    if rejected:
        return f"it contains a {rejected[1]}, which is no tensor"
    if isinstance(error, PermissionError):
        return "permission denied"
    return "it is damaged, or has another format"
