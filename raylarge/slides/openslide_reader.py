"""Slides in vendors' formats, by OpenSlide: Aperio, Hamamatsu, Leica, MIRAX, DICOM and others.

What OpenSlide calls generic-tiff is not read here but in `tiff_reader`, which gives the same
pixels in a fifth of the time, refuses 16 bits where OpenSlide drops half of them, and knows
OME, SubIFDs and more codecs. Associated images (label, macro) are never touched.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import openslide
from jaxtyping import UInt8
from PIL import ImageCms

from raylarge.slides import icc
from raylarge.slides.protocol import DAMAGE, Hint, Pixels, damage

_UM_PER_UNIT = {"centimeter": 10_000.0, "inch": 25_400.0}
_OPAQUE = 0xFF000000
_BROKEN = (*DAMAGE, openslide.OpenSlideError)


class OpenSlidePyramid:
    """The levels of a slide; transparent (unscanned) pixels are white."""

    georeference = None

    def __init__(self, path: str) -> None:
        """Open a slide whose vendor OpenSlide has recognised.

        Raises:
            Refusal: OpenSlide recognises the format but cannot open the file.
        """
        with damage(*_BROKEN):
            self._slide = openslide.OpenSlide(path)
            self.sizes = [(rows, columns) for columns, rows in self._slide.level_dimensions]
            properties = dict(self._slide.properties)
        self.mpp_hints = mpp_hints(properties)

    @property
    def icc_profile(self) -> bytes | None:
        """The profile that OpenSlide finds for the levels.

        Raises:
            Refusal: it is broken.
        """
        try:
            profile = self._slide.color_profile
        except (OSError, ImageCms.PyCMSError) as error:
            raise icc.broken(error) from error
        return None if profile is None else profile.tobytes()

    def read_level(self, level: int, top: int, left: int, rows: int, columns: int) -> Pixels:
        """A region inside a level, in that level's pixels.

        Raises:
            Refusal: the file is damaged there.
        """
        factor = self._slide.level_downsamples[level]
        corner = (round(left * factor), round(top * factor))
        with damage(*_BROKEN):
            region = np.asarray(self._slide.read_region(corner, level, (columns, rows)))
        # Alpha is the highest byte of a little-endian word: one pass tells whether all is opaque.
        if region.view("<u4").min(initial=_OPAQUE) == _OPAQUE:
            return _rgb(region)
        alpha = region[..., 3:].astype(np.uint16)
        return ((region[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)

    def close(self) -> None:
        """Let go of the file."""
        self._slide.close()


def _rgb(region: UInt8[np.ndarray, "_ _ 4"]) -> Pixels:
    """The first three of four bands; band by band, since numpy copies triples slowly."""
    pixels = np.empty((*region.shape[:2], 3), np.uint8)
    for band in range(3):
        pixels[..., band] = region[..., band]
    return pixels


def vendor(path: str) -> str | None:
    """OpenSlide's name for a file's format; None where it knows none."""
    try:
        found: str | None = openslide.OpenSlide.detect_format(path)
    except openslide.OpenSlideError:  # a header that looks right and breaks off
        return None
    return found


def mpp_hints(properties: Mapping[str, str]) -> list[Hint]:
    """What the properties say about micrometres per pixel, most trusted first."""
    unit = _UM_PER_UNIT.get(properties.get("tiff.ResolutionUnit", ""), 0.0)
    pairs = {
        "openslide.mpp": [_number(properties, f"openslide.mpp-{axis}") for axis in "yx"],
        "aperio.MPP": [_number(properties, "aperio.MPP")] * 2,
        "TIFF resolution": [
            _inverse(unit, _number(properties, f"tiff.{axis}Resolution")) for axis in "YX"
        ],
        "objective power": [_inverse(10.0, _number(properties, "openslide.objective-power"))] * 2,
        "aperio.AppMag": [_inverse(10.0, _number(properties, "aperio.AppMag"))] * 2,
    }
    return [Hint(name, y or x, x or y) for name, (y, x) in pairs.items() if y > 0 or x > 0]


def _number(properties: Mapping[str, str], name: str) -> float:
    """A property as a number; 0 where it is absent or none."""
    try:
        return float(properties.get(name, "0"))
    except ValueError:
        return 0.0


def _inverse(numerator: float, value: float) -> float:
    return numerator / value if value > 0 else 0.0
