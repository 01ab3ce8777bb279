"""Plain images as slides of one level: PNG, JPEG, and TIFF that is no pyramid.

The whole image is decoded into memory, so its size is limited; a larger one belongs into a
tiled pyramidal TIFF, which OpenSlide reads piece by piece.
"""

from __future__ import annotations

import warnings

import numpy as np
import tifffile
from PIL import Image, UnidentifiedImageError

from raylarge.errors import UserError
from raylarge.slides.reader import Pixels

LIMIT_PX = 178_956_970
"""Pillow's own limit against decompression bombs, for every format."""
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_DAMAGE = (OSError, SyntaxError, ValueError, LookupError, RuntimeError, tifffile.TiffFileError)
"""What Pillow, tifffile and imagecodecs raise on files that are cut short or garbled."""
_UM_PER_UNIT = {2: 25_400.0, 3: 10_000.0}


class ImagePyramid:
    """One level: the image itself; of more than three bands the first three are read."""

    def __init__(self, path: str) -> None:
        """Decode an image file.

        Raises:
            UserError: no image, a damaged one, or one above the pixel limit.
        """
        with open(path, "rb") as stream:
            is_tiff = stream.read(4) in _TIFF_MAGIC
        try:
            self._image, dots_mpp = (_read_tiff if is_tiff else _read_image)(path)
        except UnidentifiedImageError as error:
            raise UserError(
                f"slide {path} is neither a slide that OpenSlide knows nor a PNG, JPEG or TIFF "
                "image; it may be damaged: fetch it again or leave it out."
            ) from error
        except _DAMAGE as error:
            raise UserError(
                f"slide {path} is damaged or incomplete ({error}); fetch it again or leave it out."
            ) from error
        self.sizes = [(self._image.shape[0], self._image.shape[1])]
        self.mpp_hints = [("resolution", dots_mpp)] if dots_mpp > 0 else []

    def read_level(self, level: int, top: int, left: int, rows: int, columns: int) -> Pixels:
        """A region inside the image; the only level is 0."""
        return self._image[top : top + rows, left : left + columns]

    def close(self) -> None:
        """Let go of the pixels."""
        self._image = np.empty((0, 0, 3), np.uint8)


def _read_image(path: str) -> tuple[Pixels, float]:
    """Pixels, and micrometres per pixel from the dots per inch (0 where absent)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            picture: Image.Image = Image.open(path)
        except Image.DecompressionBombError as error:
            raise _too_large(path) from error
    dots_per_inch = float(picture.info.get("dpi", (0, 0))[0])
    mpp = 25_400.0 / dots_per_inch if dots_per_inch > 0 else 0.0
    if picture.has_transparency_data:
        page = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(page, picture.convert("RGBA"))
    return np.asarray(picture.convert("RGB")), mpp


def _read_tiff(path: str) -> tuple[Pixels, float]:
    """Pixels of the first page, and micrometres per pixel from its tags (0 where absent)."""
    with tifffile.TiffFile(path) as file:
        page = file.pages.first
        if page.imagewidth * page.imagelength > LIMIT_PX:
            raise _too_large(path)
        if page.dtype != np.uint8:
            raise UserError(
                f"slide {path} holds {page.dtype} pixels, not 8-bit; convert it to 8-bit RGB."
            )
        pixels = page.asarray()
        if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE and pixels.ndim == 3:
            pixels = np.moveaxis(pixels, 0, -1)
        unit = _UM_PER_UNIT.get(int(page.resolutionunit), 0.0)
        dots = float(page.resolution[0])
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=-1)
    if pixels.shape[-1] < 3:
        pixels = np.repeat(pixels[..., :1], 3, axis=-1)
    return np.ascontiguousarray(pixels[..., :3]), unit / dots if dots > 0 else 0.0


def _too_large(path: str) -> UserError:
    return UserError(
        f"image {path} has more than {LIMIT_PX:,} pixels, too many to decode at once; "
        "convert it to a tiled pyramidal TIFF (for example with `vips tiffsave --tile --pyramid`)."
    )
