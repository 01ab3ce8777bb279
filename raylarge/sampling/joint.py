"""Joint multi-scale sampling of one large image (Algorithm S2), guide first.

    draw guide's tokens -> guide's trajectory --frames--> windows 0..9 -> 10..19 -> ...
    draw windows' tokens ------------------------------^                     |
                                                     image <- blended decode of bands

The coarse image never hears from the fine ones, and the constraint acts inside one window
(`constraint=window`), so running the guide first is the same computation as running all
scales step by step; a test proves it. Also here: separate patches, which have no guide.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from raylarge.geometry import Patch, batches, spans
from raylarge.order import Order, check
from raylarge.sampling.canvas import touching
from raylarge.sampling.plan import Decode, DecodeEach, Draw, Guide, Plan, Request, Windows

BAND = 4
"""Height of a decode band, in patches: windows across its border are decoded twice."""


class Large(NamedTuple):
    """A large image (uint8 [H, W, 3]) and the guide's frames ([S + 1, 3, P, P] or None)."""

    image: np.ndarray
    frames: Any


def plan(order: Order, patch: Patch) -> Plan:
    """The plan of an order: a large image, or `count` separate patches.

    Raises:
        UserError: the order does not fit the bundle's patches.
    """
    check(order, patch)
    return patches(order, patch) if order.count else large(order, patch)


def large(order: Order, patch: Patch) -> Plan:
    """One canvas under one guide; a canvas of a single patch has none."""
    brief, top = order.brief(), order.guide(patch).k
    rows, columns = (length // patch.side_px for length in order.size)
    cells = [(r, k) for r in range(rows) for k in range(columns)]
    groups = [tuple(cells[i] for i in group) for group in batches(len(cells), order.batch)]
    joint = top > order.scale
    kind = order.condition.kind
    requests = []
    if joint:
        requests.append(Request("draw/guide", Draw(order, kind, top, ((0, 0),))))
        kind = order.condition.fine_kind
        requests.append(Request("guide", Guide(brief, top), ("draw/guide",)))
    for b, group in enumerate(groups):
        requests += _chunks(order, b, group, kind, top if joint else None)
    latents = [_last(order, b) for b in range(len(groups))]
    bands = []
    for top_px, bottom_px in spans(order.size[0], BAND * patch.side_px):
        reach = _reach(order, patch, groups, top_px, bottom_px)
        task = Decode(brief, tuple(groups[b] for b in reach), top_px, bottom_px)
        bands.append(Request(f"decode/{top_px}", task, tuple(latents[b] for b in reach)))
    results = [band.id for band in bands] + (["guide"] if joint else [])

    def finish(replies: list[Any]) -> Large:
        pixels = np.concatenate([np.asarray(reply) for reply in replies[: len(bands)]])
        return Large(pixels, replies[-1] if joint else None)

    return Plan([*requests, *bands], results, finish)


def patches(order: Order, patch: Patch) -> Plan:
    """`count` separate patches at one scale -> uint8 [count, P, P, 3]; patch i is at (0, i)."""
    brief, groups = order.brief(), batches(order.count, order.batch)
    requests, results = [], []
    for b, indices in enumerate(groups):
        group = tuple((0, i) for i in indices)
        requests += _chunks(order, b, group, order.condition.kind, None)
        requests.append(Request(f"decode/{b}", DecodeEach(brief), (_last(order, b),)))
        results.append(f"decode/{b}")

    def finish(replies: list[Any]) -> np.ndarray:
        return np.concatenate([np.asarray(reply) for reply in replies])[: order.count]

    return Plan(requests, results, finish)


def _chunks(
    order: Order, b: int, group: tuple[tuple[int, int], ...], kind: str, top: int | None
) -> list[Request]:
    """The requests that take one batch of windows from tokens to latents."""
    requests = [Request(f"draw/{b}", Draw(order, kind, order.scale, group))]
    always = (f"draw/{b}",) if top is None else (f"draw/{b}", "guide")
    before: tuple[str, ...] = ()
    for first, last in spans(order.sampler.steps, order.chunk):
        task = Windows(order.brief(), group, first, last, top)
        requests.append(Request(f"windows/{b}/{first}", task, (*always, *before)))
        before = (requests[-1].id,)
    return requests


def _last(order: Order, b: int) -> str:
    return f"windows/{b}/{spans(order.sampler.steps, order.chunk)[-1][0]}"


def _reach(
    order: Order,
    patch: Patch,
    groups: list[tuple[tuple[int, int], ...]],
    top: int,
    bottom: int,
) -> list[int]:
    """Batches with a window in the latent rows that a band's decode windows read."""
    side = patch.side_px
    starts = touching(order.size[0], side, side // 4, top, bottom)
    first, last = starts[0] // side, (starts[-1] + side - 1) // side
    return [b for b, group in enumerate(groups) if any(first <= row <= last for row, _ in group)]
