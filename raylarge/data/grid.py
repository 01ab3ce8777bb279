"""A slide as its grid of base tiles, read once each as far as memory allows.

`row` and `column` are cells of the base grid (`x_tok`); cell (r, c) holds the P x P base
pixels from (r P, c P). Every region that a verb wants is put together from these tiles.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from jaxtyping import UInt8

from raylarge.slides.reader import Slide, open_slide

_CACHE_BYTES = 256 << 20


class TileGrid:
    """Base tiles of the slide that was asked for last; it stays open until another comes."""

    def __init__(self, patch_px: int, mpp: float | None, base_mpp: float) -> None:
        """See `raylarge.data.tile.Tile` for the fields."""
        self._patch_px, self._mpp, self._base_mpp = patch_px, mpp, base_mpp
        self._path: str | None = None
        self._slide: Slide | None = None
        self._read = lru_cache(maxsize=max(1, _CACHE_BYTES // (3 * patch_px**2)))(self._uncached)

    def open(self, path: str) -> Slide:
        """The slide at a path, opened where it is not open yet.

        Raises:
            UserError: see `open_slide`.
        """
        if self._slide is None or self._path != path:
            self.close()
            self._slide, self._path = open_slide(path, self._mpp, self._base_mpp), path
        return self._slide

    def close(self) -> None:
        """Close the slide and forget its tiles."""
        if self._slide is not None:
            self._slide.close()
        self._slide = None
        self._read.cache_clear()

    def tile(self, row: int, column: int) -> UInt8[np.ndarray, "P P 3"]:
        """One base tile."""
        return self._read(row, column)

    def strip(self, row: int, column: int, count: int) -> UInt8[np.ndarray, "P w 3"]:
        """`count` base tiles side by side."""
        return np.concatenate([self._read(row, column + i) for i in range(count)], axis=1)

    def _uncached(self, row: int, column: int) -> np.ndarray:
        assert self._slide is not None, "open() comes first"
        side = self._patch_px
        return np.ascontiguousarray(self._slide.read(row * side, column * side, side, side))
