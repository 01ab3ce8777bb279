"""Linearize a function: its value, and its derivative along a direction, for one pass each.

    value, along = linearize(f, x)        along(v) = df/dx . v

`torch.func.jvp` computes the value again with each derivative, convolves with the zero tangents
of weights and cannot use fused attention. Here the value is computed as usual while each torch
operation records a rule for its tangent (`tangents.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from raylarge.diffusion.tangents import LIKE, RULES, Call, Key, Rule, jvp_rule

_ACTIVE = ContextVar("linearizing", default=False)


def linearizing() -> bool:
    """Return whether a value is being linearized; compiled code would hide its operations."""
    return _ACTIVE.get()


def linearize(
    f: Callable[[Tensor], Tensor], x: Tensor
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return f(x), and a function from a direction v to the derivative of f at x along v.

    The function keeps the intermediate values of f in memory, about as many as training would.

    Raises:
        RuntimeError: f does not depend on its argument or changes a tensor in place. The
            returned function raises it if a constant was changed in place after its use.
    """
    tape = _Tape()
    x = x.view_as(x)  # the attribute set by `mark` must not stay on the argument
    start = tape.mark(x)
    before = _ACTIVE.set(True)
    try:
        with torch.no_grad(), tape:
            value = f(x)
    finally:
        _ACTIVE.reset(before)
    end = tape.slot(value)
    if end is None:
        raise RuntimeError("the linearized function does not depend on its argument")
    tape.keep_ancestors(end)

    @torch.no_grad()
    def along(v: Tensor) -> Tensor:
        return tape.play(start, v, end)

    return value, along


class _Tape(TorchFunctionMode):
    """Records the calls between x and f(x) in order: (input slots, rule, output slots)."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[dict[Key, int], Rule, list[int]]] = []
        self.token = object()  # tensors refer to it, not to the tape: no reference cycle
        self.count = 0
        self.expired: list[set[int]] = []  # per step, the slots that no later step reads
        self.constants: list[tuple[Tensor, int]] = []

    def mark(self, tensor: Tensor) -> int:
        """Give a tensor that depends on x the next slot."""
        tensor._slot = (self.token, self.count)  # type: ignore[attr-defined]
        self.count += 1
        return self.count - 1

    def slot(self, value: Any) -> int | None:
        """Return the slot of a value; None if it does not depend on x."""
        token, slot = getattr(value, "_slot", (None, None))
        return slot if token is self.token else None

    def keep_ancestors(self, end: int) -> None:
        """Drop the steps that a slot does not depend on, such as a quantiser's distances."""
        needed, steps, expired = {end}, [], []
        for inputs, rule, outputs in reversed(self.steps):
            if needed.intersection(outputs):
                expired.append({*inputs.values()} - needed)
                needed.update(inputs.values())
                steps.append((inputs, rule, outputs))
        self.steps, self.expired = steps[::-1], expired[::-1]

    def play(self, start: int, v: Tensor, end: int) -> Tensor:
        """Return the tangent at slot `end` for tangent v at slot `start`."""
        if any(constant._version != version for constant, version in self.constants):
            raise RuntimeError("a constant of the linearized function was changed in place since")
        tangents: dict[int, Any] = {start: v}
        for (inputs, rule, outputs), expired in zip(self.steps, self.expired, strict=True):
            value = rule({key: tangents[slot] for key, slot in inputs.items()})
            values = value if isinstance(value, tuple) else (value,)
            tangents.update(zip(outputs, values, strict=True))
            for slot in expired:
                del tangents[slot]
        tangent: Tensor = tangents[end]
        return tangent

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        token = self.token
        slots: dict[Key, int] = {
            key: argument._slot[1]
            for key, argument in _tensors(args, kwargs)
            if getattr(argument, "_slot", NOWHERE)[0] is token
        }
        if not slots:
            return func(*args, **kwargs)
        args = [
            list(a) if isinstance(a, list) else a for a in args
        ]  # the caller may extend its list
        call = Call(func, getattr(func, "__name__", ""), args, kwargs, tuple(slots))
        if call.name == "detach" or (call.name in LIKE and 0 not in slots):
            return func(*args, **kwargs)  # the value does not depend on x
        if _is_in_place(call):
            raise RuntimeError(f"{call.name} changes a tensor in place: it cannot be linearized")
        value, rule = RULES.get(call.name, jvp_rule)(call)
        values = list(value) if isinstance(value, (tuple, list)) else [value]
        self.constants += [
            (tensor, tensor._version)
            for key, tensor in _tensors(args, kwargs)
            if isinstance(tensor, Tensor) and key not in slots and not tensor.is_inference()
        ]
        smooth = [isinstance(v, Tensor) and v.is_floating_point() for v in values]
        if all(smooth):
            self.steps.append((slots, rule, [self.mark(v) for v in values]))
        elif any(smooth) or any(isinstance(v, Tensor) and v.is_complex() for v in values):
            raise RuntimeError(f"{call.name} returns some values without a derivative")
        return value


NOWHERE = (None, 0)
"""Slot of a tensor that does not depend on x."""


def _tensors(args: Any, kwargs: Any) -> Iterator[tuple[Key, Any]]:
    """Yield the tensors of a call with their keys, also those inside lists."""
    for key, argument in (*enumerate(args), *kwargs.items()):
        if isinstance(argument, Tensor):
            yield key, argument
        elif isinstance(argument, (list, tuple)):
            yield from (((key, j), item) for j, item in enumerate(argument))


def _is_in_place(call: Call) -> bool:
    name, kwargs = call.name, call.kwargs
    return bool(
        (name.endswith("_") and not name.endswith("__"))
        or name.startswith("__i")
        or name == "__setitem__"
        or kwargs.get("inplace")
        or kwargs.get("out") is not None
    )
