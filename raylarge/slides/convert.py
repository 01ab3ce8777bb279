"""Convert images without tiles, once per node, into a tiled lossless pyramid in the cache.

A JPEG, PNG or stripped TIFF can only be decoded from its top, so that each process would keep all
of it in memory. Tiles are read one by one by all processes of a node. Pixels are unchanged (the
colour profile is not applied); coarser levels are 2 x 2 means, written by way of scratch files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image

from raylarge.pyramid import TILE_PX, level_sizes
from raylarge.slides.protocol import Pixels, version_of
from raylarge.storage import cache

_FORMAT = "tiles 2"
"""Another name for other files from the same image."""
_BYTES_PER_PX = 5
"""At most: all levels uncompressed (4), and scratch files (below 1)."""


def tiled(
    path: str,
    size: tuple[int, int],
    strip: Callable[[int, int], Pixels],
    what: tuple[Any, ...] = (),
) -> cache.Lease:
    """Return a lease on the tiled TIFF pyramid of a local image; convert the image if necessary.

    Args:
        path: the image; a changed file is converted again.
        size: its (rows, columns).
        strip: returns its rows [top, bottom); called from top to bottom.
        what: the options of the reader; other options are another image.

    Raises:
        UnreadableSlide: the image is damaged.
        MissingResource: the cache has no room for it.
    """
    return cache.acquire(
        f"{version_of(path)} {_FORMAT} {what}",
        _BYTES_PER_PX * size[0] * size[1],
        lambda folder: _write(folder, size, strip),
        "tiles.tif",
    )


def _write(folder: Path, size: tuple[int, int], strip: Callable[[int, int], Pixels]) -> None:
    with tifffile.TiffWriter(folder / "tiles.tif", bigtiff=True) as writer:
        for level, (rows, columns) in enumerate(level_sizes(size)):
            below = folder / f"level-{level + 1}.raw"
            writer.write(
                _tiles(strip, (rows, columns), below),
                shape=(rows, columns, 3),
                dtype=np.uint8,
                tile=(TILE_PX, TILE_PX),
                photometric="rgb",
                compression="zstd",
                compressionargs={"level": 1},
                predictor=True,
                subfiletype=int(level > 0),
                metadata=None,
                maxworkers=1,
            )
            (folder / f"level-{level}.raw").unlink(missing_ok=True)
            strip = _RawRows(below, columns // 2)
        below.unlink()


class _RawRows:
    """Rows of a raw file; read, not mapped, so that they leave memory again."""

    def __init__(self, path: Path, columns: int) -> None:
        self._path, self._columns = path, columns

    def __call__(self, top: int, bottom: int) -> Pixels:
        row_bytes = 3 * self._columns
        content = np.fromfile(
            self._path, np.uint8, (bottom - top) * row_bytes, offset=top * row_bytes
        )
        return content.reshape(bottom - top, self._columns, 3)


def _tiles(
    strip: Callable[[int, int], Pixels], size: tuple[int, int], below: Path
) -> Iterator[Pixels]:
    """Yield the tiles of a level, row by row; write the next coarser level to the file `below`."""
    rows, columns = size
    with below.open("wb") as sink:
        for top in range(0, rows, TILE_PX):
            pixels = strip(top, min(top + TILE_PX, rows))
            even = pixels[: len(pixels) // 2 * 2, : columns // 2 * 2]
            if even.size:
                # Not tofile(), whose error on a full disk does not say so.
                sink.write(np.ascontiguousarray(Image.fromarray(even).reduce(2)).data)
            for left in range(0, columns, TILE_PX):
                tile = pixels[:, left : left + TILE_PX]
                short = [(0, TILE_PX - side) for side in tile.shape[:2]]
                yield np.pad(tile, (*short, (0, 0)), mode="edge")
