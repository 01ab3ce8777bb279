"""Draw seeded pictures that look like H&E slides, for demos and tests without data.

Tissue with an irregular outline holds stroma (pink, wavy fibres, spindle nuclei), glands (a ring
of purple nuclei around a pale lumen), fat (white cells with thin walls) and clusters of
lymphocytes. Everything lives in micrometres and is a pure function of (seed, place), so
regions fit together and the same scene can be drawn at 20x and at 40x. Amounts of haematoxylin
and eosin become colour by Beer-Lambert (Ruifrok & Johnston 2001).
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raylarge import pyramid
from raylarge.slides.reader import Pixels
from raylarge.slides.texture import Points, fractal, noise, ramp, scatter, uniform

_GLASS = np.array([243.0, 241.0, 243.0], np.float32)
_HAEMATOXYLIN = np.array([0.78, 0.86, 0.42], np.float32)
_EOSIN = np.array([0.10, 0.62, 0.34], np.float32)
_PAD_UM = 12.0
_REACH_UM = 10.0
_BLOCK_PX = 1024


@dataclass
class _Maps:
    """What each pixel of a padded region is made of; [rows, columns] float32 each."""

    y: np.ndarray
    """[rows, 1] um."""
    x: np.ndarray
    """[1, columns] um."""
    tissue: np.ndarray
    fat: np.ndarray
    """1 inside fat cells, 0 on their walls and elsewhere."""
    adipose: np.ndarray
    """True in fat cells and their walls."""
    gland: np.ndarray
    """Distance from a gland's centre over its radius: below 1 inside."""
    lumen: np.ndarray
    """The same measure at the lumen's edge of the nearest gland."""


@dataclass(frozen=True)
class Scene:
    """One slide: a seed and its size in micrometres (rows, columns)."""

    seed: int
    size_um: tuple[float, float]

    def key(self, layer: int) -> int:
        """Return the key of one layer of the picture."""
        return (self.seed * 1_000_003 + layer * 1_009) % 2**63

    def region(
        self, top_px: int, left_px: int, rows_px: int, columns_px: int, mpp: float
    ) -> Pixels:
        """Return the pixels of a region, at `mpp` micrometres per pixel."""
        pad = round(_PAD_UM / mpp)
        y = ((np.arange(top_px - pad, top_px + rows_px + pad) + 0.5) * mpp)[:, None]
        x = ((np.arange(left_px - pad, left_px + columns_px + pad) + 0.5) * mpp)[None]
        maps = self._maps(y, x)
        nuclei = self._nuclei(maps, mpp)
        colour = _stained(self, maps, nuclei)
        return colour[pad : pad + rows_px, pad : pad + columns_px]

    def depth_um(self, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Return how deep inside the tissue's outline a place lies; negative outside."""
        half = min(self.size_um) / 2
        v, u = 2 * y / self.size_um[0] - 1, 2 * x / self.size_um[1] - 1
        radius = (np.abs(u) ** 2.6 + np.abs(v) ** 2.6) ** (1 / 2.6)
        wobble = 0.5 * (fractal(y, x, half, self.key(1)) - 0.5)
        fray = 16 * (fractal(y, x, 30.0, self.key(2)) - 0.5)
        depth: np.ndarray = half * (0.86 + wobble - radius) + fray
        return depth.astype(np.float32)

    def _maps(self, y: np.ndarray, x: np.ndarray) -> _Maps:
        tissue = ramp(self.depth_um(y, x), -0.8, 0.8)
        first, second, is_fat = self._worley(y, x)
        adipose = is_fat & (tissue > 0)
        fat = ramp(second - first, 1.6, 3.2) * ramp(first, 31.0, 29.0) * adipose
        gland, lumen = self._glands(y, x)
        return _Maps(y, x, tissue, fat.astype(np.float32), adipose, gland, lumen)

    def _fatty(self, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        return fractal(y, x, 260.0, self.key(3), octaves=2) > 0.64

    def _worley(self, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return distances to the nearest two lattice points, and whether the nearest is fat."""
        reach = 75.0
        first = np.full(np.broadcast_shapes(y.shape, x.shape), np.inf, np.float32)
        second, is_fat = first.copy(), np.zeros(first.shape, bool)
        points = scatter(*_ranges(y, x, reach), 46.0, 0.36, self.key(4))
        for py, px, fatty in zip(points.y, points.x, self._fatty(points.y, points.x), strict=True):
            window = _window(y, x, py, px, reach)
            distance = np.hypot(y[window[0]] - py, x[:, window[1]] - px).astype(np.float32)
            closer = distance < first[window]
            second[window] = np.where(closer, first[window], np.minimum(second[window], distance))
            first[window] = np.minimum(first[window], distance)
            is_fat[window] = np.where(closer, fatty, is_fat[window])
        return first, second, is_fat

    def _gland_points(self, y: np.ndarray, x: np.ndarray) -> Points:
        """Return centres of the glands that may touch a region."""
        points = scatter(*_ranges(y, x, 80.0), 112.0, 0.2, self.key(5))
        likely = fractal(points.y, points.x, 340.0, self.key(6), octaves=2)
        there = (points.draw(0) < ramp(likely, 0.34, 0.5)) & ~self._fatty(points.y, points.x)
        return points.where(there & (self.depth_um(points.y, points.x) > 45))

    def _glands(self, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        shape = np.broadcast_shapes(y.shape, x.shape)
        gland, lumen = np.full(shape, 9.0, np.float32), np.zeros(shape, np.float32)
        points = self._gland_points(y, x)
        sizes, mouths = _gland_radius_um(points), points.draw(8, 0.28, 0.58)
        for i in range(len(points.y)):
            window = _window(y, x, points.y[i], points.x[i], 80.0)
            dy, dx = y[window[0]] - points.y[i], x[:, window[1]] - points.x[i]
            measure = np.hypot(dy, dx) / (sizes[i] * _outline(points, i, np.arctan2(dy, dx)))
            closer = measure < gland[window]
            gland[window] = np.where(closer, measure, gland[window])
            lumen[window] = np.where(closer, mouths[i], lumen[window])
        return gland, lumen

    def _flow(self, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Return the coordinate across the fibres, in um: its contours are the fibres."""
        angle = np.pi * float(uniform(self.key(9), 0)[0])
        across = y * np.cos(angle) + x * np.sin(angle)
        swing = 150 * fractal(y, x, 240.0, self.key(10), octaves=2)
        curl = 15 * noise(y, x, (34.0, 34.0), self.key(12))
        flow: np.ndarray = across + swing + curl
        return flow

    def fibres(self, maps: _Maps) -> np.ndarray:
        """Return the strength of the collagen, [0, 1)."""
        angle = np.pi * float(uniform(self.key(9), 0)[0])
        along = maps.x * np.cos(angle) - maps.y * np.sin(angle)
        across = self._flow(maps.y, maps.x)
        bundles = noise(across, along, (9.0, 70.0), self.key(13))
        strands = noise(across, along, (2.6, 30.0), self.key(14))
        threads = noise(across, along, (1.3, 18.0), self.key(15))
        fibres: np.ndarray = 0.42 * bundles + 0.36 * strands + 0.22 * threads
        return fibres

    def _nuclei(self, maps: _Maps, mpp: float) -> np.ndarray:
        """Return haematoxylin of all nuclei, [rows, columns]."""
        ink = np.zeros(maps.tissue.shape, np.float32)
        for ellipses in (self._spindles(maps), self._lymphocytes(maps), self._epithelium(maps)):
            _stamp(ink, maps, ellipses, mpp)
        return ink

    def _spindles(self, maps: _Maps) -> np.ndarray:
        points = scatter(*_ranges(maps.y, maps.x, 0.0), 16.0, 0.45, self.key(20))
        points = points.where(points.draw(0) < 0.5)
        points = points.where(_stromal(maps, points))
        flow = self._flow(points.y, points.x)
        slope_y = self._flow(points.y + 1, points.x) - flow
        slope_x = self._flow(points.y, points.x + 1) - flow
        angle = np.arctan2(slope_x, -slope_y) + points.draw(4, -0.25, 0.25)
        long, wide = points.draw(2, 4.2, 7.8), points.draw(3, 1.3, 2.3)
        return _ellipses(points, long, wide, angle, points.draw(5, 0.75, 1.15))

    def _lymphocytes(self, maps: _Maps) -> np.ndarray:
        points = scatter(*_ranges(maps.y, maps.x, 0.0), 8.5, 0.32, self.key(30))
        crowd = ramp(fractal(points.y, points.x, 120.0, self.key(31)), 0.56, 0.74)
        points = points.where(points.draw(0) < 0.02 + 0.8 * crowd)
        points = points.where(_stromal(maps, points))
        radius = points.draw(2, 2.7, 3.5)
        wide = radius * points.draw(3, 0.8, 1.0)
        return _ellipses(
            points, radius, wide, points.draw(4, 0.0, np.pi), points.draw(5, 1.1, 1.45)
        )

    def _epithelium(self, maps: _Maps) -> np.ndarray:
        """Return nuclei in rings near each gland's edge, their long axes towards its centre."""
        glands = self._gland_points(maps.y, maps.x)
        sizes = _gland_radius_um(glands).tolist()
        rings = [_ring(glands, i, sizes[i], layer) for i in range(len(sizes)) for layer in (0, 1)]
        nuclei = np.concatenate([np.empty((0, 6)), *rings])
        return nuclei[_value(maps, maps.gland, nuclei[:, 0], nuclei[:, 1], 9.0) < 1.0]


def write(path: str, size_px: tuple[int, int], seed: int, mpp: float = 0.5) -> None:
    """Draw a slide of (rows, columns) pixels and write it as a pyramidal TIFF with its mpp.

    The same seed with twice the pixels at half the mpp is the same slide at twice the power.
    """
    scene = Scene(seed, (size_px[0] * mpp, size_px[1] * mpp))
    with tempfile.TemporaryDirectory(prefix="raylarge-") as scratch:
        page = np.lib.format.open_memmap(
            Path(scratch) / "slide.npy", mode="w+", dtype=np.uint8, shape=(*size_px, 3)
        )
        for top in range(0, size_px[0], _BLOCK_PX):
            for left in range(0, size_px[1], _BLOCK_PX):
                rows = min(_BLOCK_PX, size_px[0] - top)
                columns = min(_BLOCK_PX, size_px[1] - left)
                region = scene.region(top, left, rows, columns, mpp)
                page[top : top + rows, left : left + columns] = region
        text = {"Title": f"Procedural H&E-like slide, seed {seed}."}
        pyramid.write_image(path, page, mpp, text)


def _stained(scene: Scene, maps: _Maps, nuclei: np.ndarray) -> Pixels:
    """Return colours by Beer-Lambert from the amounts of the two stains."""
    fibres = scene.fibres(maps)
    fine = noise(maps.y, maps.x, (1.1, 1.1), scene.key(40))
    coarse = fractal(maps.y, maps.x, 90.0, scene.key(41))
    ragged = maps.gland + 0.16 * (noise(maps.y, maps.x, (7.0, 7.0), scene.key(42)) - 0.5)
    inside = ramp(ragged, 1.03, 0.97)
    cavity = ramp(ragged, maps.lumen + 0.04, maps.lumen - 0.04) * inside
    stroma = ramp(fibres, 0.26, 0.62) * (0.75 + 0.5 * coarse) + 0.08
    wall = np.where(maps.adipose, 0.55, stroma)
    cytoplasm = 0.42 + 0.3 * coarse + 0.25 * (fine - 0.5)
    eosin = wall * (1 - inside) + cytoplasm * inside
    empty = (1 - maps.fat * (1 - inside)) * (1 - 0.93 * cavity) * maps.tissue
    haze = (0.05 + 0.05 * coarse) * (1 - inside) + (0.20 + 0.1 * coarse) * inside
    chromatin = nuclei * (0.72 + 0.56 * fine)
    draws = uniform(scene.key(50), np.arange(2)).tolist()  # how strongly this slide took each stain
    amount = 0.9 + 0.25 * draws[0], 0.85 + 0.4 * draws[1]
    haematoxylin = amount[0] * (haze * empty + chromatin * maps.tissue)
    eosin = amount[1] * eosin * empty * (1 - 0.45 * np.clip(nuclei, 0, 1))
    density = haematoxylin[..., None] * _HAEMATOXYLIN + eosin[..., None] * _EOSIN
    grain = 2.0 * (fine[..., None] - 0.5)
    return np.clip(_GLASS * np.exp(-density) + grain, 0, 255).round().astype(np.uint8)


def _gland_radius_um(points: Points) -> np.ndarray:
    return points.draw(1, 34.0, 54.0)


def _ring(glands: Points, i: int, radius: float, layer: int) -> np.ndarray:
    """Return a gland's nuclei as in `_ellipses`: layer 0 at its edge, layer 1 inside, sparser."""
    place, density = ((0.86, 1.0), (0.72, 0.45))[layer]
    row, column = int(glands.row[i]), int(glands.column[i])
    count = int(2 * np.pi * radius * place / 7.4)
    number = np.arange(count)
    draws = [uniform(glands.key, row, column, number, 20 + 9 * layer + k) for k in range(7)]
    angle = 2 * np.pi * (number + 0.7 * (draws[0] - 0.5)) / count
    away = radius * _outline(glands, i, angle) * (place + 0.09 * (draws[1] - 0.5))
    long, wide = 4.0 + 1.6 * draws[2], 2.7 + 0.9 * draws[3]
    y, x = glands.y[i] + away * np.sin(angle), glands.x[i] + away * np.cos(angle)
    turn, ink = angle + 0.5 * (draws[4] - 0.5), 0.7 + 0.5 * draws[5]
    return np.stack([y, x, long, wide, turn, ink], axis=1)[draws[6] < density]


def _outline(points: Points, i: int, angle: np.ndarray) -> np.ndarray:
    """Return a gland's radius in a direction, over its mean radius."""
    row, column = int(points.row[i]), int(points.column[i])
    weights = uniform(points.key, row, column, np.arange(2, 8))
    waves = [
        (0.16, 2, weights[0], weights[3]),
        (0.09, 3, weights[1], weights[4]),
        (0.05, 5, weights[2], weights[5]),
    ]
    out = np.ones_like(angle)
    for strength, lobes, size, turn in waves:
        out = out + strength * size * np.cos(lobes * angle + 2 * np.pi * turn)
    return out


def _ranges(
    y: np.ndarray, x: np.ndarray, reach_um: float
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return a region's extent along both axes, widened."""
    return (
        (float(y[0, 0]) - reach_um, float(y[-1, 0]) + reach_um),
        (float(x[0, 0]) - reach_um, float(x[0, -1]) + reach_um),
    )


def _window(
    y: np.ndarray, x: np.ndarray, py: float, px: float, reach_um: float
) -> tuple[slice, slice]:
    """Return the pixels within reach of a point."""
    rows = np.searchsorted(y[:, 0], [py - reach_um, py + reach_um])
    columns = np.searchsorted(x[0], [px - reach_um, px + reach_um])
    return slice(*rows), slice(*columns)


def _value(
    maps: _Maps, field: np.ndarray, y: np.ndarray, x: np.ndarray, outside: float
) -> np.ndarray:
    """Return a map's value at the pixel of each point; `outside` beyond the map."""
    mpp = float(maps.y[1, 0] - maps.y[0, 0])
    rows = np.floor(y / mpp).astype(int) - int(np.floor(maps.y[0, 0] / mpp))
    columns = np.floor(x / mpp).astype(int) - int(np.floor(maps.x[0, 0] / mpp))
    inside = (rows >= 0) & (rows < field.shape[0]) & (columns >= 0) & (columns < field.shape[1])
    values = field[np.clip(rows, 0, field.shape[0] - 1), np.clip(columns, 0, field.shape[1] - 1)]
    return np.where(inside, values, outside)


def _stromal(maps: _Maps, points: Points) -> np.ndarray:
    """Return which points lie in tissue that is neither gland nor fat."""
    clear = (maps.tissue > 0.5) & ~maps.adipose & (maps.gland > 1.06)
    return _value(maps, clear, points.y, points.x, 0.0).astype(bool)


def _ellipses(
    points: Points, long: np.ndarray, wide: np.ndarray, angle: np.ndarray, ink: np.ndarray
) -> np.ndarray:
    """[n, 6]: y, x, half axes, direction of the long one, strength of the stain."""
    return np.stack([points.y, points.x, long, wide, angle, ink], axis=1)


def _stamp(ink: np.ndarray, maps: _Maps, ellipses: np.ndarray, mpp: float) -> None:
    """Draw ellipses with soft edges and darker rims into `ink`; the strongest wins."""
    half = int(np.ceil(_REACH_UM / mpp))
    steps = np.arange(-half, half + 1)
    for part in np.array_split(ellipses, max(1, len(ellipses) // 256)):
        cy, cx, long, wide, angle, strength = (part[:, i, None, None] for i in range(6))
        rows = np.floor(cy / mpp).astype(int) + steps[None, :, None]
        columns = np.floor(cx / mpp).astype(int) + steps[None, None]
        dy, dx = (rows + 0.5) * mpp - cy, (columns + 0.5) * mpp - cx
        s = (dx * np.cos(angle) + dy * np.sin(angle)) / long
        t = (dy * np.cos(angle) - dx * np.sin(angle)) / wide
        q = np.hypot(s, t)
        edge = 0.55 / wide
        drawn = strength * ramp(q, 1 + edge, 1 - edge) * (0.82 + 0.28 * ramp(q, 0.45, 0.95))
        rows = np.broadcast_to(rows - int(np.floor(maps.y[0, 0] / mpp)), q.shape)
        columns = np.broadcast_to(columns - int(np.floor(maps.x[0, 0] / mpp)), q.shape)
        seen = (drawn > 0) & (rows >= 0) & (rows < ink.shape[0])
        seen &= (columns >= 0) & (columns < ink.shape[1])
        np.maximum.at(ink, (rows[seen], columns[seen]), drawn[seen].astype(np.float32))
