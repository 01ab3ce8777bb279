"""Files of other people's weights: opened without running what is in them, loaded whole.

    file -> {name: tensor} without wrappers and prefixes -> network, strictly

A `.safetensors` file holds tensors alone. A torch file is a pickle: torch's restricted
unpickler builds tensors, plain containers and the few inert classes listed here, and refuses
everything else. No name is missing or left over in silence.
"""

from __future__ import annotations

import argparse
import pickle
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from raylarge.errors import UserError

State = dict[str, Tensor]
Module = TypeVar("Module", bound=nn.Module)

_WRAPPERS = ("state_dict", "teacher", "model")
_PREFIXES = ("module.", "backbone.", "encoder.")


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


def content(path: str | Path) -> dict[str, Any]:
    """What a weight file holds, wrappers and all; tensors stay on the disk until they are used.

    Raises:
        UserError: no such file, no such format, no dictionary, or a pickle that holds more than
            tensors and plain values.
    """
    if not Path(path).is_file():
        raise UserError(f"there are no weights at {path}; check the path.")
    try:
        if str(path).endswith(".safetensors"):
            return dict(load_file(path))
        with torch.serialization.safe_globals(list(ALLOWED)):
            found = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError) as error:
        raise UserError(
            f"{path} cannot be opened as a file of tensors ({_reason(error)}); give a "
            f".safetensors file, or a torch file of tensors only."
        ) from error
    if not isinstance(found, Mapping):
        raise UserError(f"{path} holds no named tensors but a {type(found).__name__}.")
    return dict(found)


def read(path: str | Path) -> State:
    """The tensors of a weight file, without known wrappers.

    Raises:
        UserError: as `content`, or no tensors in it.
    """
    found: Mapping[str, Any] = content(path)
    while wrapper := next((k for k in _WRAPPERS if isinstance(found.get(k), Mapping)), None):
        found = found[wrapper]
    state = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    if not state:
        raise UserError(f"{path} holds no named tensors; give a file of a network's weights.")
    return state


def unprefixed(state: State, wanted: Iterable[str]) -> State:
    """Names without the prefixes of training wrappers that the network itself does not use."""
    wanted = list(wanted)
    for prefix in _PREFIXES:
        if not any(name.startswith(prefix) for name in wanted):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def without(state: State, prefixes: tuple[str, ...]) -> State:
    """A state less the tensors whose names start with one of the prefixes."""
    return {name: value for name, value in state.items() if not name.startswith(prefixes)}


def fill(network: Module, state: Mapping[str, Tensor], whose: str) -> Module:
    """Load tensors into a network (which may be on the meta device), as float32 and strictly.

    Raises:
        UserError: names or shapes differ; tells the first ones.
    """
    compare(network.state_dict(), state, whose)
    network.load_state_dict(state, assign=True)
    return network.float().eval().requires_grad_(False)


def compare(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], whose: str) -> None:
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
        UserError: names or shapes differ; tells the first ones.
    """
    network, info = kind.from_pretrained(
        None,
        config=config,
        state_dict=state,
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


def _reason(error: Exception) -> str:
    """The line of torch's long message that says what was refused."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if "GLOBAL" in line or "nsupported" in line]
    return (said or lines or ["unreadable"])[0].rstrip(".")[:200]
