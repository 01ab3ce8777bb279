"""A slide as its grid of base tiles, read in wide strips and once each as far as memory allows.

`row` and `column` are cells of the base grid (`x_tok`); cell (r, c) holds the P x P base
pixels from (r P, c P), white beyond the slide. Every region that a verb wants is put together
from these tiles. One call for a strip decodes each of the file's own tiles once; a call per
tile decodes those under a border again and again.
"""

from __future__ import annotations

import re
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import numpy as np
from jaxtyping import UInt8

from raylarge import storage
from raylarge.data import name_table
from raylarge.data.tile_candidates import TileConfig
from raylarge.data.units import BlockUnit
from raylarge.data.views import view_of
from raylarge.errors import SlideError, UserError, printable
from raylarge.slides.reader import Slide, open_slide
from raylarge.storage.web import redact_urls

_CACHE_BYTES = 256 << 20
_STRIP_BYTES = 3 << 20
_AHEAD = 8
"""Strips that are read before they are wanted."""
Pixels = UInt8[np.ndarray, "P P 3"]


class TileGrid:
    """Base tiles of the slide that was asked for last; it stays open until another comes."""

    def __init__(self, config: TileConfig) -> None:
        """See `raylarge.data.tile_candidates.TileConfig` for the fields that matter here."""
        self._config = config
        self.patch_px = config.patch_px
        self._name: tuple[str, int] | None = None
        self._slide: Slide | None = None
        self._reader = ThreadPoolExecutor(1)  # one for all: each thread keeps memory of its own
        self._tiles: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        side_bytes = 3 * config.patch_px**2
        self._most = max(1, _CACHE_BYTES // side_bytes)
        self._wide = max(1, _STRIP_BYTES // side_bytes)

    def open(self, unit: BlockUnit | Any) -> Slide:
        """The slide of a unit, opened where it is not open yet.

        Raises:
            UserError: see `open_slide`.
        """
        name = (unit.path, unit.view)
        if self._slide is None or self._name != name:
            self.close()
            config = self._config
            self._slide = open_slide(
                unit.path,
                unit.mpp_override,
                config.base_mpp,
                config.icc,
                config.read_options,
                view_of(unit, config),
            )
            self._name = name
        return self._slide

    def close(self) -> None:
        """Close the slide and forget its tiles."""
        if self._slide is not None:
            self._slide.close()
        self._slide = None
        self._tiles.clear()

    def tile(self, row: int, column: int) -> Pixels:
        """One base tile."""
        if (row, column) not in self._tiles:
            self.load(row, [column])
        self._tiles.move_to_end((row, column))
        return self._tiles[row, column]

    def strip(self, row: int, column: int, count: int) -> UInt8[np.ndarray, "P w 3"]:
        """`count` base tiles side by side."""
        wide = range(column, column + count, self._wide)
        return np.concatenate(
            [
                piece
                for start in wide
                for piece in self._loaded(row, start, min(self._wide, column + count - start))
            ],
            axis=1,
        )

    def load(self, row: int, columns: Sequence[int]) -> None:
        """Read those tiles of a row that are not at hand, neighbours in one go."""
        missing = [column for column in columns if (row, column) not in self._tiles]
        for first, count in runs(missing, self._wide):
            for i, pixels in enumerate(self.read(row, first, count)):
                self._tiles[row, first + i] = pixels
        while len(self._tiles) > self._most:
            self._tiles.popitem(last=False)

    def read(self, row: int, column: int, count: int) -> list[Pixels]:
        """`count` neighbouring tiles, straight from the slide."""
        assert self._slide is not None, "open() comes first"
        side = self.patch_px
        strip = self._slide.read(row * side, column * side, side, count * side)
        return [np.ascontiguousarray(strip[:, i * side : (i + 1) * side]) for i in range(count)]

    def ahead(self, cells: Sequence[tuple[int, int]]) -> Iterator[Pixels]:
        """The tiles of many cells in their order; a thread reads on while they are used."""
        strips = [
            (row, first, count)
            for row in sorted({row for row, _ in cells})
            for first, count in runs([c for r, c in cells if r == row], self._wide)
        ]
        waiting: deque[Future[list[Pixels]]] = deque()
        try:
            for strip in strips:
                waiting.append(self._reader.submit(self.read, *strip))
                if len(waiting) > _AHEAD:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            for one in waiting:  # what is being read is read to its end before a slide is closed
                one.cancel()
            wait(waiting)

    def _loaded(self, row: int, column: int, count: int) -> list[Pixels]:
        self.load(row, range(column, column + count))
        return [self.tile(row, column + i) for i in range(count)]


def runs(columns: Sequence[int], most: int) -> list[tuple[int, int]]:
    """(first, count) of the runs of neighbours in ascending columns, none above `most`."""
    spans: list[tuple[int, int]] = []
    for column in columns:
        first, count = spans[-1] if spans else (column, 0)
        if spans and column == first + count and count < most:
            spans[-1] = (first, count + 1)
        else:
            spans.append((column, 1))
    return spans


@contextmanager
def about(unit: Any) -> Iterator[None]:
    """What goes wrong with a unit's slide (`slide_id`, `path`), told by its pseudonym.

    Raises:
        SlideError: it is the slide's fault.
        UserError: it is not; names of files are left out all the same.
    """
    try:
        yield
    except UserError as error:
        slide_id, names = unit.slide_id, []
        files = [storage.redacted(path) for path in (unit.path, getattr(unit, "mask", "")) if path]
        paths = list(dict.fromkeys([*files, *map(printable, files)]))  # messages escape names
        stems = {stem for path in paths for stem in name_table.stems(path) if stem}
        for stem in map(re.escape, sorted(stems, key=len, reverse=True)):
            # as names of files: a stem may be a word, too
            names.append(rf"(?<=/){stem}(?![^\W_])|(?<![^\W_]){stem}(?=\.\w)")
        private = "|".join([*map(re.escape, paths), *names])
        text = re.sub(private, slide_id, redact_urls(str(error)))
        kind = SlideError if isinstance(error, SlideError) else UserError
        raise kind(f"{text} (names.json says which file {slide_id} is)") from error
