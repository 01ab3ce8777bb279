"""Read GeoTIFF and COG by rasterio (extra `geo`): overviews are levels, regions are windows.

`geo_bands.py` chooses the bands of the colours. The size of a pixel is measured on the ground at
the image's centre, since units of a Mercator map or degrees are no metres there. An image that is
not north-up with square pixels on a map in metres is warped while it is read, in fixed blocks, so
that a pixel does not depend on the region that is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from raylarge.errors import MissingResource
from raylarge.slides import scenes
from raylarge.slides.geo_bands import GeoBands
from raylarge.slides.protocol import (
    AS_STORED,
    Georeference,
    Hint,
    Pixels,
    ReadOptions,
    UnreadableSlide,
    parser_errors,
)

if TYPE_CHECKING:
    from affine import Affine

Numbers = Sequence[float] | np.ndarray

_EQUATOR_M, _FLATTENING = 6_378_137.0, 1 / 298.257223563
"""WGS 84."""
_TRUE_LENGTHS = 0.01
"""A map whose lengths are this near those on the ground counts as true: UTM, state planes."""
_SQUARE = 0.03
_STEP_PX = 64
_UTM_LATITUDES = 84.0
_WARP_PX = 0.01
"""How far a warped pixel may miss its place."""


class GeoPyramid:
    """The full image and its overviews."""

    icc_profile = None

    def __init__(self, path: str, options: ReadOptions = AS_STORED) -> None:
        """Open a GeoTIFF.

        Raises:
            UnreadableSlide: the bands are neither RGB nor grey, samples have no conversion to
                8 bits, or the georeference is invalid.
            MissingResource: rasterio is missing.
        """
        self.georeference: Georeference | None = None
        self.mpp_hints: list[Hint] = []
        with ExitStack() as opened, _gdal():
            path, notes = _scene(path, options.scene)
            base = opened.enter_context(_dataset(path))
            self._bands = GeoBands(base, options)
            self.notes = [*notes, *self._bands.notes]
            self._warped = False
            numbers = range(len(base.overviews(1)))
            levels = [base, *(opened.enter_context(_dataset(path, n)) for n in numbers)]
            if base.crs is not None:
                levels = self._placed(path, levels, opened)
            self._levels = levels
            self.sizes = [(level.height, level.width) for level in levels]
            self.close = opened.pop_all().close

    def _placed(self, path: str, levels: list[Any], opened: ExitStack) -> list[Any]:
        """Set georeference and resolution; warp levels without square pixels on the ground."""
        base = levels[0]
        size_m = _pixel_m(base.crs, base.transform, (base.height / 2, base.width / 2))
        if not _is_plain(base, size_m):
            plain = levels
            if self._bands.infrared:  # GDAL would weigh colours by it
                plain = [
                    opened.enter_context(_dataset(self._bands.opaque(base, path), i - 1))
                    for i in range(len(levels))
                ]
            warped = _warped(plain, min(size_m), self._bands.nearest)
            levels = [opened.enter_context(level) for level in warped]
            self._warped = True
            size_m = (min(size_m),) * 2
        crs, transform = levels[0].crs, list(levels[0].transform)[:6]
        self.georeference = {"crs": crs.to_string(), "transform": transform}
        nominal_m = abs(transform[0]) * _metres_per_unit(crs)
        if abs(size_m[0] / nominal_m - 1) <= _TRUE_LENGTHS:
            size_m = (nominal_m, abs(transform[4]) * _metres_per_unit(crs))
        self.mpp_hints = [Hint("pixel size on the ground", *(1e6 * side for side in size_m))]
        return levels

    def read_level(self, level: int, top: int, left: int, rows: int, columns: int) -> Pixels:
        """Return a region inside a level; white where the file has no data."""
        with _gdal() as rasterio:
            window = rasterio.windows.Window(left, top, columns, rows)
            return self._bands.read(self._levels[level], window, self._warped)


def _scene(path: str, scene: str) -> tuple[str, list[str]]:
    """Return GDAL's name of the image to read, and a note if the file holds several."""
    import rasterio

    with rasterio.open(path) as dataset:
        names = list(dataset.subdatasets)
    if not names:
        scenes.require_single_scene(scene)
        return path, []
    sizes = []
    for name in names:
        with rasterio.open(name) as dataset:
            sizes.append((dataset.height, dataset.width))
    number, notes = scenes.choose([], sizes, scene)
    return names[number], notes


@contextmanager
def _gdal() -> Iterator[Any]:
    """Yield the rasterio package; treat GDAL's errors in the block as damage of the file."""
    try:
        import rasterio.warp
        import rasterio.windows
    except ImportError as error:
        raise MissingResource(
            "the file is georeferenced, which needs rasterio; install it with pip install "
            "'raylarge[geo]'."
        ) from error
    from rasterio._err import CPLE_BaseError

    with parser_errors(rasterio.errors.RasterioError, rasterio.errors.CRSError, CPLE_BaseError):
        yield rasterio


def _dataset(path: str, overview: int = -1) -> Any:
    """Open the dataset of one overview, or of the full image at -1."""
    import rasterio

    return rasterio.open(path) if overview < 0 else rasterio.open(path, overview_level=overview)


def _is_plain(dataset: Any, size_m: tuple[float, float]) -> bool:
    """Return whether an image is north-up, on a map in metres (or feet), with square pixels."""
    a, b, _, d, e, _ = list(dataset.transform)[:6]
    north_up = b == d == 0 and a > 0 > e
    square = abs(size_m[0] / size_m[1] - 1) <= _SQUARE
    return north_up and square and bool(dataset.crs.is_projected)


def _metres_per_unit(crs: Any) -> float:
    return float(crs.linear_units_factor[1]) if crs.is_projected else math.nan


def _degrees(crs: Any, x: Numbers, y: Numbers) -> tuple[np.ndarray, np.ndarray]:
    """Return longitudes and latitudes of places on a map."""
    from rasterio.warp import transform

    longitude, latitude = transform(crs, "EPSG:4326", x, y)
    return np.array(longitude), np.array(latitude)


def _on_map(affine: Affine, columns: Numbers, rows: Numbers) -> tuple[np.ndarray, np.ndarray]:
    """Return where places of an image lie on its map: x, y."""
    a, b, c, d, e, f = list(affine)[:6]
    u, v = np.asarray(columns, float), np.asarray(rows, float)
    return a * u + b * v + c, d * u + e * v + f


def _pixel_m(crs: Any, affine: Affine, place_px: tuple[float, float]) -> tuple[float, float]:
    """Return height and width in metres, on the ground, of the pixel at (row, column)."""
    row, column = place_px
    x, y = _on_map(affine, (column, column, column + _STEP_PX), (row, row + _STEP_PX, row))
    longitude, latitude = _degrees(crs, x, y)
    if not np.isfinite([longitude, latitude]).all():
        raise _nowhere()
    phi, e2 = math.radians(latitude[0]), _FLATTENING * (2 - _FLATTENING)
    bend = 1 - e2 * math.sin(phi) ** 2
    north_m = np.radians(latitude[1:] - latitude[0]) * _EQUATOR_M * (1 - e2) / bend**1.5
    turned = (longitude[1:] - longitude[0] + 180) % 360 - 180
    east_m = np.radians(turned) * _EQUATOR_M / math.sqrt(bend) * math.cos(phi)
    down, across = np.hypot(north_m, east_m) / _STEP_PX
    if not (0 < down < math.inf and 0 < across < math.inf):
        raise _nowhere()
    return float(down), float(across)


def _nowhere() -> UnreadableSlide:
    return UnreadableSlide(
        "the georeference of the file leads to no place on the ground; mend it (`gdal_edit.py`) or "
        "leave it out."
    )


def _warped(levels: list[Any], side_m: float, nearest: bool) -> list[Any]:
    """Return the levels warped to a north-up map in metres, with square pixels of `side_m`."""
    from affine import Affine
    from rasterio.enums import Resampling
    from rasterio.vrt import WarpedVRT
    from rasterio.warp import transform

    base = levels[0]
    middle = _on_map(base.transform, [base.width / 2], [base.height / 2])
    target = base.crs if base.crs.is_projected else _utm(*_degrees(base.crs, *middle))
    edge, zero = np.linspace(0, 1, 22), np.zeros(22)
    u, v = (
        np.concatenate([edge, edge, zero, zero + 1]),
        np.concatenate([zero, zero + 1, edge, edge]),
    )
    border = _on_map(base.transform, u * base.width, v * base.height)
    x, y = np.array(transform(base.crs, target, *border))
    if not np.isfinite([x, y]).all() or np.ptp(x) <= 0 or np.ptp(y) <= 0:
        raise _nowhere()
    unit_m = _pixel_m(target, Affine(1, 0, x.mean(), 0, -1, y.mean()), (0.0, 0.0))
    side = side_m / unit_m[0]
    rows, columns = (math.ceil((one.max() - one.min()) / side) for one in (y, x))
    warped = []
    for level in levels:
        factor = base.width / level.width
        warped.append(
            WarpedVRT(
                level,
                crs=target,
                transform=Affine(side * factor, 0, x.min(), 0, -side * factor, y.max()),
                height=math.ceil(rows / factor),
                width=math.ceil(columns / factor),
                resampling=Resampling.nearest if nearest else Resampling.cubic,
                tolerance=_WARP_PX,
                XSCALE=1.0,  # never shrunk; GDAL guesses from blocks, wrongly at the border
                YSCALE=1.0,
                add_alpha="alpha" not in {one.name for one in level.colorinterp},
            )
        )
    return warped


def _utm(longitude: np.ndarray, latitude: np.ndarray) -> Any:
    """Return the UTM zone of a place."""
    from rasterio.crs import CRS

    if abs(latitude[0]) > _UTM_LATITUDES:
        raise UnreadableSlide(
            f"the image lies at latitude {latitude[0]:.4g}, where no UTM zone is; reproject it to "
            "a polar map in metres (`gdalwarp -t_srs`)."
        )
    zone = int((longitude[0] + 180) // 6) % 60 + 1
    return CRS.from_epsg((32_600 if latitude[0] >= 0 else 32_700) + zone)
