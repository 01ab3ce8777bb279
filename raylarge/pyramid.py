"""Pyramids: images too large for memory, written as tiled TIFF levels band by band.

    bands, top to bottom -> strips of 256 rows -> tiles of level 0
                                 └ 2 x 2 means -> rows on disk -> tiles of level 1 -> ...

At no time is more in memory than a strip or two of the level being written. Levels are
(sum + 2) // 4 of four pixels in integers, from strips that always begin at multiples of 256
rows, so the file does not depend on how the bands were cut. The layout is the one that
OpenSlide calls generic-tiff: pages of halved size, micrometres per pixel in the resolution
tags, sRGB.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import numpy as np
import tifffile
from jaxtyping import UInt8

from raylarge import storage
from raylarge.errors import UserError
from raylarge.images import Pixels, marked, srgb

TILE_PX = 256
_BIG_BYTES = 1 << 31
"""Pixels of level 0 above which offsets may pass 32 bits: all levels together hold 4/3 of it."""
_ENCODE_BYTES = 1 << 24
"""Tiles that tifffile may hold for its threads; its own default is half a gigabyte."""


def write(
    path: str,
    bands: Iterable[UInt8[np.ndarray, "_ W 3"]],
    size: tuple[int, int],
    mpp: float | None,
    text: Mapping[str, str],
    compression: str = "jpeg",
) -> None:
    """Write an image that comes in bands as a pyramid; it stands at the path whole or not at all.

    Args:
        path: a local path (scratch files of a third of the pixels lie beside it while it is
            written) or a URL (they lie in the temporary folder, the file too until it is sent).
        bands: rows of the full resolution from top to bottom, any number of rows at a time.
        size: (rows, columns) of the full resolution.
        mpp: micrometres per pixel; None leaves it open.
        text: further fields, such as the order as JSON; kept as JSON in ImageDescription,
            after a sentence that says that the image is synthetic.
        compression: `jpeg` (quality 90, 4:2:0) or `deflate` (lossless).

    Raises:
        UserError: another compression, or an mpp that is not positive.
        ValueError: the bands do not make up the size.
    """
    options = {**_codec(compression), "description": _description(text)}
    if mpp is not None and not mpp > 0:
        raise UserError(f"{mpp} micrometres per pixel: it must be above 0.")
    local = storage.is_local(path)
    target = Path(path.removeprefix("file://"))
    if local:
        target.parent.mkdir(parents=True, exist_ok=True)
    folder, prefix = (target.parent, f".{target.name}.") if local else (None, "raylarge-")
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder) as scratch:
        file = Path(scratch) / "pyramid.tif"
        _write_levels(file, bands, level_sizes(size), mpp, options)
        _put(file, path, target if local else None)


def write_image(
    path: str, image: Pixels, mpp: float | None, text: Mapping[str, str] | None = None
) -> None:
    """`write`, lossless, for an image at hand; a `np.memmap` is read piece by piece."""
    write(path, [image], (image.shape[0], image.shape[1]), mpp, text or {}, "deflate")


def level_sizes(size: tuple[int, int]) -> list[tuple[int, int]]:
    """(rows, columns) of all levels: halved, odd ends cut off, until one tile holds the image."""
    sizes = [size]
    while max(sizes[-1]) > TILE_PX and min(sizes[-1]) >= 2:
        sizes.append((sizes[-1][0] // 2, sizes[-1][1] // 2))
    return sizes


def read_text(path: str | Path) -> dict[str, str]:
    """The fields that `write` kept in a local pyramid.

    Raises:
        UserError: the file holds none.
    """
    with tifffile.TiffFile(path) as file:
        _, _, fields = file.pages.first.description.partition("\n")
    try:
        values: dict[str, str] = json.loads(fields)
    except ValueError as error:
        raise UserError(f"{path} is not a pyramid that raylarge wrote.") from error
    return values


def _description(text: Mapping[str, str]) -> str:
    """A sentence for people who look at the tags, then the fields (JSON in ASCII, as TIFF asks)."""
    return f"Synthetic image made by raylarge.\n{storage.as_json(marked(text))}"


def _write_levels(
    file: Path,
    bands: Iterable[Pixels],
    sizes: list[tuple[int, int]],
    mpp: float | None,
    options: Mapping[str, Any],
) -> None:
    """Level after level, each from the rows that the one before left on disk."""
    rows, columns = sizes[0]
    with tifffile.TiffWriter(file, bigtiff=3 * rows * columns > _BIG_BYTES) as writer:
        for number, size in enumerate(sizes):
            stored = file.with_name(f"level-{number}.raw")
            below = file.with_name(f"level-{number + 1}.raw")
            with below.open("wb") if number + 1 < len(sizes) else nullcontext() as sink:
                tiles = _tiles(_strips(_stored(stored, size) if number else bands, size), sink)
                _write_level(writer, tiles, size, {**options, **_place(number, mpp)})
                next(tiles, None)  # tifffile stops at the last tile: too many rows show here
            stored.unlink(missing_ok=True)
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())


def _codec(compression: str) -> dict[str, Any]:
    """What tifffile is told of a compression; a new dict each time, since it writes into it."""
    options: dict[str, dict[str, Any]] = {
        "jpeg": {"compression": "jpeg", "compressionargs": {"level": 90}, "subsampling": (2, 2)},
        "deflate": {"compression": "zlib", "predictor": True},
    }
    if compression not in options:
        raise UserError(f"compression '{compression}' is not {' or '.join(options)}.")
    return options[compression]


def _place(number: int, mpp: float | None) -> dict[str, Any]:
    """The tags that tell a level from the others."""
    kind = {"subfiletype": 1 if number else 0}
    if mpp is None:
        return {**kind, "resolutionunit": "NONE"}
    pixels_per_cm = 10_000 / (mpp * 2**number)
    return {**kind, "resolution": (pixels_per_cm,) * 2, "resolutionunit": "CENTIMETER"}


def _write_level(
    writer: tifffile.TiffWriter,
    tiles: Iterator[Pixels],
    size: tuple[int, int],
    options: Mapping[str, Any],
) -> None:
    writer.write(
        tiles,
        shape=(*size, 3),
        dtype=np.uint8,
        tile=(TILE_PX, TILE_PX),
        photometric="rgb",
        iccprofile=srgb(),
        software="raylarge",
        metadata=None,
        buffersize=_ENCODE_BYTES,
        **options,
    )


def _strips(bands: Iterable[Pixels], size: tuple[int, int]) -> Iterator[Pixels]:
    """The rows of all bands, 256 at a time (the last strip may be shorter).

    A strip holds until the next one is asked for: they share their memory.
    """
    rows, columns = size
    strip = np.empty((TILE_PX, columns, 3), np.uint8)
    seen = filled = 0
    for band in bands:
        seen += len(band)
        if seen > rows or band.shape[1:] != (columns, 3):
            raise ValueError(f"a band of {band.shape} ends in row {seen} of an image of {size}")
        while len(band):
            part = band[: TILE_PX - filled]
            strip[filled : filled + len(part)] = part
            filled, band = filled + len(part), band[len(part) :]
            if filled == TILE_PX:
                yield strip
                filled = 0
    if seen < rows:
        raise ValueError(f"the bands end after {seen} rows of an image of {size}")
    if filled:
        yield strip[:filled]


def _tiles(strips: Iterator[Pixels], sink: BinaryIO | None) -> Iterator[Pixels]:
    """Tiles row by row; each strip's half goes to the sink before its tiles go out.

    Tiles at the right and bottom repeat their last pixel: a hard edge would ring in JPEG.
    """
    for strip in strips:
        if sink is not None:
            sink.write(_halved(strip).tobytes())
        for left in range(0, strip.shape[1], TILE_PX):
            tile = strip[:, left : left + TILE_PX]
            missing = [(0, TILE_PX - side) for side in tile.shape[:2]]
            yield np.pad(tile, (*missing, (0, 0)), mode="edge")


def _halved(strip: Pixels) -> Pixels:
    """2 x 2 means, rounded half up; an odd last row or column is left out."""
    rows, columns = strip.shape[0] // 2 * 2, strip.shape[1] // 2 * 2
    pairs = np.add(strip[0:rows:2, :columns], strip[1:rows:2, :columns], dtype=np.uint16)
    sums = pairs[:, 0::2] + pairs[:, 1::2]
    sums += 2
    sums >>= 2
    return sums.astype(np.uint8)


def _stored(path: Path, size: tuple[int, int]) -> Iterator[Pixels]:
    """The rows of a level from its file; read, not mapped, so that they leave memory again."""
    with path.open("rb") as stream:
        while piece := stream.read(TILE_PX * size[1] * 3):
            yield np.frombuffer(piece, np.uint8).reshape(-1, size[1], 3)


def _put(file: Path, path: str, target: Path | None) -> None:
    """Give a finished file its place; an object store shows an upload when it is complete."""
    if target is not None:
        os.replace(file, target)
        return
    fs, root = fsspec.core.url_to_fs(path)
    fs.put_file(str(file), root)
