"""The first requests of a plan: the context tokens of its windows.

prior's vector -> imagined ─┐
image -> given -> inverted ─┼-> draw/…: tokens of a batch of windows
guide ---------> inverted ──┘   (or straight from embeddings, the CDM, or nothing)
"""

from __future__ import annotations

from raylarge.order import Order
from raylarge.sampling.plan import Request
from raylarge.sampling.tasks import Cells, EncodeContext, InvertImage, LoadSource, SamplePrior

GRIDS = {"inverted": "inverted", "prior": "imagined"}
"""Kinds of conditions that are cut out of a grid, and the request that gives it."""


def grids(order: Order, top: int, *, guided: bool) -> list[Request]:
    """Return the requests that `encode_context` depends on: image, prior's grid, inversion.

    Args:
        top: scale of the guide, or of the order's own image.
        guided: whether a guide is sampled, under an id of that name.
    """
    requests: list[Request] = []
    kinds: set[str] = {order.condition.kind}
    if order.algorithm == "superres":
        requests.append(Request("given", LoadSource(order)))
    if guided:
        kinds.add(order.condition.fine_kind)
    if "prior" in kinds:
        requests.append(Request("imagined", SamplePrior(order)))
    if "inverted" in kinds:
        source = "guide" if guided else "given"
        requests.append(
            Request("inverted", InvertImage(order.without_payload(), top), {"image": source})
        )
    return requests


def encode_context(id: str, order: Order, scale: int, windows: Cells, *, guided: bool) -> Request:
    """Return the request of windows' tokens; under a guide `condition.fine` says of which kind."""
    kind = order.condition.fine_kind if guided else order.condition.kind
    task = EncodeContext(with_payload(order), kind, scale, windows)
    return Request(id, task, {"grid": GRIDS[kind]} if kind in GRIDS else {})


def with_payload(order: Order) -> Order:
    """Return the order for `EncodeContext`: with its embeddings, if these condition it."""
    return order if order.condition.kind == "embeddings" else order.without_payload()
