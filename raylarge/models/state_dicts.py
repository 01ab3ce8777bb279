"""Find a network's state dict in a checkpoint of any training tool.

    {"state_dict": {…}, "state_dict_ema": {"module.w": …}}  ->  "state_dict_ema", {"w": …}

A checkpoint may hold several copies of the weights. Averaged ones come first (`AVERAGED`: tools
that save an average evaluate it, such as timm, DeiT, DiT, DINO, I-JEPA and BasicSR), then the
weights as trained (`PLAIN`), then the top level of the file. All other keys are ignored. A copy
may also be marked by the first word of flat names (`teacher.backbone.w`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raylarge.errors import UserError

State = dict[str, Tensor]

AVERAGED = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict", "ema_model"),
    *("params_ema", "ema", "shadow", "teacher", "target_encoder"),
)
PLAIN = (
    *("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network"),
    *("params", "weights", "backbone", "student", "encoder_q", "base_encoder", "encoder"),
)
"""`encoder_q` and `base_encoder` are MoCo's, whose authors evaluate these instead of averages."""
_SEGMENTS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of names that torch.compile and FSDP insert."""
PREFIXES = ("module.", "_forward_module.", "backbone.", "encoder.")
_MIN_SHARE = 0.5
"""Least share of a network's names, or of the largest copy's tensors, for a copy of the network."""


class StateCopy(NamedTuple):
    """One of several copies of a network's tensors in a file."""

    key: str
    """Key in the file, such as `model.ema`; empty for the top level."""
    state: State


class ChosenState(NamedTuple):
    """The preferred copy, and the keys of the others."""

    key: str
    state: State
    others: tuple[str, ...]


def preferred_tensors(content: Mapping[Any, Any]) -> State:
    """Return the tensors of the preferred copy; empty if there are none.

    Values other than tensors and arrays, and names other than strings, are ignored.
    """
    copies = list(_copies(content))
    return _without_small(copies)[0].state if copies else {}


def choose(
    content: Mapping[Any, Any], expected: Mapping[str, Tensor], prefixes: Sequence[str] = PREFIXES
) -> ChosenState:
    """Return the preferred copy of one network's tensors, without prefixes of training tools.

    Args:
        content: of the file.
        expected: the network's tensors; their values do not matter.
        prefixes: of training tools, to remove.

    Raises:
        UserError: no tensors, or two of the same name without prefixes.
    """
    copies = list(_copies(content))
    if not copies:
        raise UserError(f"it contains no named tensors; its keys: {key_list(content)}.")
    flat = [copy for copy in copies for copy in (*_groups(copy, AVERAGED), copy)]
    flat += [group for copy in copies for group in _groups(copy, PLAIN)]
    flat.sort(key=lambda copy: _rank(copy.key))
    fitting = (copy for copy in flat if _fits(copy.state, expected))
    best = next(fitting, None) or _without_small(copies)[0]
    others = tuple(dict.fromkeys(copy.key for copy in copies if copy.key and copy.key != best.key))
    return ChosenState(best.key, strip_prefixes(best.state, expected, prefixes), others)


def key_list(content: Mapping[Any, Any]) -> str:
    """Return the first keys of a file, for a message."""
    names = [str(key)[:60] for key in content]
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "") or "none"


def strip_prefixes(
    state: Mapping[str, Tensor], expected: Collection[str], prefixes: Sequence[str] = PREFIXES
) -> State:
    """Return a state without prefixes of training tools, except those that the network uses.

    They are removed in any order and number: `module._orig_mod.backbone.w` becomes `w`.

    Raises:
        UserError: two different tensors would have the same name.
    """
    prefixes = _foreign(prefixes, expected)
    result: State = {}
    sources: dict[str, str] = {}
    for name, tensor in state.items():
        short = _short(name, prefixes)
        if short in result and not torch.equal(result[short], tensor):
            raise UserError(
                f"{sources[short]} and {name} are two tensors of the same name, {short}."
            )
        result[short], sources[short] = tensor, name
    if "n_averaged" not in expected:  # the counter of torch's AveragedModel
        result.pop("n_averaged", None)
    return result


def _foreign(prefixes: Sequence[str], expected: Collection[str]) -> tuple[str, ...]:
    """Return the prefixes that do not occur in the network's own names."""
    return tuple(p for p in prefixes if not any(name.startswith(p) for name in expected))


def _short(name: str, prefixes: tuple[str, ...]) -> str:
    """Return a name without the segments and prefixes of training tools."""
    short = ".".join(part for part in name.split(".") if part not in _SEGMENTS)
    while prefix := next((p for p in prefixes if short.startswith(p)), ""):
        short = short.removeprefix(prefix)
    return short


def _copies(content: Mapping[Any, Any], path: str = "") -> Iterator[StateCopy]:
    """Yield the copies in a file, the preferred one first."""
    yield from _nested(content, path, AVERAGED)
    yield from _nested(content, path, PLAIN)
    named = {
        name: tensor
        for name, value in content.items()
        if isinstance(name, str) and (tensor := _tensor(value)) is not None
    }
    if named:
        yield StateCopy(path, named)


def _nested(content: Mapping[Any, Any], path: str, names: Collection[str]) -> Iterator[StateCopy]:
    for key in names:
        inner = content.get(key)
        if isinstance(inner, Mapping):
            yield from _copies(inner, f"{path}.{key}" if path else key)


def _groups(copy: StateCopy, words: Collection[str]) -> Iterator[StateCopy]:
    """Yield the copies that are marked by a first word of their flat names."""
    short = {_short(name, PREFIXES): tensor for name, tensor in copy.state.items()}
    for word in words:
        start = f"{word}."
        named = {k.removeprefix(start): v for k, v in short.items() if k.startswith(start)}
        if named:
            yield StateCopy(f"{copy.key}.{word}" if copy.key else word, named)


def _rank(key: str) -> bool:
    """Return a sort key that puts averaged copies first."""
    return not any(part in AVERAGED for part in key.split("."))


def _fits(state: State, expected: Mapping[str, Tensor]) -> bool:
    """Return whether a state contains most of a network's tensors, by name and shape."""
    prefixes = _foreign(PREFIXES, expected)
    shapes = {_short(name, prefixes): tensor.shape for name, tensor in state.items()}
    matching = sum(shapes.get(name) == tensor.shape for name, tensor in expected.items())
    return matching > _MIN_SHARE * len(expected)


def _without_small(copies: list[StateCopy]) -> list[StateCopy]:
    """Return the copies without those that are too small to be the network."""
    most = max(len(copy.state) for copy in copies)
    return [copy for copy in copies if len(copy.state) >= _MIN_SHARE * most]


def _tensor(value: Any) -> Tensor | None:
    """Convert a tensor or an array to a tensor; return None for anything else."""
    if isinstance(value, Tensor):
        return value
    try:
        return torch.as_tensor(value) if hasattr(value, "__array__") else None
    except (TypeError, ValueError):  # an array of strings or objects
        return None
