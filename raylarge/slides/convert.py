"""Images without tiles, converted once per node: a tiled, lossless pyramid in the cache.

A JPEG, a PNG or a TIFF in strips can only be decoded from its top, so each process would hold
all of it. Converted, it is read piece by piece by all processes of a node. Pixels stay as the
file has them (its colour profile stays with the file); levels are 2 x 2 means, as large again
as a third of the image, and lie on disk while they are made.
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
    """A tiled TIFF pyramid of a local image, converted where the node has none yet.

    Args:
        path: the image; a changed one is another.
        size: its (rows, columns).
        strip: its rows [top, bottom), asked for from top to bottom.
        what: of the image is read, and how: another answer is another image.

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
            strip = _Rows(below, columns // 2)
        below.unlink()


class _Rows:
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
    """The tiles of a level, row by row; its halves go to the file below."""
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
