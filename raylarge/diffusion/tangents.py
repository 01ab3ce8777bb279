"""Tangent rules: how each torch operation maps a direction at its inputs to its output.

    rule(call) -> value, {argument: tangent} -> tangent of the value

There are rules for the operations of denoisers and autoencoders; all others are differentiated
one by one with `torch.func.jvp`. Normalisations and element-wise functions have a symmetric
Jacobian apart from their weights, so torch's backward kernels compute their tangents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Key = int | str | tuple[int | str, int]
"""Position or name of an argument, or its index in a list at a position."""
Tangents = Mapping[Key, Tensor]
"""Tangents of the arguments that depend on x."""
Rule = Callable[[Any], Any]
"""Tangents -> tangent of the value. Rules are lambdas without annotations: one is created per call,
and the type checks of the tests would slow each."""
aten = torch.ops.aten


@dataclass(frozen=True)
class Call:
    """A call of a torch function; `active` are the keys of the arguments that depend on x."""

    func: Callable[..., Any]
    name: str
    args: Sequence[Any]
    kwargs: dict[str, Any]
    active: tuple[Key, ...]

    def run(self, changed: dict[Key, Any]) -> Any:
        """Call the function with some arguments replaced."""
        args, kwargs = [*self.args], self.kwargs
        for key, value in changed.items():
            if isinstance(key, str):
                kwargs = {**kwargs, key: value}
            elif isinstance(key, int):
                args[key] = value
            elif isinstance(key[0], str):
                items = [*kwargs[key[0]]]
                items[key[1]] = value
                kwargs = {**kwargs, key[0]: items}
            else:
                args[key[0]] = [*args[key[0]]]
                args[key[0]][key[1]] = value
        return self.func(*args, **kwargs)

    def at(self, key: Key) -> Any:
        """Return an argument."""
        if isinstance(key, str):
            return self.kwargs[key]
        if isinstance(key, int):
            return self.args[key]
        return self.at(key[0])[key[1]]

    def named(self, *names: str) -> dict[str, Any]:
        """Return the arguments by name; `names` are those of the positional ones."""
        return {**dict(zip(names, self.args, strict=False)), **self.kwargs}


def jvp_rule(call: Call) -> tuple[Any, Rule]:
    """Differentiate any operation with `torch.func.jvp`, which computes its value again."""
    return call.run({}), partial(_forward_mode, call)


def _forward_mode(call: Call, tangents: Tangents) -> Any:
    primals, along = zip(*((call.at(key), tangents[key]) for key in call.active), strict=True)

    def function(*active):  # type: ignore[no-untyped-def]
        return _tuple(call.run(dict(zip(call.active, active, strict=True))))

    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward mode
        return torch.func.jvp(function, primals, along)[1]


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _linear(call: Call) -> tuple[Any, Rule]:
    """Linear in the active arguments together; in lists, constants count as zero."""
    zeros: dict[Key, Tensor] = {}
    if call.name in ("cat", "stack", "concat"):
        position: int | str = 0 if call.args else "tensors"
        keys = [(position, j) for j in range(len(call.at(position)))]
        constant = [key for key in keys if key not in call.active]
        zeros = {key: torch.zeros_like(call.at(key)) for key in constant}
    return call.run({}), lambda tangents: _tuple(call.run({**zeros, **tangents}))


def _affine(call: Call) -> tuple[Any, Rule]:
    """Convolution or matrix with constant weights: the tangent omits the bias."""
    if call.active != (0,):
        return jvp_rule(call)
    bias: Key = 2 if len(call.args) > 2 else "bias"
    return call.run({}), lambda tangents: call.run({bias: None, **tangents})


def _sum(call: Call) -> tuple[Any, Rule]:
    """Sums and differences; one side may be a constant, the active one may broadcast."""
    if len(call.args) != 2 or call.kwargs:  # alpha
        return jvp_rule(call)
    value = call.run({})
    if len(call.active) == 2:
        return value, call.run
    (active,) = call.active
    subtracted = {"sub": 1, "__sub__": 1, "rsub": 0, "__rsub__": 0}.get(call.name) == active
    shape, dtype, sign = value.shape, value.dtype, torch.neg if subtracted else torch.positive
    return value, lambda tangents: sign(tangents[active].expand(shape).to(dtype))


def _product(call: Call) -> tuple[Any, Rule]:
    """Products: linear in each factor, so the sum of both tangents."""
    return call.run({}), lambda tangents: _added([call.run({k: v}) for k, v in tangents.items()])


def _quotient(call: Call) -> tuple[Any, Rule]:
    """Division by a constant."""
    return _product(call) if call.active == (0,) and not call.kwargs else jvp_rule(call)


def _pointwise(backward: Callable[[Tensor, Tensor, Call], Tensor]) -> Callable[[Call], Any]:
    """Element-wise functions: the backward kernel also maps tangents."""
    return lambda call: (call.run({}), lambda tangents: backward(tangents[0], call.at(0), call))


def _group_norm(call: Call) -> tuple[Any, Rule]:
    """Its Jacobian is symmetric apart from the weight, so the backward kernel maps tangents."""
    of = call.named("input", "num_groups", "weight", "bias", "eps")
    x, groups, weight, eps = of["input"], of["num_groups"], of.get("weight"), of.get("eps", 1e-5)
    size = (x.shape[0], x.shape[1], math.prod(x.shape[2:]), groups)
    value, mean, rstd = torch.native_group_norm(x, weight, of.get("bias"), *size, eps)
    scale = None if weight is None else weight.view(-1, *[1] * (x.ndim - 2))
    back, layout = aten.native_group_norm_backward, _layout(x)

    return value, lambda tangents: _scaled(
        back(tangents[0].contiguous(memory_format=layout), x, mean, rstd, None, *size, INPUT_ALONE),
        scale,
    )


def _layer_norm(call: Call) -> tuple[Any, Rule]:
    """As for the group norm."""
    of = call.named("input", "normalized_shape", "weight", "bias", "eps")
    x, shape, weight, eps = of["input"], of["normalized_shape"], of.get("weight"), of.get("eps")
    eps = 1e-5 if eps is None else eps
    value, mean, rstd = torch.native_layer_norm(x, list(shape), weight, of.get("bias"), eps)
    back = aten.native_layer_norm_backward
    return value, lambda tangents: _scaled(
        back(tangents[0], x, list(shape), mean, rstd, None, None, INPUT_ALONE), weight
    )


def _scaled(gradients: tuple[Any, ...], weight: Tensor | None) -> Tensor:
    x: Tensor = gradients[0]
    return x if weight is None else x * weight


def _attention(call: Call) -> tuple[Any, Rule]:
    """softmax(q k^T s) v: fused for the value, explicit for the tangent."""
    of = call.named("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
    plain = of.get("attn_mask") is None and not of.get("is_causal") and not of.get("dropout_p")
    if not plain or not {*call.active} <= {0, 1, 2}:
        return jvp_rule(call)
    q, k, v = of["query"], of["key"], of["value"]
    s = q.shape[-1] ** -0.5 if of.get("scale") is None else of["scale"]
    return call.run({}), partial(_attended, q * s, k, v, s)


def _attended(q: Tensor, k: Tensor, v: Tensor, s: float, tangents: Tangents) -> Tensor:
    """Return the tangent of softmax(q k^T) v, where q is already scaled by s."""
    dq, dk, dv = (tangents.get(i) for i in range(3))
    p = torch.softmax(q @ k.mT, dim=-1)
    terms = [p @ dv] if dv is not None else []
    scores = [(dq * s) @ k.mT] if dq is not None else []
    scores += [q @ dk.mT] if dk is not None else []
    if scores:
        terms.append(aten._softmax_backward_data(_added(scores), p, -1, p.dtype) @ v)
    return _added(terms)


def _dropout(call: Call) -> tuple[Any, Rule]:
    """The identity, unless the network is in training mode."""
    if call.named("input", "p", "training").get("training", True):
        raise RuntimeError("a network with active dropout cannot be linearized; call eval() first")
    return call.run({}), lambda tangents: tangents[0]


def _added(tangents: list[Tensor]) -> Tensor:
    return reduce(torch.add, tangents)


def _layout(x: Tensor) -> torch.memory_format:
    channels_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def _gelu(v: Tensor, x: Tensor, call: Call) -> Tensor:
    approximate = call.named("input").get("approximate", "none")
    tangent: Tensor = aten.gelu_backward(v, x, approximate=approximate)
    return tangent


INPUT_ALONE = [True, False, False]
"""Output mask of a norm's backward kernel."""
LINEAR = (
    *("view", "reshape", "flatten", "unflatten", "transpose", "permute", "movedim", "squeeze"),
    *("unsqueeze", "expand", "repeat", "contiguous", "chunk", "split", "unbind", "__getitem__"),
    *("to", "float", "double", "half", "bfloat16", "neg", "__neg__", "clone", "view_as"),
    *("pixel_shuffle", "pixel_unshuffle", "interpolate", "avg_pool2d", "cat", "stack", "concat"),
)
LIKE = ("to", "type_as", "view_as", "expand_as", "reshape_as")
"""Operations that use only type or shape of their second argument."""
RULES: dict[str, Callable[[Call], tuple[Any, Rule]]] = {
    **dict.fromkeys(LINEAR, _linear),
    **dict.fromkeys(("conv2d", "linear", "conv_transpose2d"), _affine),
    **dict.fromkeys(("add", "__add__", "__radd__", "sub", "__sub__", "__rsub__", "rsub"), _sum),
    **dict.fromkeys(("mul", "__mul__", "__rmul__", "matmul", "__matmul__", "bmm"), _product),
    **dict.fromkeys(("div", "__truediv__"), _quotient),
    "dropout": _dropout,
    "silu": _pointwise(lambda v, x, _: aten.silu_backward(v, x)),
    "relu": _pointwise(lambda v, x, _: aten.threshold_backward(v, x, 0)),
    "gelu": _pointwise(_gelu),
    "group_norm": _group_norm,
    "layer_norm": _layer_norm,
    "scaled_dot_product_attention": _attention,
}
