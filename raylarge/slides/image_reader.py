"""PNG and JPEG as slides: small ones in memory, large ones converted into tiles once per node.

Grey, palette, 1-bit and transparent images (over white) become RGB; 16-bit RGB keeps its upper
byte, as Pillow reads it. 16-bit grey and CMYK are refused. Rows and columns are those stored in
the file: an EXIF orientation is not applied, so that coordinates mean what they mean elsewhere.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, JpegImagePlugin, PngImagePlugin

from raylarge.slides.protocol import (
    DECODE_PX,
    WHOLE_PX,
    Hint,
    Pixels,
    Refusal,
    damage,
    refuse_size,
)
from raylarge.slides.tiff_reader import ConvertedPyramid

_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")
_UM_PER_INCH = 25_400.0


class ImagePyramid:
    """One level in memory, or the levels of the converted image."""

    georeference = None

    def __init__(self, path: str) -> None:
        """Open an image file.

        Raises:
            Refusal: neither PNG nor JPEG, colours that are not 8-bit RGB or grey, or more
                pixels than may be decoded.
        """
        with damage():
            opened = _opened(path)
        with opened as picture:
            size = (picture.height, picture.width)
            refuse_size(size, DECODE_PX)
            if picture.mode not in _MODES:
                raise Refusal(f"holds {picture.mode} pixels; convert it to 8-bit RGB.")
            self.icc_profile: bytes | None = picture.info.get("icc_profile") or None
            with damage():
                self.mpp_hints = _mpp_hints(picture)
            self._image: Pixels | None = None
            self._tiles: ConvertedPyramid | None = None
            if size[0] * size[1] <= WHOLE_PX:
                with damage():
                    self._image = _rgb(picture)
                self.sizes = [size]
            else:
                self._tiles = ConvertedPyramid(path, size, lambda *rows: _strip(picture, *rows))
                self.sizes = self._tiles.sizes

    def read_level(self, level: int, top: int, left: int, rows: int, columns: int) -> Pixels:
        """A region inside a level."""
        if self._tiles is not None:
            return self._tiles.read_level(level, top, left, rows, columns)
        assert self._image is not None, "the slide is closed"
        return self._image[top : top + rows, left : left + columns]

    def close(self) -> None:
        """Let go of the pixels."""
        self._image = None
        if self._tiles is not None:
            self._tiles.close()


def _opened(path: str) -> Image.Image:
    """The header of an image; the plug-ins are asked by name, so limits are ours alone."""
    with open(path, "rb") as stream:
        head = stream.read(8)
    if head.startswith(b"\x89PNG"):
        return PngImagePlugin.PngImageFile(path)
    if head.startswith(b"\xff\xd8"):
        return JpegImagePlugin.JpegImageFile(path)
    raise Refusal(
        "is neither a slide that OpenSlide knows nor a TIFF, PNG or JPEG image; it may be "
        "damaged: fetch it again or leave it out."
    )


def _mpp_hints(picture: Image.Image) -> list[Hint]:
    """Micrometres per pixel from the dots per inch."""
    across, down = (float(dots) for dots in picture.info.get("dpi", (0, 0)))
    if across <= 0 or down <= 0:
        return []
    return [Hint("image resolution", _UM_PER_INCH / down, _UM_PER_INCH / across)]


def _strip(picture: Image.Image, top: int, bottom: int) -> Pixels:
    with damage():
        return _rgb(picture.crop((0, top, picture.width, bottom)))


def _rgb(picture: Image.Image) -> Pixels:
    """Pixels as RGB, over white where they are transparent."""
    if picture.has_transparency_data:
        page = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(page, picture.convert("RGBA"))
    return np.asarray(picture.convert("RGB"))
