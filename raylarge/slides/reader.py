"""A slide seen at the base scale, whatever its file's own resolution is.

A format's reader gives levels of pixels (`Pyramid`); `Slide` resamples them so that one
base pixel is `base_mpp` micrometres: a 40x slide gives true 20x tiles. A region is a pure
function of its coordinates, so tiles fit together without a seam. Label and macro images are
never read. The chain of sources for mpp follows Mussel (github.com/pathology-data-mining).
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, runtime_checkable

import fsspec
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from raylarge import storage
from raylarge.errors import UserError
from raylarge.geometry import spans

Pixels = UInt8[np.ndarray, "_ _ 3"]
BASE_MPP = 0.5
_TOLERANCE = 0.1
_PLAUSIBLE_MPP = (0.05, 20.0)
_STRIP_PX = 256


@runtime_checkable
class Pyramid(Protocol):
    """What the reader of one file format gives: levels of pixels, finest first."""

    @property
    def sizes(self) -> Sequence[tuple[int, int]]:
        """(rows, columns) of each level."""
        ...

    @property
    def mpp_hints(self) -> Sequence[tuple[str, float]]:
        """Micrometres per level-0 pixel as the file tells it, most trusted first."""
        ...

    def read_level(self, level: int, top: int, left: int, rows: int, columns: int) -> Pixels:
        """A region that lies inside a level, in that level's pixels."""
        ...

    def close(self) -> None:
        """Let go of the file."""
        ...


class Slide:
    """A pyramid at the base scale; a context manager."""

    def __init__(self, path: str, pyramid: Pyramid, mpp: float, base_mpp: float) -> None:
        """See `open_slide`."""
        self.path = path
        self.mpp = mpp
        self._pyramid = pyramid
        near_base = abs(mpp / base_mpp - 1) <= _TOLERANCE
        self.zoom = 1.0 if near_base else base_mpp / mpp
        """Level-0 pixels per base pixel."""
        self.size_l0: tuple[int, int] = pyramid.sizes[0]
        self.size_px = (int(self.size_l0[0] / self.zoom), int(self.size_l0[1] / self.zoom))
        """(rows, columns) in whole base pixels."""

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
        """Let go of the file."""
        self._pyramid.close()

    def read(
        self, top_px: int, left_px: int, rows_px: int, columns_px: int, downscale: int = 1
    ) -> Pixels:
        """A region given in base pixels, [rows_px / downscale, columns_px / downscale, 3].

        Outside the slide it is white. Resampling is antialiased bicubic, from the nearest
        finer level.

        Raises:
            UserError: the file is damaged there.
        """
        rows, columns = rows_px // downscale, columns_px // downscale
        page = np.full((rows, columns, 3), 255, np.uint8)
        top, bottom = _inside(top_px, rows, downscale, self.size_px[0])
        left, right = _inside(left_px, columns, downscale, self.size_px[1])
        if top < bottom and left < right:
            page[top:bottom, left:right] = self._resampled(
                (top_px + top * downscale, left_px + left * downscale),
                (bottom - top, right - left),
                downscale,
            )
        return page

    def _resampled(
        self, origin_px: tuple[int, int], shape: tuple[int, int], downscale: int
    ) -> Pixels:
        level, step = self._level(downscale)
        starts = [origin * step / downscale for origin in origin_px]
        if step == 1.0:
            return self._pyramid.read_level(level, int(starts[0]), int(starts[1]), *shape)
        margin = math.ceil(2 * step) + 1
        box = []
        for start, count, size in zip(starts, shape, self._pyramid.sizes[level], strict=True):
            low = max(0, math.floor(start) - margin)
            high = min(size, math.ceil(start + count * step) + margin)
            box.append((low, high - low, start - low, min(start - low + count * step, high - low)))
        (top, rows, y0, y1), (left, columns, x0, x1) = box
        source = Image.fromarray(self._pyramid.read_level(level, top, left, rows, columns))
        resized = source.resize(shape[::-1], Image.Resampling.BICUBIC, box=(x0, y0, x1, y1))
        return np.asarray(resized)

    def _level(self, downscale: int) -> tuple[int, float]:
        """The coarsest level that is not coarser than asked, and its pixels per output pixel."""
        wanted = self.zoom * downscale
        factors = [_factor(self._pyramid.sizes[0], size) for size in self._pyramid.sizes]
        level = max(i for i, factor in enumerate(factors) if factor <= wanted * 1.000001)
        step = wanted / factors[level]
        return level, 1.0 if math.isclose(step, 1.0, rel_tol=1e-6) else step

    def thumbnail(self, downscale: int) -> Pixels:
        """The whole slide, one pixel per downscale x downscale base pixels, read in strips."""
        rows, columns = (-(-side // downscale) for side in self.size_px)
        per_strip = max(1, _STRIP_PX // downscale)
        return np.concatenate(
            [
                self.read(
                    start * downscale, 0, (stop - start) * downscale, columns * downscale, downscale
                )
                for start, stop in spans(rows, per_strip)
            ]
        )


def open_slide(path: str, mpp_override: float | None = None, base_mpp: float = BASE_MPP) -> Slide:
    """Open a slide by its content: OpenSlide where it knows the file, else as a plain image.

    Args:
        path: a local path, or a URL (fetched once per machine into a cache).
        mpp_override: micrometres per level-0 pixel, before anything the file says.
        base_mpp: micrometres per pixel of the base scale; within 10 % no resampling is done.

    Raises:
        UserError: no such file, a broken one, no mpp to be found, or one coarser than the base.
    """
    from raylarge.slides.image_reader import ImagePyramid
    from raylarge.slides.openslide_reader import OpenSlidePyramid

    local = local_copy(path)
    if not os.path.isfile(local):
        raise UserError(f"slide {path} does not exist; check the path.")
    known = OpenSlidePyramid.knows(local)
    pyramid: Pyramid = OpenSlidePyramid(local) if known else ImagePyramid(local)
    try:
        mpp = resolve_mpp(path, mpp_override, pyramid.mpp_hints)
        if mpp > base_mpp * (1 + _TOLERANCE):
            raise UserError(
                f"slide {path} has {mpp:.3g} um/px, coarser than the base scale of {base_mpp:.3g}; "
                f"set tile.base_mpp={mpp:.3g}, a right tile.mpp=, or leave the slide out."
            )
    except UserError:
        pyramid.close()
        raise
    return Slide(path, pyramid, mpp, base_mpp)


def resolve_mpp(path: str, override: float | None, hints: Sequence[tuple[str, float]]) -> float:
    """Micrometres per level-0 pixel: the override, else the first plausible hint of the file.

    Raises:
        UserError: an override that is not positive, or nothing plausible.
    """
    if override is not None:
        if override <= 0:
            raise UserError(f"tile.mpp={override} for slide {path}: it must be above 0.")
        return override
    low, high = _PLAUSIBLE_MPP
    for _, mpp in hints:
        if low <= mpp <= high:
            return mpp
    seen = ", ".join(f"{name} {mpp:.4g}" for name, mpp in hints)
    told = f"only says {seen} um/px, which no slide has" if hints else "does not say its resolution"
    raise UserError(f"slide {path} {told}; set tile.mpp= (micrometres per level-0 pixel).")


def local_copy(path: str) -> str:
    """The local path of a slide; an object of a store is fetched once per machine and version.

    Raises:
        UserError: nothing stands at the URL.
    """
    if storage.is_local(path):
        return path.removeprefix("file://")
    fs, root = fsspec.core.url_to_fs(path)
    try:
        version = fs.ukey(root)
    except FileNotFoundError as error:
        raise UserError(f"slide {path} does not exist; check the path.") from error
    folder = Path(tempfile.gettempdir()) / f"raylarge-slides-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    name = hashlib.sha256(f"{path} {version}".encode()).hexdigest()[:20]
    target = folder / f"{name}{Path(root).suffix}"
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            beside = target.with_name(f".{target.name}.part")
            fs.get_file(root, str(beside))
            os.replace(beside, target)
    return str(target)


def _inside(start_px: int, count: int, downscale: int, size_px: int) -> tuple[int, int]:
    """Which of `count` output pixels from `start_px` have their centre inside the slide."""
    first = max(0, math.ceil((-start_px) / downscale - 0.5))
    last = min(count, math.ceil((size_px - start_px) / downscale - 0.5))
    return first, last


def _factor(finest: tuple[int, int], size: tuple[int, int]) -> float:
    """How many times coarser a level is; whole where cut-off borders explain the difference."""
    ratio = (finest[0] / size[0] + finest[1] / size[1]) / 2
    whole = round(ratio)
    fits = all(abs(a / whole - b) < 1 for a, b in zip(finest, size, strict=True))
    return float(whole) if fits else ratio
