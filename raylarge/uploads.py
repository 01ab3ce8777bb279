"""Read images that users hand in: PNG, JPEG or TIFF, whose size is checked before they are decoded.

    bytes -> uint8 [rows, columns, 3], RGB, turned upright as EXIF says

16 bits, transparency and palettes follow `raylarge/pixels.py`; floating point, 32 bits, CMYK and
animations are refused. The content is hostile until shown otherwise: other decoders of Pillow (EPS
would start Ghostscript) are not tried, and a header may not claim more than `LIMIT_PX` pixels.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from raylarge import pixels
from raylarge.errors import UserError
from raylarge.order import Order
from raylarge.pixels import Rgb

FORMATS = ("PNG", "JPEG", "TIFF")
LIMIT_PX = 1 << 26
"""67 Mpx, 8192 x 8192: 200 MB decoded, and 800 MB as a network sees it."""
_SUBFILE, _BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 254, 258, 262, 339  # tags of TIFF
_WHITE_IS_ZERO, _SIGNED = 0, 2


def read(content: bytes, name: str) -> Rgb:
    """Return the pixels of an image file.

    Args:
        content: the file's bytes.
        name: what the image is called in messages, such as `source.image`.

    Raises:
        UserError: no PNG, JPEG or TIFF, damaged, more than `LIMIT_PX` pixels, several images, or
            pixels that have no stated way to 8-bit RGB.
    """
    with _sentences(name), Image.open(io.BytesIO(content), formats=FORMATS) as picture:
        if picture.width * picture.height > LIMIT_PX:
            raise _too_large(name, f"{picture.height} x {picture.width} pixels")
        if _has_several(picture):
            raise UserError(f"{name} holds several images; save the one to use as a PNG.")
        pixels.require_mode(picture.mode)
        if isinstance(picture, TiffImagePlugin.TiffImageFile):
            _require_plain(picture)
        picture.load()
        return pixels.from_picture(ImageOps.exif_transpose(picture))


def source_of(order: Order) -> Rgb:
    """Return the image that an order makes larger.

    Raises:
        UserError: as `read`, or the image has not the order's size over 2^octaves.
    """
    image = read(order.source.png(), "source.image")
    expected = tuple(length >> order.source.octaves for length in order.size)
    if image.shape[:2] != expected:
        raise UserError(
            f"the source has {image.shape[0]}x{image.shape[1]} px, an order of "
            f"{order.size} takes {expected[0]}x{expected[1]}."
        )
    return image


@contextmanager
def _sentences(name: str) -> Iterator[None]:
    """Turn whatever Pillow raises or warns of into one sentence."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except UserError:
            raise
        except pixels.PixelFormatError as error:
            raise UserError(f"{name}: {error}.") from error
        except UnidentifiedImageError as error:
            raise UserError(
                f"{name} is no PNG, JPEG or TIFF image that can be read; save it as a PNG."
            ) from error
        except Image.DecompressionBombError as error:
            raise _too_large(name, "far more pixels") from error
        except Exception as error:  # of damaged files Pillow's decoders raise anything at all
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            raise UserError(
                f"{name} is damaged or incomplete ({reason[:120]}); save it again as a PNG."
            ) from error


def _too_large(name: str, claim: str) -> UserError:
    return UserError(
        f"{name} claims {claim}, and at most {LIMIT_PX:,} are read; cut it into parts."
    )


def _has_several(picture: Image.Image) -> bool:
    """Return whether a file holds more than one image, besides smaller copies of it."""
    if not isinstance(picture, TiffImagePlugin.TiffImageFile):
        return picture.format == "PNG" and bool(getattr(picture, "is_animated", False))
    try:
        picture.seek(1)
    except EOFError:
        return False
    reduced = int(picture.tag_v2.get(_SUBFILE, 0)) & 1
    picture.seek(0)
    return not reduced


def _require_plain(picture: TiffImagePlugin.TiffImageFile) -> None:
    """Refuse TIFF samples that Pillow takes for others.

    These are samples of 9 to 15 bits, signed ones, and deep ones that count from white.

    Raises:
        PixelFormatError: saying what it holds.
    """
    bits = picture.tag_v2.get(_BITS, (1,))
    if any(depth not in (1, 2, 4, 8, 16) for depth in bits):
        raise pixels.PixelFormatError(
            f"the file holds {max(bits)}-bit samples; convert it to 8 or 16 bits"
        )
    if _SIGNED in picture.tag_v2.get(_SAMPLE_FORMAT, ()):
        raise pixels.PixelFormatError(
            "the file holds signed samples; convert it to unsigned 8 or 16 bits"
        )
    white = picture.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    if white and max(bits) > 8:
        raise pixels.PixelFormatError(
            "the file holds 16-bit samples of which 0 is white; invert it"
        )
