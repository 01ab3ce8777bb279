"""Conversion of decoded samples to 8-bit RGB: one rule for slides and for uploaded images.

Depth: unsigned samples of b bits become round(255 v / (2^b - 1)); b is 8 or 16, or what the file
declares (12 bits in 16-bit words). Signed, 32-bit and floating-point samples have no range of
their own: they are refused unless the caller names `[low, high]`, which becomes 0 to 255, clipped;
NaN becomes white. Colours: one channel is repeated. Transparency: composited over white. CMYK and
Lab are refused: without a colour profile they name no colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image

Rgb = UInt8[np.ndarray, "rows columns 3"]
_DEEP = ("I;16", "I;16L", "I;16B", "I;16N")
_SHALLOW = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX")
_CHUNK = 1 << 22
"""Samples converted through float32 at a time: 16 MB."""


class PixelFormatError(Exception):
    """Samples without a defined conversion to 8-bit RGB; the message ends without a period."""


def to_8_bits(
    samples: Shaped[np.ndarray, "*shape"], bits: int = 0, value_range: Sequence[float] = ()
) -> UInt8[np.ndarray, "*shape"]:
    """Return samples of any depth as 8-bit ones.

    Args:
        samples: of any numeric or boolean type.
        bits: significant bits of unsigned samples; 0: all bits of their type.
        value_range: the values that become 0 and 255; empty: the rule of the module.

    Raises:
        PixelFormatError: the type has no range of its own, and none is given.
    """
    if samples.dtype == np.bool_:
        return samples.astype(np.uint8) * np.uint8(255)
    if not value_range:
        bits = require_depth(samples.dtype, bits)
        if bits == 8:
            return samples.astype(np.uint8, copy=False)
        return _by_table(samples, bits)
    low, high = value_range
    flat, result = samples.reshape(-1), np.empty(samples.size, np.uint8)
    for start in range(0, flat.size, _CHUNK):
        values = flat[start : start + _CHUNK].astype(np.float32)
        with np.errstate(invalid="ignore", over="ignore"):
            values = np.clip((values - low) * (255.0 / (high - low)), 0, 255)
        result[start : start + _CHUNK] = np.where(np.isnan(values), 255, np.floor(values + 0.5))
    return result.reshape(samples.shape)


def require_depth(dtype: Any, bits: int = 0) -> int:
    """Return the significant bits of samples that have a range of their own.

    Raises:
        PixelFormatError: a signed, 32-bit, 64-bit or floating-point type.
    """
    dtype = np.dtype(dtype)
    if dtype == np.bool_:
        return 1
    if dtype.kind != "u" or dtype.itemsize > 2:
        raise PixelFormatError(
            f"the file holds {dtype.name} samples, which have no range of their own; convert it "
            "to 8-bit RGB with the contrast you want"
        )
    return bits or 8 * dtype.itemsize


def _by_table(samples: Shaped[np.ndarray, "*shape"], bits: int) -> UInt8[np.ndarray, "*shape"]:
    """Scale unsigned samples of a number of bits; larger values are clipped."""
    top = (1 << bits) - 1
    values = np.minimum(np.arange(1 << 8 * samples.dtype.itemsize), top)
    table = ((values * 510 + top) // (2 * top)).astype(np.uint8)
    return table[samples]


def over_white(
    colours: UInt8[np.ndarray, "rows columns c"],
    alpha: UInt8[np.ndarray, "rows columns"],
    premultiplied: bool = False,
) -> UInt8[np.ndarray, "rows columns c"]:
    """Composite colours over white: c a + 255 (1 - a), rounded; premultiplied: c + 255 (1 - a)."""
    share = alpha[..., None].astype(np.uint16)
    if premultiplied:
        return np.minimum(colours + (255 - share), 255).astype(np.uint8)
    return ((colours * share + 255 * (255 - share) + 127) // 255).astype(np.uint8)


def repeated(grey: UInt8[np.ndarray, "rows columns 1"]) -> Rgb:
    """Return one channel as three equal ones."""
    return np.repeat(grey, 3, axis=-1)


def mirrored(image: np.ndarray, flip: int) -> np.ndarray:
    """Return [rows, columns, ...] under a flip: 1 reverses the columns, 2 the rows, 3 both."""
    return image[:: -1 if flip & 2 else 1, :: -1 if flip & 1 else 1]


def require_mode(mode: str) -> None:
    """Refuse a mode of Pillow that has no stated way to 8-bit RGB.

    Raises:
        PixelFormatError: floating point, 32 bits, CMYK, Lab and the like.
    """
    if mode not in (*_DEEP, *_SHALLOW):
        names = {"F": "floating-point grey", "I": "32-bit grey"}
        raise PixelFormatError(
            f"the file holds {names.get(mode, mode)} pixels, which have no fixed meaning as RGB; "
            "convert it to 8-bit RGB"
        )


def from_picture(picture: Image.Image, value_range: Sequence[float] = ()) -> Rgb:
    """Return the pixels of a Pillow image as 8-bit RGB, over white where they are transparent.

    Pillow itself reduces 16-bit RGB to its upper byte, at most one level from the rule.

    Args:
        picture: loaded or not.
        value_range: of 16-bit grey, what becomes 0 and 255; empty: the rule of the module.

    Raises:
        PixelFormatError: see `require_mode`.
    """
    require_mode(picture.mode)
    if picture.mode in _DEEP:
        deep = np.asarray(picture)
        grey = to_8_bits(deep.astype(np.uint16, copy=False), value_range=value_range)
        if isinstance(picture.info.get("transparency"), int):
            grey[deep == picture.info["transparency"]] = 255
        return repeated(grey[..., None])
    if picture.has_transparency_data or picture.mode in ("La", "RGBa"):
        if picture.mode == "La":  # Pillow converts it to LA alone
            picture = picture.convert("LA")
        rgba = np.asarray(picture.convert("RGBA"))
        return over_white(rgba[..., :3], rgba[..., 3])
    return np.asarray(picture.convert("RGB"))
