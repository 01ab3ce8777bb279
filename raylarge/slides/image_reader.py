"""Read PNG and JPEG: small images in memory, large ones converted into tiles once per node.

Pixels become RGB as in `raylarge/pixels.py`; CMYK is refused. An EXIF orientation is not applied:
rows and columns are those stored in the file.
"""

from __future__ import annotations

from PIL import Image, JpegImagePlugin, PngImagePlugin

from raylarge import pixels
from raylarge.slides import bands, scenes
from raylarge.slides.protocol import (
    AS_STORED,
    DECODE_PX,
    WHOLE_PX,
    Hint,
    Pixels,
    ReadOptions,
    UnreadableSlide,
    check_size,
    parser_errors,
)
from raylarge.slides.tiff_reader import ConvertedPyramid

_UM_PER_INCH = 25_400.0


class ImagePyramid:
    """One level in memory, or the levels of the converted image."""

    georeference = None

    def __init__(self, path: str, options: ReadOptions = AS_STORED) -> None:
        """Open an image file.

        Raises:
            UnreadableSlide: the file is neither PNG nor JPEG, its pixels have no conversion to
                8-bit RGB or are too many, or an option does not apply to images.
        """
        scenes.require_single_scene(options.scene)
        if options.bands not in ((), (1, 2, 3)):
            raise UnreadableSlide(
                "the file is PNG or JPEG, of which tile.bands= chooses nothing; leave it out."
            )
        with parser_errors():
            opened = _opened(path)
        with opened as picture:
            size = (picture.height, picture.width)
            check_size(size, DECODE_PX)
            self.notes = _depth(picture, options)
            self.icc_profile: bytes | None = picture.info.get("icc_profile") or None
            with parser_errors():
                self.mpp_hints = _mpp_hints(picture)
            value_range = options.value_range
            self._image: Pixels | None = None
            self._tiles: ConvertedPyramid | None = None
            if size[0] * size[1] <= WHOLE_PX:
                with parser_errors():
                    self._image = pixels.from_picture(picture, value_range)
                self.sizes = [size]
            else:
                self._tiles = ConvertedPyramid(
                    path, size, lambda *rows: _strip(picture, value_range, *rows), options
                )
                self.sizes = self._tiles.sizes

    def read_level(self, level: int, top: int, left: int, rows: int, columns: int) -> Pixels:
        """Return a region inside a level."""
        if self._tiles is not None:
            return self._tiles.read_level(level, top, left, rows, columns)
        assert self._image is not None, "the slide is closed"
        return self._image[top : top + rows, left : left + columns]

    def close(self) -> None:
        """Release the pixels."""
        self._image = None
        if self._tiles is not None:
            self._tiles.close()


def _opened(path: str) -> Image.Image:
    """Open an image by Pillow's plug-in, without the size limit of `Image.open`."""
    with open(path, "rb") as stream:
        head = stream.read(8)
    if head.startswith(b"\x89PNG"):
        return PngImagePlugin.PngImageFile(path)
    if head.startswith(b"\xff\xd8"):
        return JpegImagePlugin.JpegImageFile(path)
    raise UnreadableSlide(
        "the file is neither a slide that OpenSlide knows nor a TIFF, PNG or JPEG image; it may be "
        "damaged: fetch it again or leave it out."
    )


def _mpp_hints(picture: Image.Image) -> list[Hint]:
    """Return micrometres per pixel from the dots per inch."""
    across, down = (float(dots) for dots in picture.info.get("dpi", (0, 0)))
    if across <= 0 or down <= 0:
        return []
    return [Hint("image resolution", _UM_PER_INCH / down, _UM_PER_INCH / across)]


def _depth(picture: Image.Image, options: ReadOptions) -> list[str]:
    """Return notes on pixels of more than 8 bits.

    Raises:
        UnreadableSlide: the pixels have no conversion to 8-bit RGB, or Pillow has dropped the bits
            that `tile.value_range` needs.
    """
    try:
        pixels.require_mode(picture.mode)
    except pixels.PixelFormatError as error:
        raise UnreadableSlide(f"{error}.") from error
    if picture.mode.startswith("I;16"):
        note = bands.require_depth("uint16", 16, options)
    elif "16" not in str(getattr(picture, "tile", "")):
        note = ""
    elif options.value_range:
        raise UnreadableSlide(
            "the file holds 16-bit colours in a PNG, for which there is no tile.value_range; "
            "convert it to a 16-bit RGB TIFF."
        )
    else:
        note = "16-bit samples: 0 to 65535 became 0 to 255, by their upper byte"
    return [note] if note else []


def _strip(picture: Image.Image, value_range: tuple[float, ...], top: int, bottom: int) -> Pixels:
    with parser_errors():
        return pixels.from_picture(picture.crop((0, top, picture.width, bottom)), value_range)
