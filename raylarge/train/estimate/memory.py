"""What a pass of training holds and computes, from shapes alone: nothing is allocated.

    network, batch -fake tensors-> forward, backward -> Pass -of two batches-> Activations

Fake tensors have shapes and types and no values (torch's `FakeTensorMode`); they stand for
tensors on the CPU, whose attention is a fused one as on CUDA, and norms are cast as CUDA's
autocast does. The same count of real tensors gives the same bytes. Left out: workspaces inside
operators, the allocator's gaps.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from raylarge.errors import UserError
from raylarge.train.activations import recompute
from raylarge.train.task import Batch

_SIZES = (64, 128)
"""Samples of the two batches that lines are laid through. A peak is the largest of several
moments, each linear in the batch; among small batches the moment changes, among large no more."""

_NORMS = nn.GroupNorm | nn.LayerNorm | nn.modules.batchnorm._BatchNorm
"""What CUDA's autocast computes in float32. The CPU's, under which fake tensors run, does not."""


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass of a batch, in bytes and FLOPs.

    Attributes:
        saved: what the forward pass keeps for the backward one; each storage counts once, and
            parameters and buffers, which are there anyhow, do not.
        ahead: the most that was held at a time in the forward pass.
        back: and in the backward pass, where a gradient is gone once it is whole.
        forward: FLOPs of the forward pass.
        flops: of both passes.
    """

    saved: int
    ahead: int
    back: int
    forward: int
    flops: int


@dataclass(frozen=True)
class LinearFit:
    """Bytes that grow with the batch."""

    fixed: float
    sample: float

    @staticmethod
    def through(few: int, many: int) -> LinearFit:
        """The line through the figures of `_SIZES`."""
        slope = (many - few) / (_SIZES[1] - _SIZES[0])
        return LinearFit(few - _SIZES[0] * slope, slope)

    def at(self, samples: int) -> float:
        """Bytes of a batch."""
        return self.fixed + self.sample * samples


@dataclass(frozen=True)
class Activations:
    """A pass as it grows with the batch.

    Attributes:
        saved: bytes kept for the backward pass; what is fixed are weights in half precision.
        ahead: at the worst moment of the forward pass.
        back: at the worst moment of the backward pass.
        forward: FLOPs of a sample's forward pass.
        flops: of a sample's training: forward, backward, and what is computed again.
    """

    saved: LinearFit
    ahead: LinearFit
    back: LinearFit
    forward: float
    flops: float

    def peak(self, samples: int) -> float:
        """Bytes at the worst moment of a pass of so many samples."""
        return max(self.ahead.at(samples), self.back.at(samples))

    def most(self, room: float) -> int:
        """The most samples of a pass in so many bytes; 0 where not even one has room."""
        lines = (self.ahead, self.back)
        return max(0, int(min((room - line.fixed) / line.sample for line in lines)))


def activations(network: nn.Module, batch: Batch, half: bool, again: bool = False) -> Activations:
    """What a network's training pass holds and computes; its weights may be on any device.

    Args:
        network: network(batch) is the loss of each sample.
        batch: some samples, on the CPU; only types and the shape of one sample matter.
        half: autocast to bfloat16.
        again: with activation checkpointing.

    Raises:
        UserError: a network whose forward pass looks at values.
    """
    few, many = (on_paper(network, batch, size, half, again) for size in _SIZES)
    return Activations(
        saved=LinearFit.through(few.saved, many.saved),
        ahead=LinearFit.through(few.ahead, many.ahead),
        back=LinearFit.through(few.back, many.back),
        forward=many.forward / _SIZES[1],
        flops=many.flops / _SIZES[1],
    )


def training_flops(network: nn.Module, batch: Batch, again: bool = False) -> float | None:
    """FLOPs of training on one sample; None where a pass on paper fails.

    It stands beside the curve, so whatever goes wrong must not stop a training. Frozen parts
    count as they are used.

    Args:
        network: a task's, before an engine shards it.
        batch: as `TrainTask.draw` gives it.
        again: with activation checkpointing.
    """
    silent = logging.root.manager.disable
    logging.disable(logging.ERROR)  # torch tells at length what a fake tensor cannot do
    try:
        size = len(batch["sample"])
        return on_paper(network, batch, size, False, again).flops / size
    except Exception:  # any of torch's own, too
        return None
    finally:
        logging.disable(silent)


def on_paper(network: nn.Module, batch: Batch, size: int, half: bool, again: bool = False) -> Pass:
    """A pass of a batch of any size, of fake tensors; arguments and errors as `activations`."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = _copied(network, mode).train()
    if again:
        recompute(fake)
    with mode:
        shapes = {name: (size, *value.shape[1:]) for name, value in batch.items()}
        given = {name: torch.empty(shapes[name], dtype=batch[name].dtype) for name in batch}
        try:
            return measured(fake, given, half)
        except DataDependentOutputException as error:
            raise UserError(
                f"{type(network).__name__} cannot be planned on paper: its forward pass looks at "
                f"values ({error}); train it for a minute instead."
            ) from error


def measured(network: nn.Module, batch: Batch, half: bool) -> Pass:
    """A pass of tensors on the CPU, real or fake, as it would be on CUDA.

    Afterwards the trained parameters have no gradients: each is dropped when it is whole.
    """
    held = {_storage(tensor)._cdata for tensor in tensors(network)}
    saved: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        if storage._cdata not in held:
            saved[storage._cdata] = storage  # the storage, so that its place stays taken
        return tensor

    with ExitStack() as stack:
        stack.enter_context(_unfused_layers())
        stack.enter_context(_without_gradients(network))
        watch = stack.enter_context(_Watch(batch, held))
        if half:
            stack.enter_context(_exact_norms(network))
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=half)
        with autocast, torch.autograd.graph.saved_tensors_hooks(keep, _same):
            losses = network(batch)
        kept = sum(storage.nbytes() for storage in saved.values())
        saved.clear()
        forward, ahead, watch.peak = watch.flops, watch.peak, watch.now
        losses.float().mean().backward()
        return Pass(kept, ahead, watch.peak, forward, watch.flops)


def modules(network: nn.Module) -> list[nn.Module]:
    """All modules of a network, those too that it keeps in lists or objects to hide them."""
    return [one for one in _inside(network) if isinstance(one, nn.Module)]


def tensors(network: nn.Module) -> list[Tensor]:
    """Parameters, buffers and other tensors of a network and of what it hides, each once."""
    return [one for one in _inside(network) if isinstance(one, Tensor)]


def _inside(network: nn.Module) -> Iterator[Any]:
    """All objects that a network refers to, itself first."""
    seen: set[int] = set()
    ahead: list[Any] = [network]
    for found in ahead:
        if id(found) in seen or isinstance(found, _OPAQUE):
            continue
        seen.add(id(found))
        yield found
        if isinstance(found, Mapping):
            ahead += found.values()
        elif isinstance(found, list | tuple):
            ahead += found
        elif hasattr(found, "__dict__") and not isinstance(found, Tensor):
            ahead += vars(found).values()


_OPAQUE = (type, str, bytes, FunctionType, MethodType, ModuleType)


def _copied(network: nn.Module, mode: FakeTensorMode) -> Any:
    """A copy of fake tensors on the CPU, which stay there wherever they are sent."""
    memo: dict[int, Any] = {}
    for tensor in tensors(network):
        with mode:
            fake = torch.empty(tensor.shape, dtype=tensor.dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
    copied = copy.deepcopy(network, memo)
    for module in modules(copied):
        module.to = partial(_same, module)  # type: ignore[method-assign]
    return copied


class _Watch(TorchDispatchMode):
    """Bytes of all storages that came up since it was entered and are not gone yet, and FLOPs.

    torch's own counter keeps hold of what activation checkpointing computes again.
    """

    def __init__(self, batch: Batch, held: set[int]) -> None:
        """Take what is there already, and the places of storages that shall not count."""
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._known = set(held)
        for value in batch.values():
            self._enter(value)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # fmt: skip
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += int(count(*args, **(kwargs or {}), out_val=result))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._enter(leaf)
        return result

    def _enter(self, tensor: Tensor) -> None:
        storage = _storage(tensor)
        place, size = storage._cdata, storage.nbytes()
        if place not in self._known:
            self._known.add(place)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._leave, place, size).atexit = False

    def _leave(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.now -= size


@contextmanager
def _exact_norms(network: nn.Module) -> Iterator[None]:
    """Norms cast what they are given to float32 and keep that, as under CUDA's autocast."""

    def cast(_norm: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(one.float() for one in inputs)

    norms = [one for one in modules(network) if isinstance(one, _NORMS)]
    hooks = [one.register_forward_pre_hook(cast) for one in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _unfused_layers() -> Iterator[None]:
    """Without the one operator for a whole attention layer, whose FLOPs nobody counts."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


@contextmanager
def _without_gradients(network: nn.Module) -> Iterator[None]:
    """Drop every gradient once it is whole: the states count them, all at once."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    trained = [one for one in network.parameters() if one.requires_grad]
    hooks = [one.register_post_accumulate_grad_hook(drop) for one in trained]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()


def _same(value: Any, *_ignored: Any, **_named: Any) -> Any:
    return value
