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
from raylarge.order import Order
from raylarge.sampling import conditioning, mosaic
from raylarge.sampling.canvas import touching
from raylarge.sampling.plan import Plan, Request
from raylarge.sampling.strided import canvas
from raylarge.sampling.tasks import DecodeBand, DecodePatches, DenoiseGuide, DenoiseWindows
from raylarge.sampling.validation import check

Cell = tuple[int, int]
Group = tuple[Cell, ...]
Sources = tuple[tuple[str, ...], tuple[Group, ...], tuple[int, ...]]
SourcesOfBand = Callable[[int, int], Sources]

BAND = 4
"""Height of a decode band, in patches: windows across its border are decoded twice."""
BAND_PATCHES = 64
"""Patches that a band may hold: on wider canvases bands are flatter, for the memory's sake."""


@dataclass(frozen=True)
class LargeImage:
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
    if order.count:
        return patches(order, patch)
    if order.algorithm == "superres":
        return larger(order, patch)
    return overlapping(order, patch) if order.algorithm == "strided" else large(order, patch)


def large(order: Order, patch: Patch) -> Plan:
    """One canvas under one guide, by way of the levels between; a single patch has no guide."""
    top, *below = order.levels_of(patch)
    requests = conditioning.grids(order, top, guided=bool(below))
    if below:
        requests += [
            conditioning.encode_context("draw/guide", order, top, ((0, 0),), guided=False),
            Request("guide", DenoiseGuide(order.without_payload(), top), {"tokens": "draw/guide"}),
        ]
    if below and order.sampler.mosaic:
        more, layout = mosaic.requests(order, patch, top, "guide")
        return _decoded(order, patch, [*requests, *more], _rows(layout), guided=True)
    level = WindowLevel(order, patch, below[0] if below else top, top if below else None)
    requests += level.requests(traced=len(below) > 1)
    for scale in below[1:]:
        level = level.finer(scale)
        requests += level.requests(traced=scale != order.scale)
    if order.refine:
        more, count = canvas(order, patch, level.covering)
        return _decoded(
            order, patch, [*requests, *more], _canvas_sources(count), guided=bool(below)
        )
    return _decoded(order, patch, requests, level.sources_of_band, guided=bool(below))


def overlapping(order: Order, patch: Patch) -> Plan:
    """One canvas by strided sampling: no guide, windows that overlap."""
    requests, count = canvas(order, patch)
    requests = [*conditioning.grids(order, order.scale, guided=False), *requests]
    return _decoded(order, patch, requests, _canvas_sources(count), guided=False)


def larger(order: Order, patch: Patch) -> Plan:
    """An image made larger: every window follows its block of it in all steps."""
    coarse = order.scale + order.source.octaves
    requests = conditioning.grids(order, coarse, guided=False)
    if order.sampler.mosaic:
        more, layout = mosaic.requests(order, patch, coarse, "given")
        return _decoded(order, patch, [*requests, *more], _rows(layout), guided=False)
    level = WindowLevel(order, patch, order.scale, coarse)
    requests += level.requests(traced=False)
    return _decoded(order, patch, requests, level.sources_of_band, guided=False)


def _canvas_sources(count: int) -> SourcesOfBand:
    """Where the finished rows of a canvas of bands are."""

    def sources_of_band(first: int, last: int) -> Sources:
        bands = tuple(range(first, min(last, count)))
        return tuple(f"final/{j}" for j in bands), (), bands

    return sources_of_band


def _rows(layout: mosaic.MosaicLayout) -> SourcesOfBand:
    """Where the finished latents of a mosaic are: row by row."""

    def sources_of_band(first: int, last: int) -> Sources:
        rows = range(first, min(last, layout.rows))
        return tuple(f"final/{r}" for r in rows), tuple(map(layout.windows, rows)), ()

    return sources_of_band


def _decoded(
    order: Order,
    patch: Patch,
    requests: list[Request],
    sources_of_band: SourcesOfBand,
    *,
    guided: bool,
) -> Plan:
    """The plan that decodes what finished requests hold, band by band."""
    bands, side = [], patch.side_px
    height = max(1, min(BAND, BAND_PATCHES * side // order.size[1])) * side
    for top, bottom in spans(order.size[0], height):
        begin = touching(order.size[0], side, side // 4, top, bottom)
        names, groups, rows = sources_of_band(begin[0] // side, -(-(begin[-1] + side) // side))
        task = DecodeBand(order.without_payload(), groups, top, bottom, rows)
        bands.append(Request(f"decode/{top}", task, {"latents": names}))
    results = [band.id for band in bands] + (["guide"] if guided else [])

    def finish(kept: list[Any], open_: Callable[[Any], Any]) -> LargeImage:
        frames = open_(kept[-1]) if guided else None
        return LargeImage(kept[: len(bands)], frames, open_)

    return Plan([*requests, *bands], results, finish)


def patches(order: Order, patch: Patch) -> Plan:
    """`count` separate patches at one scale -> uint8 [count, P, P, 3]; patch i is at (0, i)."""
    cells = [(0, i) for i in range(order.count)]
    level = WindowLevel(order, patch, order.scale, None, cells)
    requests, results = level.requests(traced=False), []
    for b in range(len(level.groups)):
        requests.append(
            Request(
                f"decode/{b}", DecodePatches(order.without_payload()), {"latents": level.last(b)}
            )
        )
        results.append(f"decode/{b}")

    def finish(kept: list[Any], open_: Callable[[Any], Any]) -> np.ndarray:
        return np.concatenate([np.asarray(open_(reply)) for reply in kept])[: order.count]

    return Plan(requests, results, finish)


class WindowLevel:
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
        parents: WindowLevel | None = None,
    ) -> None:
        self.order, self.patch, self.scale, self.above = order, patch, scale, above
        self.parents = parents
        shrunk = patch.side_px << (scale - order.scale)
        rows, columns = (-(-length // shrunk) for length in order.size)
        size = order.batch if cells else 0  # on a canvas, few windows make a smaller batch
        all_cells = cells or [(r, c) for r in range(rows) for c in range(columns)]
        families: dict[Cell | None, list[Cell]] = {}
        for cell in all_cells:
            families.setdefault(self._parent(cell) if parents else None, []).append(cell)
        self.groups = [
            tuple(family[i] for i in group)
            for family in families.values()
            for group in batches(len(family), size or min(len(family), order.batch))
        ]
        self._place = {
            cell: (b, i)
            for b, group in enumerate(self.groups)
            for i, cell in reversed(list(enumerate(group)))
        }

    def finer(self, scale: int) -> WindowLevel:
        """The level below this one."""
        return WindowLevel(self.order, self.patch, scale, self.scale, parents=self)

    def last(self, b: int) -> str:
        """The name of a batch's finished latents."""
        return self._name(b, self._chunks()[-1][0])

    def _chunks(self) -> list[tuple[int, int]]:
        """Steps per request; solvers that remember earlier steps take all at once."""
        sampler = self.order.sampler
        whole = sampler.solver != "ddim"
        return spans(sampler.steps, sampler.steps if whole else self.order.chunk)

    def covering(self, first: int, last: int) -> tuple[tuple[str, ...], tuple[Group, ...]]:
        """Finished latents of all batches with a window in patch rows first .. last - 1."""
        covering = [
            b for b, group in enumerate(self.groups) if any(first <= row < last for row, _ in group)
        ]
        return tuple(map(self.last, covering)), tuple(self.groups[b] for b in covering)

    def sources_of_band(self, first: int, last: int) -> Sources:
        """As `SourcesOfBand`."""
        return *self.covering(first, last), ()

    def requests(self, *, traced: bool) -> list[Request]:
        """Return all requests from the level's tokens to its latents, chunk by chunk."""
        image, requests = self.order.algorithm == "superres", []
        guided, brief = self.above is not None and not image, self.order.without_payload()
        for b, group in enumerate(self.groups):
            draw = self._name(b, "tokens")
            requests.append(
                conditioning.encode_context(draw, self.order, self.scale, group, guided=guided)
            )
            before: dict[str, str] = {}
            for first, last in self._chunks():
                target, start = self._target(group, first)
                place = (brief, self.scale, group, first, last, self.above, start)
                task = DenoiseWindows(*place, traced=traced, follows_image=image)
                id = self._name(b, first)
                requests.append(Request(id, task, {"tokens": draw, **target, **before}))
                before = {"latents": id}
        return requests

    def _target(self, group: Group, first: int) -> tuple[dict[str, str], int]:
        """Return the input that constrains a chunk, and the step that its frames begin with."""
        if self.above is None:
            return {}, 0
        if self.parents is None:
            return {"target": "given" if self.order.algorithm == "superres" else "guide"}, 0
        b, i = self.parents._place[self._parent(group[0])]
        return {"target": f"{self.parents._name(b, first)}#{i}"}, first

    def _parent(self, cell: Cell) -> Cell:
        octaves = (self.above or 0) - self.scale
        return cell[0] >> octaves, cell[1] >> octaves

    def _name(self, b: int, what: int | str) -> str:
        """Names of the finest level say no scale: most orders have no other."""
        level = "" if self.scale == self.order.scale else f"{self.scale}/"
        return f"{'draw' if what == 'tokens' else 'windows'}/{level}{b}" + (
            "" if what == "tokens" else f"/{what}"
        )
