"""Aperio slides (SVS), of which TCGA consists: OpenSlide's facts, tifffile's pixels.

Both decode a stored tile to the same bytes, but OpenSlide takes five times as long over it.
OpenSlide says what the levels are, how large a pixel is and which profile holds; a level that
is stored as it expects (whole JPEG tiles, none left out) is then read tile by tile.
"""

from __future__ import annotations

from contextlib import ExitStack

import tifffile
from tifffile import COMPRESSION

from raylarge.slides.openslide_reader import OpenSlidePyramid
from raylarge.slides.protocol import Pixels
from raylarge.slides.tiff_reader import Level, parsed


class AperioPyramid(OpenSlidePyramid):
    """The levels of an Aperio slide."""

    def __init__(self, path: str, scene: str = "") -> None:
        """Open a slide that OpenSlide recognises as Aperio's.

        Raises:
            UnreadableSlide: OpenSlide cannot open the file.
        """
        super().__init__(path, scene)
        with ExitStack() as opened:
            opened.callback(super().close)
            with parsed():
                self._file = opened.enter_context(tifffile.TiffFile(path))
                stored = {
                    (page.imagelength, page.imagewidth): page
                    for page in map(self._file.pages.get, range(len(self._file.pages)))
                    if isinstance(page, tifffile.TiffPage) and _plain(page)
                }
            self._tiled = {
                level: Level(self._file.filehandle, stored[size])
                for level, size in enumerate(self.sizes)
                if size in stored
            }
            opened.pop_all()

    def read_level(self, level: int, top: int, left: int, rows: int, columns: int) -> Pixels:
        """A region inside a level, in that level's pixels.

        Raises:
            UnreadableSlide: the file is damaged there.
        """
        if level not in self._tiled:
            return super().read_level(level, top, left, rows, columns)
        return self._tiled[level].read(top, left, rows, columns)

    def close(self) -> None:
        """Let go of the file."""
        for level in self._tiled.values():
            level.close()
        self._file.close()
        super().close()


def _plain(page: tifffile.TiffPage) -> bool:
    """Whether a page is a grid of whole JPEG tiles; OpenSlide fills others from coarser levels."""
    whole = all(count > 0 for count in page.databytecounts)
    return page.is_tiled and page.compression == COMPRESSION.JPEG and whole
