"""Generate slides for the data benchmark: Aperio's layout, as wide as real ones.

    a picture (real H&E where ../shared/data has it, else a procedural scene) -> JPEG tiles
    those tiles, repeated -> <name>.svs: tiles of 240 px, 4:2:0, levels of 1, 4 and 16

As in real slides, two rows of tiles must exceed OpenSlide's cache of 32 MB, otherwise reading tile
by tile decodes nothing twice. Repeating encoded tiles writes such a file in seconds; readers decode
each of them.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from jaxtyping import UInt8
from PIL import Image

from raylarge.slides import procedural
from raylarge.slides.reader import BASE_MPP, open_slide

SHARED = Path(__file__).parents[2] / "shared" / "data"
REAL = SHARED / "wsi" / "CMU-1-Small-Region.svs"
PATCH_PX = 256
TILE_PX = 240
LEVELS = (1, 4, 16)
UNIT_PX = TILE_PX * LEVELS[-1]
"""Sides are multiples of this, so that tiles of all levels repeat."""
_QUALITY = 70
_SEARCH_PX = UNIT_PX // 8
Pixels = UInt8[np.ndarray, "rows columns 3"]


@dataclass(frozen=True)
class Slides:
    """Files of one shape that are measured together.

    Attributes:
        title: what the page calls them.
        paths: of the files; copies are links, so the page cache holds their bytes once.
        zoom: pixels of level 0 per base pixel, along a side.
        grid: (rows, columns) of base tiles of each that are read.
    """

    title: str
    paths: list[str]
    zoom: int
    grid: tuple[int, int]

    @classmethod
    def of(cls, path: Path, title: str) -> Slides:
        """Return one file."""
        with open_slide(str(path)) as slide:
            rows, columns = (side // PATCH_PX for side in slide.size_px)
            return cls(title, [str(path)], round(slide.zoom), (rows, columns))

    @property
    def tiles(self) -> int:
        """Number of base tiles of all files."""
        return len(self.paths) * self.grid[0] * self.grid[1]

    def top(self, rows: int) -> Slides:
        """Return slides with only the top rows of base tiles."""
        return replace(self, grid=(min(rows, self.grid[0]), self.grid[1]))

    def copies(self, count: int, folder: Path) -> Slides:
        """Return copies of the file under several names."""
        folder.mkdir(parents=True, exist_ok=True)
        source, paths = Path(self.paths[0]).resolve(), []
        for number in range(count):
            path = folder / f"{source.stem}-{number:02d}{source.suffix}"
            path.unlink(missing_ok=True)
            path.symlink_to(source)
            paths.append(str(path))
        return replace(self, title=f"{self.title}, {count} copies", paths=paths)


def write(path: Path, units: tuple[int, int], mpp: float, picture: Pixels) -> Slides:
    """Write an Aperio-like slide of rows x columns times `UNIT_PX`, with repeated content."""
    power, (high, wide) = round(10 / mpp), (count * UNIT_PX for count in units)
    description = (
        f"Aperio Image Library v11.2.1\n{wide}x{high} [0,0 {wide}x{high}] "
        f"({TILE_PX}x{TILE_PX}) JPEG/RGB Q={_QUALITY}|AppMag = {power}|MPP = {mpp:.4f}"
    )
    with tifffile.TiffWriter(path) as file:
        for factor in LEVELS:
            size = (high // factor, wide // factor)
            tiles = {"description": description, "tile": (TILE_PX, TILE_PX)}
            _page(file, _pieces(picture, factor, size), size, tiles)
            if factor == 1:  # the thumbnail, which readers of this layout expect here
                thumbnail = Image.fromarray(picture).resize((TILE_PX, TILE_PX))
                strip = iter([_jpeg(np.asarray(thumbnail))])
                _page(
                    file,
                    strip,
                    (TILE_PX, TILE_PX),
                    {"description": description, "rowsperstrip": TILE_PX},
                )
    return Slides.of(path, f"{power}x, {wide} x {high} px")


def picture(seed: int = 0) -> tuple[Pixels, str]:
    """Return one unit of the slides' content, and its source."""
    files = sorted((SHARED / "he_large").glob("*.jpg"))
    if not files:
        scene = procedural.Scene(seed, (UNIT_PX / 2, UNIT_PX / 2))
        return scene.region(0, 0, UNIT_PX, UNIT_PX, BASE_MPP), "a procedural scene"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # it is known and large
        pixels = np.asarray(Image.open(files[0]).convert("RGB"))
    corners = [
        (top, left)
        for top in range(0, pixels.shape[0] - UNIT_PX, _SEARCH_PX)
        for left in range(0, pixels.shape[1] - UNIT_PX, _SEARCH_PX)
    ]
    small = pixels[::16, ::16].mean(axis=-1)
    part = UNIT_PX // 16
    top, left = min(  # where there is most tissue: glass is too easily decoded
        corners, key=lambda c: small[c[0] // 16 :, c[1] // 16 :][:part, :part].mean()
    )
    name = f"the densest part of a real H&E section ({files[0].name})"
    return pixels[top : top + UNIT_PX, left : left + UNIT_PX], name


def _page(
    file: tifffile.TiffWriter, pieces: Iterator[bytes], size: tuple[int, int], more: dict[str, Any]
) -> None:
    file.write(
        pieces,
        shape=(*size, 3),
        dtype=np.uint8,
        photometric="ycbcr",
        subsampling=(2, 2),
        compression="jpeg",
        metadata=None,
        software=False,
        **more,
    )


def _pieces(picture: Pixels, factor: int, size: tuple[int, int]) -> Iterator[bytes]:
    """Yield the JPEG tiles of a level, row by row; repeated ones are encoded once."""
    small = np.asarray(Image.fromarray(picture).reduce(factor)) if factor > 1 else picture
    down, wide = (side // TILE_PX for side in small.shape[:2])
    coded: dict[tuple[int, int], bytes] = {}
    for row in range(size[0] // TILE_PX):
        for column in range(size[1] // TILE_PX):
            place = (row % down, column % wide)
            if place not in coded:
                top, left = place[0] * TILE_PX, place[1] * TILE_PX
                coded[place] = _jpeg(small[top : top + TILE_PX, left : left + TILE_PX])
            yield coded[place]


def _jpeg(pixels: Pixels) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, format="JPEG", quality=_QUALITY, subsampling="4:2:0")
    return sink.getvalue()
