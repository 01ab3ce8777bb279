"""Mask images of any size, read in strips: which pixels are not black.

TIFF of more than 67 Mpx, or of other numbers than 8-bit ones (labels, shares), is decoded tile by
tile, so a mask as large as level 0 is no trouble; other TIFF and other formats (PNG, JPEG, BMP,
GIF, WebP, PNM) are decoded whole by Pillow, which is limited to 537 Mpx (about 0.5 GB of memory
for a mask of grey or 1-bit pixels).
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import tifffile
from jaxtyping import Bool
from PIL import Image

from raylarge.geometry import spans
from raylarge.pixels import repeated
from raylarge.slides import tiff_reader
from raylarge.slides.protocol import (
    DECODE_PX,
    WHOLE_PX,
    Pixels,
    ReadOptions,
    UnreadableSlide,
    check_size,
    parser_errors,
)

Mask = Bool[np.ndarray, "rows columns"]
Strip = Callable[[int, int], Mask]

_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM")
_DEEP = ("I", "F", "I;16", "I;16B", "I;16L")
_NUMBERS = ("1", "L", *_DEEP)
_BYTES = (np.bool_, np.uint8)
_STRIP_PX = 1 << 24
_HALF = 0.5 - 1e-4
"""Weights of 32 bits round."""
_ANYTHING = ReadOptions(value_range=(0.0, 1e-6))
"""Labels of 16 or 32 bits, and shares: whatever is above 0 is lit."""
_SAME = 0.01
"""Sides may differ by rounding: by this share, or by a pixel."""


def shares(content: bytes, size_l0: tuple[int, int], shape: tuple[int, int]) -> Mask:
    """Return which cells of a grid over the slide are lit by half or more.

    Args:
        content: of the image file.
        size_l0: (rows, columns) of the slide at level 0.
        shape: (rows, columns) of the grid.

    Raises:
        UnreadableSlide: the file is no image, damaged, too large for its format, or its aspect
            ratio differs from the slide's.
    """
    if content[:4] in tiff_reader.MAGIC:
        with tiff_reader.tiff_errors():
            file = tifffile.TiffFile(io.BytesIO(content))
            series = max(file.series, key=lambda one: one.keyframe.size)
            page = series.keyframe
            size = (int(page.imagelength), int(page.imagewidth))
        if size[0] * size[1] > WHOLE_PX or page.dtype not in _BYTES or _is_array(page):
            _refuse_shape(size, size_l0)
            return _shrunk(_tiled(file, series), size, shape)
    picture = _opened(content)
    size = (picture.height, picture.width)
    _refuse_shape(size, size_l0)
    check_size(size, DECODE_PX)
    with parser_errors():
        picture.load()
    return _shrunk(lambda top, bottom: _strip(picture, top, bottom), size, shape)


def _opened(content: bytes) -> Image.Image:
    """Open an image without Pillow's own limits and warnings."""
    Image.init()
    for name in _FORMATS:
        factory, accept = Image.OPEN[name]
        if accept is None or accept(content[:16]) is True:
            with parser_errors():
                return factory(io.BytesIO(content), "")
    raise UnreadableSlide(
        "the file is not an image that can be read, and its name does not end in .geojson."
    )


def _refuse_shape(size: tuple[int, int], size_l0: tuple[int, int]) -> None:
    factor = sum(a / b for a, b in zip(size, size_l0, strict=True)) / 2
    off = [abs(a - factor * b) for a, b in zip(size, size_l0, strict=True)]
    if all(one <= max(1.0, _SAME * a) for one, a in zip(off, size, strict=True)):
        return
    turned = " (is it transposed?)" if (size[0] < size[1]) != (size_l0[0] < size_l0[1]) else ""
    raise UnreadableSlide(
        f"the mask is {size[0]} rows x {size[1]} columns, and its slide {size_l0[0]} x "
        f"{size_l0[1]}: these are not of one shape{turned}; make it of the whole slide, at any "
        "resolution."
    )


def _is_array(page: tifffile.TiffPage) -> bool:
    """Return whether tifffile wrote an array of booleans, whose True it marks as black."""
    return bool(page.is_shaped) and page.dtype == np.bool_


def _tiled(file: tifffile.TiffFile, series: Any) -> Strip:
    level = _MaskLevel(file.filehandle, series.keyframe, series.pages[0], series.axes, _ANYTHING)

    def strip(top: int, bottom: int) -> Mask:
        return np.asarray(level.read(top, 0, bottom - top, level.size[1]).any(axis=-1))

    return strip


class _MaskLevel(tiff_reader.TiffLevel):
    """Return where samples of a page are above 0; False in tiles that a sparse file lacks."""

    def _decoded(self, index: int) -> Pixels:
        channels, dark = self._channels, np.zeros((*self._piece, 3), np.uint8)
        if not self._page.databytecounts[index]:
            return dark
        if self._palette is not None or (channels.inverted and not _is_array(self._kind)):
            return super()._decoded(index)
        several = range(int(self._kind.samplesperpixel)) if self._separate else (0,)
        planes = [self._samples(index + plane * self._count) for plane in several]
        stored = [plane for plane in planes if plane is not None]
        if len(stored) < len(planes):
            return dark
        samples = np.concatenate(stored, axis=-1)
        lit: Mask = np.any(samples[..., channels.colours] > 0, axis=-1)
        if channels.alpha is not None:
            lit &= samples[..., channels.alpha] > 0
        return repeated(lit[..., None].astype(np.uint8))


def _strip(picture: Image.Image, top: int, bottom: int) -> Mask:
    """Return which pixels of some rows are not 0, including labels above 255 and faint colours."""
    with parser_errors():
        strip = picture.crop((0, top, picture.width, bottom))
        clear = strip.info.get("transparency")
        if strip.mode in _NUMBERS and (clear is None or strip.mode in _DEEP):
            return (np.asarray(strip) > 0) & (np.asarray(strip) != (0 if clear is None else clear))
        if strip.mode not in _NUMBERS and "A" not in strip.mode and strip.mode not in ("P", "RGB"):
            strip = strip.convert("RGB")
        pixels = np.asarray(strip.convert("RGBA"))
    lit: Mask = (pixels[..., :3] > 0).any(axis=-1) & (pixels[..., 3] > 0)
    return lit


def _shrunk(strip: Strip, size: tuple[int, int], shape: tuple[int, int]) -> Mask:
    """Return the mask at the resolution of a grid, a few of its rows at a time."""
    mask, per_row = np.zeros(shape, bool), size[0] / shape[0]
    step = max(1, int(_STRIP_PX / (size[1] * max(1.0, per_row))))
    for first, last in spans(shape[0], step):
        start, stop = first * per_row, min(last * per_row, size[0])
        top, bottom = max(0, math.floor(start) - 1), min(size[0], math.ceil(stop) + 1)
        lit = Image.fromarray(strip(top, bottom).astype(np.float32))
        box = (0, start - top, size[1], min(stop - top, bottom - top))
        cells = lit.resize((shape[1], last - first), Image.Resampling.BOX, box=box)
        mask[first:last] = np.asarray(cells) >= _HALF
    return mask
