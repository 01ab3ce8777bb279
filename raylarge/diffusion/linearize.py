"""linearize: a network's value, and its derivative along a direction, for one pass each.

    value, along = linearize(f, x)        along(v) = df/dx . v

`torch.func.jvp` computes the value anew with each derivative, convolves with the weights' zero
tangents and cannot fuse attention. Here the value is computed as ever, and each operation on
the way leaves a rule for tangents (`tangents.py`).
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
    """Whether a value is being linearized: only operations that torch functions see count."""
    return _ACTIVE.get()


def linearize(
    f: Callable[[Tensor], Tensor], x: Tensor
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """f(x), and the function that gives the derivative of f at x along a direction.

    The function holds what lies between x and f(x) in memory, about as training would.

    Raises:
        RuntimeError: f does not depend on its argument, or changes a tensor in place; so does
            the derivative, where a constant was changed after its use.
    """
    tape = _Tape()
    x = x.view_as(x)  # a name of our own for it
    start = tape.mark(x)
    before = _ACTIVE.set(True)
    try:
        with torch.no_grad(), tape:
            value = f(x)
    finally:
        _ACTIVE.reset(before)
    end = tape.slot(value)
    if end is None:
        raise RuntimeError("what is linearized does not depend on its argument")

    tape.forget_all_but(end)

    @torch.no_grad()
    def along(v: Tensor) -> Tensor:
        return tape.play(start, v, end)

    return value, along


class _Tape(TorchFunctionMode):
    """What was called between x and f(x): (call's slots, rule, value's slots), in order."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[dict[Key, int], Rule, list[int]]] = []
        self.token = object()  # tensors bear it, not the tape: that would be a circle
        self.count = 0
        self.last: list[set[int]] = []
        self.constants: list[tuple[Tensor, int]] = []

    def mark(self, tensor: Tensor) -> int:
        """Give a tensor a slot: it depends on x."""
        tensor._slot = (self.token, self.count)  # type: ignore[attr-defined]
        self.count += 1
        return self.count - 1

    def slot(self, value: Any) -> int | None:
        """The slot of a value, None if it does not depend on x."""
        token, slot = getattr(value, "_slot", (None, None))
        return slot if token is self.token else None

    def forget_all_but(self, end: int) -> None:
        """Drop the steps that a slot does not come from, such as a quantiser's distances."""
        needed, kept, self.last = {end}, [], []
        for step in reversed(self.steps):
            taken, _, given = step
            if needed.intersection(given):
                self.last.append({*taken.values()} - needed)
                needed.update(taken.values())
                kept.append(step)
        self.steps, self.last = kept[::-1], self.last[::-1]

    def play(self, start: int, v: Tensor, end: int) -> Tensor:
        """The tangent at a slot, of that at another."""
        if any(constant._version != version for constant, version in self.constants):
            raise RuntimeError("a constant of what was linearized was changed in place since")
        tangents: dict[int, Any] = {start: v}
        for (taken, rule, given), last in zip(self.steps, self.last, strict=True):
            made = rule({position: tangents[slot] for position, slot in taken.items()})
            tangents.update(zip(given, made if isinstance(made, tuple) else (made,), strict=True))
            for slot in last:  # nobody takes it any more
                del tangents[slot]
        found: Tensor = tangents[end]
        return found

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
        args = [list(a) if isinstance(a, list) else a for a in args]  # theirs may grow
        call = Call(func, getattr(func, "__name__", ""), args, kwargs, tuple(slots))
        if call.name == "detach" or (call.name in LIKE and 0 not in slots):
            return func(*args, **kwargs)  # the value does not depend on x
        if _changes(call):
            raise RuntimeError(f"{call.name} changes a tensor in place: it cannot be linearized")
        value, rule = RULES.get(call.name, jvp_rule)(call)
        several = isinstance(value, (tuple, list))
        made = list(value) if several else [value]
        self.constants += [
            (one, one._version)
            for key, one in _tensors(args, kwargs)
            if isinstance(one, Tensor) and key not in slots and not one.is_inference()
        ]
        smooth = [isinstance(one, Tensor) and one.is_floating_point() for one in made]
        if all(smooth):
            self.steps.append((slots, rule, [self.mark(one) for one in made]))
        elif any(smooth) or any(isinstance(one, Tensor) and one.is_complex() for one in made):
            raise RuntimeError(f"{call.name} gives values without a derivative beside others")
        return value


NOWHERE = (None, 0)
"""The slot of a tensor that depends on nothing."""


def _tensors(args: Any, kwargs: Any) -> Iterator[tuple[Key, Any]]:
    """A call's tensors, and where they stand; lists are looked into."""
    for key, argument in (*enumerate(args), *kwargs.items()):
        if isinstance(argument, Tensor):
            yield key, argument
        elif isinstance(argument, (list, tuple)):
            yield from (((key, j), one) for j, one in enumerate(argument))


def _changes(call: Call) -> bool:
    name, told = call.name, call.kwargs.get("inplace") or call.kwargs.get("out") is not None
    inplace = name.endswith("_") and not name.endswith("__")
    return bool(inplace or name.startswith("__i") or name == "__setitem__" or told)
