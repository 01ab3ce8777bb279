"""A slide seen at the base scale, whatever its file's own resolution is.

A format's reader gives levels of pixels (`protocol.Pyramid`); `Slide` resamples them so that
one base pixel is `base_mpp` micrometres: a 40x slide gives true 20x tiles. A region is a pure
function of its coordinates, so tiles fit together without a seam. Which reader opens a file
follows from its content: vendors' slides OpenSlide, GeoTIFF rasterio, other TIFF tifffile, the
rest Pillow.
"""

from __future__ import annotations

import logging
import math
import os
import stat
from contextlib import ExitStack
from types import TracebackType

import numpy as np
from PIL import Image

from raylarge.geometry import spans
from raylarge.slides import icc as colours
from raylarge.slides import mpp as scales
from raylarge.slides import openslide_reader, tiff_reader
from raylarge.slides.aperio_reader import AperioPyramid
from raylarge.slides.fetch import fetch_slide
from raylarge.slides.image_reader import ImagePyramid
from raylarge.slides.mpp import BASE_MPP
from raylarge.slides.openslide_reader import OpenSlidePyramid
from raylarge.slides.protocol import (
    AS_STORED,
    SLIDE_PX,
    Georeference,
    Pixels,
    Pyramid,
    ReadOptions,
    UnreadableSlide,
    check_size,
    parser_errors,
    user_errors,
)
from raylarge.slides.tiff_reader import TiffPyramid
from raylarge.slides.view import View

__all__ = ["BASE_MPP", "Pixels", "Pyramid", "Slide", "open_slide"]

_STRIP_BYTES = 32 << 20
_WHOLE = View()
_VERBOSE = ("tifffile", "rasterio", "pydicom", "wsidicom", "PIL")


class Slide:
    """A pyramid at the base scale; a context manager."""

    def __init__(
        self,
        path: str,
        pyramid: Pyramid,
        mpp: float,
        base_mpp: float,
        opened: ExitStack | None = None,
        view: View = _WHOLE,
    ) -> None:
        """See `open_slide`; closing the slide closes `opened`, or else the pyramid."""
        self.path = path
        self.mpp = mpp
        self.notes = list(pyramid.notes)
        """Choices of the reader that a user may want to change; they contain no file names."""
        self._pyramid = pyramid
        self._close = pyramid.close if opened is None else opened.close
        self.zoom = scales.zoom(mpp, base_mpp)
        """Level-0 pixels per base pixel."""
        self.size_l0: tuple[int, int] = pyramid.sizes[0]
        self.whole_px = (int(self.size_l0[0] / self.zoom), int(self.size_l0[1] / self.zoom))
        """(rows, columns) of the file in whole base pixels."""
        self.view = view
        self.size_px = view.size(self.whole_px)
        """(rows, columns) of the view in base pixels; all other coordinates are the view's too."""

    @property
    def georeference(self) -> Georeference | None:
        """Return where level 0 lies on the ground; None for microscopy and for a view."""
        return self._pyramid.georeference if self.view.is_identity else None

    def __enter__(self) -> Slide:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and release it in the node's cache."""
        self._close()

    def read(
        self, top_px: int, left_px: int, rows_px: int, columns_px: int, downscale: int = 1
    ) -> Pixels:
        """Return a region given in base pixels, [rows_px / downscale, columns_px / downscale, 3].

        Outside the slide (not only outside the view) it is white. Resampling is antialiased
        bicubic, from the nearest finer level.

        Raises:
            SlideError: the file is damaged there.
            UserError: its disk or store fails.
        """
        box = self.view.source((top_px, left_px, rows_px, columns_px), self.whole_px)
        return self.view.turned(self._read(box, downscale))

    def _read(self, box_px: tuple[int, int, int, int], downscale: int) -> Pixels:
        """Return a region of the file, (top, left, rows, columns) in base pixels."""
        top_px, left_px, rows_px, columns_px = box_px
        rows, columns = rows_px // downscale, columns_px // downscale
        top, bottom = _inside(top_px, rows, downscale, self.whole_px[0])
        left, right = _inside(left_px, columns, downscale, self.whole_px[1])
        origin_px = (top_px + top * downscale, left_px + left * downscale)
        shape = (bottom - top, right - left)
        if min(shape) <= 0:
            return np.full((rows, columns, 3), 255, np.uint8)
        with user_errors(self.path):
            region = self._resampled(origin_px, shape, downscale)
        if shape == (rows, columns):
            return region
        page = np.full((rows, columns, 3), 255, np.uint8)
        page[top:bottom, left:right] = region
        return page

    def _resampled(
        self, origin_px: tuple[int, int], shape: tuple[int, int], downscale: int
    ) -> Pixels:
        level, step = self._level(downscale)
        starts = [origin * step / downscale for origin in origin_px]
        if step == 1.0:
            return self._stored(level, int(starts[0]), int(starts[1]), shape)
        margin = math.ceil(2 * step) + 1
        box = []
        for start, count, size in zip(starts, shape, self._pyramid.sizes[level], strict=True):
            low = max(0, math.floor(start) - margin)
            high = min(size, math.ceil(start + count * step) + margin)
            if start >= size:
                raise self._inconsistent()
            first = max(0.0, start - low)  # half an output pixel may hang over the upper edge
            box.append((low, high - low, first, min(start - low + count * step, high - low)))
        (top, rows, y0, y1), (left, columns, x0, x1) = box
        source = Image.fromarray(self._pyramid.read_level(level, top, left, rows, columns))
        resized = source.resize(shape[::-1], Image.Resampling.BICUBIC, box=(x0, y0, x1, y1))
        return np.asarray(resized)

    def _stored(self, level: int, top: int, left: int, shape: tuple[int, int]) -> Pixels:
        """Return a region in a level's own pixels; repeat its last row or column if one is missing.

        A level ends at its last whole pixel, a thumbnail at its last half pixel.
        """
        size = self._pyramid.sizes[level]
        inside = (min(shape[0], size[0] - top), min(shape[1], size[1] - left))
        lacks = (shape[0] - inside[0], shape[1] - inside[1])
        if max(lacks) > 1 or min(inside) < 1:
            raise self._inconsistent()
        region = self._pyramid.read_level(level, top, left, *inside)
        if not any(lacks):
            return region
        return np.pad(region, [(0, lacks[0]), (0, lacks[1]), (0, 0)], mode="edge")

    def _inconsistent(self) -> UnreadableSlide:
        return UnreadableSlide(
            f"the file is damaged: its levels have sizes {list(self._pyramid.sizes)}, which do "
            "not show one image; fetch it again or leave it out."
        )

    def _level(self, downscale: int) -> tuple[int, float]:
        """Return the coarsest level that is fine enough, and its pixels per output pixel."""
        target = self.zoom * downscale
        factors = [_factor(self._pyramid.sizes[0], size) for size in self._pyramid.sizes]
        level = max(i for i, factor in enumerate(factors) if factor <= target * 1.000001)
        step = target / factors[level]
        return level, 1.0 if math.isclose(step, 1.0, rel_tol=1e-6) else step

    def thumbnail(self, downscale: int) -> Pixels:
        """Return the whole slide at 1 / downscale of the base scale, read in strips."""
        rows, columns = (-(-side // downscale) for side in self.whole_px)
        step = self._level(downscale)[1]
        per_strip = max(1, int(_STRIP_BYTES / (3 * columns * step**2)))
        whole = np.concatenate(
            [
                self._read(
                    (start * downscale, 0, (stop - start) * downscale, columns * downscale),
                    downscale,
                )
                for start, stop in spans(rows, per_strip)
            ]
        )
        return self.view.of_whole(whole, downscale, self.whole_px)


def open_slide(
    path: str,
    mpp_override: float | None = None,
    base_mpp: float = BASE_MPP,
    icc: bool = True,
    options: ReadOptions = AS_STORED,
    view: View = _WHOLE,
) -> Slide:
    """Open a slide by its content.

    Args:
        path: a local path, or a URL (fetched once per node and version into a cache).
        mpp_override: micrometres per level-0 pixel, before anything the file says.
        base_mpp: micrometres per pixel of the base scale (1e6 for aerial images); within 10 %
            no resampling is done.
        icc: whether pixels are converted to sRGB by the colour profile in the file.
        options: which scene and bands are read, and the range of deep samples.
        view: how the slide is shifted, turned and mirrored.

    Raises:
        SlideError: no such file, one that may not be read, a broken one, one that cannot be
            right, no mpp to be found, or one coarser than the base.
        UserError: no fault of the slide: its store or disk fails, a package is missing, or the
            cache has no room for it.
    """
    for library in _VERBOSE:  # their log lines contain file names
        logging.getLogger(library).setLevel(logging.CRITICAL)
    with user_errors(path), ExitStack() as opened:
        lease = fetch_slide(path)
        opened.callback(lease.close)
        pyramid = _pyramid(lease.path, options)
        opened.callback(pyramid.close)
        check_size(pyramid.sizes[0], SLIDE_PX)
        mpp = scales.resolve_mpp(pyramid, mpp_override)
        scales.check_base_mpp(pyramid, mpp, base_mpp)
        pyramid = colours.to_srgb(pyramid) if icc else pyramid
        return Slide(path, pyramid, mpp, base_mpp, opened.pop_all(), view)


def _pyramid(local: str, options: ReadOptions) -> Pyramid:
    """Return the reader that fits the content of a local file or folder."""
    if os.path.isdir(local):
        from raylarge.slides.dicom_reader import open_folder

        return open_folder(local, options.scene)
    _refuse_special(local)
    with parser_errors(), open(local, "rb") as stream:
        head = stream.read(4)
    if not head:
        raise UnreadableSlide("the file is empty; fetch it again or leave it out.")
    vendor = openslide_reader.vendor(local)
    if vendor == "dicom":
        from raylarge.slides.dicom_reader import open_instance

        return open_instance(local, options.scene)
    if vendor == "aperio":
        return AperioPyramid(local, options.scene)
    if vendor not in (None, "generic-tiff"):
        return OpenSlidePyramid(local, options.scene)
    if head not in tiff_reader.MAGIC:
        return ImagePyramid(local, options)
    if tiff_reader.is_georeferenced(local):
        from raylarge.slides.geo_reader import GeoPyramid

        return GeoPyramid(local, options)
    return TiffPyramid(local, options)


def _refuse_special(local: str) -> None:
    """Raise `UnreadableSlide` for pipes, sockets and devices, which would block the reader."""
    with parser_errors():
        mode = os.stat(local).st_mode
    if not stat.S_ISREG(mode):
        raise UnreadableSlide("the path names a pipe, socket or device; leave it out.")


def _inside(start_px: int, count: int, downscale: int, size_px: int) -> tuple[int, int]:
    """Return which of `count` output pixels from `start_px` have their centre inside the slide."""
    first = max(0, math.ceil((-start_px) / downscale - 0.5))
    last = min(count, math.ceil((size_px - start_px) / downscale - 0.5))
    return first, last


def _factor(finest: tuple[int, int], size: tuple[int, int]) -> float:
    """Return how much coarser a level is; an integer if cut-off borders explain the difference."""
    ratio = (finest[0] / size[0] + finest[1] / size[1]) / 2
    whole = max(1, round(ratio))
    fits = all(abs(a / whole - b) < 1 for a, b in zip(finest, size, strict=True))
    return float(whole) if fits else ratio
