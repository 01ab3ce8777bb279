"""Read Aperio slides (SVS): OpenSlide gives the metadata, tifffile the pixels.

Both decode a tile to the same bytes, but OpenSlide takes five times as long. OpenSlide gives
levels, pixel size and colour profile; tifffile reads levels of complete JPEG tiles.
"""

from __future__ import annotations

from contextlib import ExitStack

import tifffile
from tifffile import COMPRESSION

from raylarge.slides.openslide_reader import OpenSlidePyramid
from raylarge.slides.protocol import Pixels
from raylarge.slides.tiff_reader import TiffLevel, tiff_errors


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
            with tiff_errors():
                self._file = opened.enter_context(tifffile.TiffFile(path))
                stored = {
                    (page.imagelength, page.imagewidth): page
                    for page in map(self._file.pages.get, range(len(self._file.pages)))
                    if isinstance(page, tifffile.TiffPage) and _plain(page)
                }
            self._tiled = {
                level: TiffLevel(self._file.filehandle, stored[size])
                for level, size in enumerate(self.sizes)
                if size in stored
            }
            opened.pop_all()

    def read_level(self, level: int, top: int, left: int, rows: int, columns: int) -> Pixels:
        """Return a region inside a level, in that level's pixels.

        Raises:
            UnreadableSlide: the file is damaged there.
        """
        if level not in self._tiled:
            return super().read_level(level, top, left, rows, columns)
        return self._tiled[level].read(top, left, rows, columns)

    def close(self) -> None:
        """Close the file."""
        for level in self._tiled.values():
            level.close()
        self._file.close()
        super().close()


def _plain(page: tifffile.TiffPage) -> bool:
    """Return whether all JPEG tiles of a page exist; OpenSlide fills others from coarser levels."""
    whole = all(count > 0 for count in page.databytecounts)
    return page.is_tiled and page.compression == COMPRESSION.JPEG and whole
