"""Read slides in vendors' formats by OpenSlide: Aperio, Hamamatsu, Leica, MIRAX, DICOM and others.

`tiff_reader` reads what OpenSlide calls generic-tiff: it gives the same pixels in a fifth of the
time, keeps 16-bit samples, and knows OME, SubIFDs and more codecs. Associated images (label, macro)
are never read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import numpy as np
import openslide
from jaxtyping import UInt8
from PIL import ImageCms

from raylarge import pixels
from raylarge.slides import icc, scenes
from raylarge.slides.protocol import DAMAGE, Hint, Pixels, parser_errors

_UM_PER_UNIT = {"centimeter": 10_000.0, "inch": 25_400.0}
_OPAQUE = 0xFF000000
_BROKEN = (*DAMAGE, openslide.OpenSlideError)


class OpenSlidePyramid:
    """The levels of a slide; transparent (unscanned) pixels are white."""

    georeference = None

    def __init__(self, path: str, scene: str = "") -> None:
        """Open a slide whose vendor OpenSlide has recognised.

        Args:
            path: the file.
            scene: the number of a region, where the scan has several (Leica, Zeiss); empty: all
                of them on one canvas.

        Raises:
            UnreadableSlide: OpenSlide cannot open the file, or there is no such region.
        """
        with ExitStack() as opened:
            with parser_errors(*_BROKEN):
                self._slide = opened.enter_context(openslide.OpenSlide(path))
                self.sizes = [(rows, columns) for columns, rows in self._slide.level_dimensions]
                properties = dict(self._slide.properties)
            self.mpp_hints = mpp_hints(properties)
            self._corner_l0 = (0, 0)
            self.notes = self._restricted(_regions(properties), scene)
            opened.pop_all()

    def _restricted(self, regions: Sequence[tuple[int, ...]], scene: str) -> list[str]:
        """Restrict the levels to a region of the scan, if one is named; return notes on it."""
        if len(regions) < 2:
            scenes.require_single_scene(scene)
            return []
        if not scene:
            return [
                f"the scan has {len(regions)} regions, which were read as one image "
                "(tile.scene= names one by its number from 0)"
            ]
        sizes = [(rows, columns) for _, _, rows, columns in regions]
        number, notes = scenes.choose([], sizes, scene)
        top, left, rows, columns = regions[number]
        self._corner_l0 = (top, left)
        self.sizes = [
            (max(1, int(rows / factor)), max(1, int(columns / factor)))
            for factor in self._slide.level_downsamples
        ]
        return notes

    @property
    def icc_profile(self) -> bytes | None:
        """Return the profile that OpenSlide finds for the levels.

        Raises:
            UnreadableSlide: it is broken.
        """
        try:
            profile = self._slide.color_profile
        except (OSError, ImageCms.PyCMSError) as error:
            raise icc.broken(error) from error
        return None if profile is None else profile.tobytes()

    def read_level(self, level: int, top: int, left: int, rows: int, columns: int) -> Pixels:
        """Return a region inside a level, in that level's pixels.

        Raises:
            UnreadableSlide: the file is damaged there.
        """
        factor = self._slide.level_downsamples[level]
        corner = (
            self._corner_l0[1] + round(left * factor),
            self._corner_l0[0] + round(top * factor),
        )
        with parser_errors(*_BROKEN):
            region = np.asarray(self._slide.read_region(corner, level, (columns, rows)))
        # Alpha is the highest byte of a little-endian word: one pass tells whether all is opaque.
        if region.view("<u4").min(initial=_OPAQUE) == _OPAQUE:
            return _rgb(region)
        return pixels.over_white(region[..., :3], region[..., 3])

    def close(self) -> None:
        """Close the file."""
        self._slide.close()


def _regions(properties: Mapping[str, str]) -> list[tuple[int, ...]]:
    """(top, left, rows, columns) in level-0 pixels of the regions of a scan that has several."""
    regions: list[tuple[int, ...]] = []
    while f"openslide.region[{len(regions)}].x" in properties:
        name = f"openslide.region[{len(regions)}]"
        fields = ("y", "x", "height", "width")
        regions.append(tuple(int(_number(properties, f"{name}.{field}")) for field in fields))
    return regions


def _rgb(region: UInt8[np.ndarray, "_ _ 4"]) -> Pixels:
    """Return the first three of four bands; band by band, since numpy copies triples slowly."""
    rgb = np.empty((*region.shape[:2], 3), np.uint8)
    for band in range(3):
        rgb[..., band] = region[..., band]
    return rgb


def vendor(path: str) -> str | None:
    """Return OpenSlide's name for a file's format; None where it knows none."""
    try:
        name: str | None = openslide.OpenSlide.detect_format(path)
    except openslide.OpenSlideError:  # a header that looks right and breaks off
        return None
    return name


def mpp_hints(properties: Mapping[str, str]) -> list[Hint]:
    """Return what the properties say about micrometres per pixel, most trusted first."""
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
    """Return a property as a number; 0 if it is absent or not a number."""
    try:
        return float(properties.get(name, "0"))
    except ValueError:
        return 0.0


def _inverse(numerator: float, value: float) -> float:
    return numerator / value if value > 0 else 0.0
