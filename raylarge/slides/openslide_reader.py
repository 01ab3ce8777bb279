"""Slides that OpenSlide reads (Aperio, Hamamatsu, Leica, Mirax, generic pyramidal TIFF ...)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import openslide
from PIL import Image

from raylarge.errors import UserError
from raylarge.slides.reader import Pixels

_UM_PER_UNIT = {"centimeter": 10_000.0, "inch": 25_400.0}


class OpenSlidePyramid:
    """The levels of a slide; transparent (unscanned) pixels are white."""

    def __init__(self, path: str) -> None:
        """Open a slide that `knows` has recognised.

        Raises:
            UserError: OpenSlide recognises the format but cannot open the file.
        """
        self._path = path
        try:
            self._slide = openslide.OpenSlide(path)
        except openslide.OpenSlideError as error:
            raise _broken(path, error) from error
        self.sizes = [(rows, columns) for columns, rows in self._slide.level_dimensions]
        self.mpp_hints = _mpp_hints(self._slide.properties)

    @staticmethod
    def knows(path: str) -> bool:
        """Whether OpenSlide recognises the file's format."""
        return openslide.OpenSlide.detect_format(path) is not None

    def read_level(self, level: int, top: int, left: int, rows: int, columns: int) -> Pixels:
        """A region inside a level, in that level's pixels.

        Raises:
            UserError: the file is damaged there.
        """
        factor = self._slide.level_downsamples[level]
        corner = (round(left * factor), round(top * factor))
        try:
            region = self._slide.read_region(corner, level, (columns, rows))
        except openslide.OpenSlideError as error:
            raise _broken(self._path, error) from error
        if region.getchannel("A").getextrema() == (255, 255):
            return np.asarray(region)[..., :3]
        page = Image.new("RGBA", region.size, (255, 255, 255, 255))
        return np.asarray(Image.alpha_composite(page, region))[..., :3]

    def close(self) -> None:
        """Let go of the file."""
        self._slide.close()


def _mpp_hints(properties: Mapping[str, str]) -> list[tuple[str, float]]:
    """What the properties say about micrometres per pixel, most trusted first."""
    unit = _UM_PER_UNIT.get(properties.get("tiff.ResolutionUnit", ""), 0.0)
    found = [
        ("openslide.mpp-x", _number(properties, "openslide.mpp-x")),
        ("aperio.MPP", _number(properties, "aperio.MPP")),
        ("TIFF resolution", _inverse(unit, _number(properties, "tiff.XResolution"))),
        ("objective power", _inverse(10.0, _number(properties, "openslide.objective-power"))),
        ("aperio.AppMag", _inverse(10.0, _number(properties, "aperio.AppMag"))),
    ]
    return [(name, mpp) for name, mpp in found if mpp > 0]


def _number(properties: Mapping[str, str], name: str) -> float:
    """A property as a number; 0 where it is absent or none."""
    try:
        return float(properties.get(name, "0"))
    except ValueError:
        return 0.0


def _inverse(numerator: float, value: float) -> float:
    return numerator / value if value > 0 else 0.0


def _broken(path: str, error: Exception) -> UserError:
    return UserError(
        f"slide {path} is damaged or incomplete (OpenSlide: {error}); "
        "fetch it again or leave it out."
    )
