"""Which samples of an image are its colours and its transparency, and their way to 8-bit RGB.

GeoTIFF and TIFF share these rules. `tile.bands=` comes first; then what the file says (the colour
interpretation of its bands, its photometric tag); where it says nothing, a single band is grey and
the first of three or four are red, green and blue, which is said. Other counts are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Shaped, UInt8

from raylarge import pixels
from raylarge.slides.protocol import Pixels, ReadOptions, UnreadableSlide

_CURE = "set tile.bands=[red,green,blue], or tile.bands=[grey], by numbers from 1."


@dataclass(frozen=True)
class Channels:
    """The samples of a pixel that are read.

    Attributes:
        colours: indices from 0 of red, green and blue, or of grey alone.
        alpha: index of the transparency; None where there is none.
        bits: significant bits of unsigned samples; 0: all of their type.
        value_range: what becomes 0 and 255 in samples of more than 8 bits.
        premultiplied: whether colours are stored multiplied by alpha.
        inverted: whether 0 is white.
    """

    colours: tuple[int, ...]
    alpha: int | None = None
    bits: int = 0
    value_range: tuple[float, ...] = ()
    premultiplied: bool = False
    inverted: bool = False

    def scaled(self, samples: Shaped[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
        """Return samples of colours as 8-bit ones."""
        small = samples.dtype.kind in ("b", "u") and samples.dtype.itemsize == 1
        return pixels.to_8_bits(samples, self.bits, () if small else self.value_range)

    def opacity(self, alpha: Shaped[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
        """Return transparency as 8-bit samples; of other than unsigned types above 0 is opaque."""
        if alpha.dtype.kind in ("b", "u") and alpha.dtype.itemsize <= 2:
            return pixels.to_8_bits(alpha, self.bits)
        return (alpha > 0).astype(np.uint8) * np.uint8(255)

    def rgb(self, samples: Shaped[np.ndarray, "rows columns c"]) -> Pixels:
        """Return interleaved samples (colours, then alpha where there is one) as 8-bit RGB."""
        count = len(self.colours)
        colours = self.scaled(samples[..., :count])
        if self.inverted:
            colours = 255 - colours
        if self.alpha is not None:
            opacity = self.opacity(samples[..., count])
            colours = pixels.over_white(colours, opacity, self.premultiplied)
        return colours if count == 3 else pixels.repeated(colours)


def require_depth(dtype: Any, bits: int, options: ReadOptions) -> str:
    """Refuse samples that have no way to 8 bits; return what is worth saying about their way.

    Raises:
        UnreadableSlide: complex numbers; or no unsigned type, and no `tile.value_range`.
    """
    dtype = np.dtype(dtype)
    if dtype.kind not in "buif":
        raise UnreadableSlide(
            f"the file holds {dtype.name} samples, which are no colours; leave it out."
        )
    if options.value_range and not (dtype.kind in ("b", "u") and dtype.itemsize == 1):
        low, high = options.value_range
        return f"{dtype.name} samples: {low:g} became 0, and {high:g} became 255"
    try:
        bits = pixels.require_depth(dtype, bits)
    except pixels.PixelFormatError as error:
        raise UnreadableSlide(
            f"{error}, or set tile.value_range=[low,high] to what becomes 0 and 255."
        ) from error
    if bits <= 8:
        return ""
    top = (1 << bits) - 1
    return (
        f"{bits}-bit samples: 0 to {top} became 0 to 255 (tile.value_range=[low,high] sets another "
        "range)"
    )


def of_user(bands: Sequence[int], count: int) -> tuple[int, ...]:
    """Return the indices from 0 that `tile.bands` names.

    Raises:
        UnreadableSlide: the image has fewer bands.
    """
    if max(bands) > count:
        raise UnreadableSlide(
            f"the file has {count} bands, and tile.bands={list(bands)} names others; {_CURE}"
        )
    return tuple(band - 1 for band in bands)


def unnamed(indices: Sequence[int]) -> tuple[tuple[int, ...], str]:
    """Return which bands are the colours where the file names none, and a note on that.

    Args:
        indices: of all bands that are no transparency.

    Raises:
        UnreadableSlide: two, five or more bands may be anything.
    """
    if len(indices) == 1:
        return tuple(indices), ""
    if len(indices) not in (3, 4):
        raise UnreadableSlide(
            f"the file has {len(indices)} bands and does not say which are red, green and blue; "
            f"{_CURE}"
        )
    first = tuple(indices[:3])
    numbers = ", ".join(str(index + 1) for index in first)
    return first, (
        f"the file does not say which bands are its colours: bands {numbers} were read as red, "
        "green and blue (tile.bands= names others)"
    )
