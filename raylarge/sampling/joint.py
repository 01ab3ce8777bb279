"""Joint multi-scale sampling of one large image (Algorithm S2), guide first.

    draw guide's tokens -> guide's trajectory --frames--> windows 0..9 -> 10..19 -> ...
    draw windows' tokens ------------------------------^                     |
                                                     image <- blended decode of bands

The coarse image never hears from the fine ones, and the constraint acts inside one window
(`constraint=window`), so running the guide first is the same computation as running all
scales step by step; a test proves it. Also here: separate patches, which have no guide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raylarge.geometry import Patch, batches, spans
from raylarge.order import Order, check
from raylarge.sampling.canvas import touching
from raylarge.sampling.plan import Decode, DecodeEach, Draw, Guide, Plan, Request, Windows

Cell = tuple[int, int]
BAND = 4
"""Height of a decode band, in patches: windows across its border are decoded twice."""


@dataclass(frozen=True)
class Large:
    """A large image in bands, top to bottom, and the guide's frames.

    Attributes:
        kept: the bands as the plan's store keeps them.
        frames: [S + 1, 3, P, P], the last one finished; None where there was no guide.
        open: gives a band, uint8 [rows, W, 3].
    """

    kept: Sequence[Any]
    frames: Any
    open: Callable[[Any], Any]

    def bands(self) -> Iterator[np.ndarray]:
        """The bands, one at a time."""
        for kept in self.kept:
            yield np.asarray(self.open(kept))

    @property
    def image(self) -> np.ndarray:
        """The whole image, uint8 [H, W, 3], in memory."""
        return np.concatenate(list(self.bands()))


def plan(order: Order, patch: Patch) -> Plan:
    """The plan of an order: a large image, or `count` separate patches.

    Raises:
        UserError: the order does not fit the bundle's patches.
    """
    check(order, patch)
    return patches(order, patch) if order.count else large(order, patch)


def large(order: Order, patch: Patch) -> Plan:
    """One canvas under one guide, by way of the levels between; a single patch has no guide."""
    top, *below = order.levels_of(patch)
    requests: list[Request] = []
    if below:
        requests += [
            Request("draw/guide", Draw(order, order.condition.kind, top, ((0, 0),))),
            Request("guide", Guide(order.brief(), top), ("draw/guide",)),
        ]
    level = Level(order, patch, below[0] if below else top, top if below else None)
    requests += level.requests(traced=len(below) > 1)
    for scale in below[1:]:
        level = level.finer(scale)
        requests += level.requests(traced=scale != order.scale)
    bands = []
    for first_px, last_px in spans(order.size[0], BAND * patch.side_px):
        reach = _reach(order, patch, level.groups, first_px, last_px)
        task = Decode(order.brief(), tuple(level.groups[b] for b in reach), first_px, last_px)
        needs = tuple(level.last(b) for b in reach)
        bands.append(Request(f"decode/{first_px}", task, needs))
    results = [band.id for band in bands] + (["guide"] if below else [])

    def finish(kept: list[Any], open_: Callable[[Any], Any]) -> Large:
        frames = open_(kept[-1]) if below else None
        return Large(kept[: len(bands)], frames, open_)

    return Plan([*requests, *bands], results, finish)


def patches(order: Order, patch: Patch) -> Plan:
    """`count` separate patches at one scale -> uint8 [count, P, P, 3]; patch i is at (0, i)."""
    cells = [(0, i) for i in range(order.count)]
    level = Level(order, patch, order.scale, None, cells)
    requests, results = level.requests(traced=False), []
    for b in range(len(level.groups)):
        requests.append(Request(f"decode/{b}", DecodeEach(order.brief()), (level.last(b),)))
        results.append(f"decode/{b}")

    def finish(kept: list[Any], open_: Callable[[Any], Any]) -> np.ndarray:
        return np.concatenate([np.asarray(open_(reply)) for reply in kept])[: order.count]

    return Plan(requests, results, finish)


class Level:
    """The windows of one scale: their batches, and who is above them.

    Under the guide, a batch is any windows in row-major order; under a level of several
    windows, all of a batch's windows lie under the same one, whose frames they share.

    Args:
        scale: the level's own.
        above: scale of the level that guides it, if one does.
        cells: (row, column) of the windows; by default all over the canvas.
        parents: the level above, unless that is the guide alone.
    """

    def __init__(
        self,
        order: Order,
        patch: Patch,
        scale: int,
        above: int | None,
        cells: Sequence[Cell] | None = None,
        parents: Level | None = None,
    ) -> None:
        self.order, self.patch, self.scale, self.above = order, patch, scale, above
        self.parents = parents
        shrunk = patch.side_px << (scale - order.scale)
        rows, columns = (-(-length // shrunk) for length in order.size)
        all_cells = cells or [(r, c) for r in range(rows) for c in range(columns)]
        families: dict[Cell | None, list[Cell]] = {}
        for cell in all_cells:
            families.setdefault(self._parent(cell) if parents else None, []).append(cell)
        self.groups = [
            tuple(family[i] for i in group)
            for family in families.values()
            for group in batches(len(family), order.batch)
        ]
        self._place = {
            cell: (b, i)
            for b, group in enumerate(self.groups)
            for i, cell in reversed(list(enumerate(group)))
        }

    def finer(self, scale: int) -> Level:
        """The level below this one."""
        return Level(self.order, self.patch, scale, self.scale, parents=self)

    def last(self, b: int) -> str:
        """The name of a batch's finished latents."""
        return self._name(b, spans(self.order.sampler.steps, self.order.chunk)[-1][0])

    def requests(self, traced: bool) -> list[Request]:
        """All that takes the level's batches from tokens to latents, chunk by chunk."""
        condition, found = self.order.condition, []
        kind = condition.kind if self.above is None else condition.fine_kind
        for b, group in enumerate(self.groups):
            draw = self._name(b, "tokens")
            found.append(Request(draw, Draw(self.order, kind, self.scale, group)))
            before: tuple[str, ...] = ()
            for first, last in spans(self.order.sampler.steps, self.order.chunk):
                above, frames_from = self._frames(group, first)
                task = Windows(
                    self.order.brief(),
                    self.scale,
                    group,
                    first,
                    last,
                    self.above,
                    frames_from,
                    traced,
                )
                needs = (draw, *above, *before)
                found.append(Request(self._name(b, first), task, needs))
                before = (found[-1].id,)
        return found

    def _frames(self, group: tuple[Cell, ...], first: int) -> tuple[tuple[str, ...], int]:
        """The reply that holds the frames of a chunk, and the step that they begin with."""
        if self.above is None:
            return (), 0
        if self.parents is None:
            return ("guide",), 0
        b, i = self.parents._place[self._parent(group[0])]
        return (f"{self.parents._name(b, first)}#{i}",), first

    def _parent(self, cell: Cell) -> Cell:
        octaves = (self.above or 0) - self.scale
        return cell[0] >> octaves, cell[1] >> octaves

    def _name(self, b: int, what: int | str) -> str:
        """Names of the finest level say no scale: most orders have no other."""
        level = "" if self.scale == self.order.scale else f"{self.scale}/"
        return f"{'draw' if what == 'tokens' else 'windows'}/{level}{b}" + (
            "" if what == "tokens" else f"/{what}"
        )


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
