"""Tissue masks that come from files: GeoJSON contours (QuPath, TRIDENT) or mask images.

Contours are polygons in level-0 pixels, (x, y); a mask image shows the whole slide at any
resolution, and every pixel that is not black is tissue. Where it is finer than what is wanted,
a cell is tissue if at least half of it is. Tissue by colour is in `tissue.py`.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Bool
from PIL import Image, ImageDraw, UnidentifiedImageError

from raylarge import storage
from raylarge.errors import UserError
from raylarge.slides.protocol import DAMAGE, Refusal, damage, speaking_of

Rings = list[np.ndarray]
Mask = Bool[np.ndarray, "rows columns"]
_HALF = 0.5 - 1e-4
"""Weights of 32 bits round."""
_NUMBERS = ("1", "L", "I", "F", "I;16", "I;16B", "I;16L")


def read(path: str, size_l0: tuple[int, int], shape: tuple[int, int]) -> Mask:
    """A slide's mask from a file.

    Args:
        path: ends with .geojson or .json, or else names an image.
        size_l0: (rows, columns) of the slide at level 0.
        shape: (rows, columns) of the mask that is wanted.

    Raises:
        SlideError: no such file, or it is not what its ending says: its slide has no mask.
    """
    with speaking_of(path, "mask"):
        content = _content(path)
        if path.lower().endswith((".geojson", ".json")):
            return _drawn(_contours(content), size_l0, shape)
        return _shrunk(_not_black(content), shape)


def _content(path: str) -> bytes:
    try:
        return storage.read_bytes(path)
    except UserError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise Refusal("does not exist; check the path.") from error
        if isinstance(error.__cause__, PermissionError):
            raise Refusal("may not be read; check its permissions.") from error
        raise


def _not_black(content: bytes) -> Mask:
    """Which pixels of an image show something; labels above 255 and faint colours count too."""
    with damage(*DAMAGE, Image.DecompressionBombError):
        try:
            picture = Image.open(io.BytesIO(content))
        except UnidentifiedImageError as error:
            raise Refusal("is no image that can be read, and no .geojson by its name.") from error
        if picture.mode in _NUMBERS:
            return np.asarray(picture) > 0
        pixels = np.asarray(picture.convert("RGBA"))
    lit: Mask = (pixels[..., :3] > 0).any(axis=-1) & (pixels[..., 3] > 0)
    return lit


def _shrunk(mask: Bool[np.ndarray, "_ _"], shape: tuple[int, int]) -> Mask:
    shares = Image.fromarray(mask.astype(np.float32)).resize(shape[::-1], Image.Resampling.BOX)
    return np.asarray(shares) >= _HALF


def _contours(content: bytes) -> list[Rings]:
    """The polygons of a GeoJSON; each is its outer ring and its holes, [n, (x, y)]."""
    try:
        return [[_ring(ring) for ring in polygon] for polygon in _polygons(json.loads(content))]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Refusal(f"is no GeoJSON of polygons in level-0 pixels ({error}).") from error


def _ring(places: list[Any]) -> np.ndarray:
    ring = np.array([place[:2] for place in places], float)
    if ring.ndim != 2 or ring.shape[1] != 2 or len(ring) < 3 or not np.isfinite(ring).all():
        raise ValueError(f"a ring of {len(ring)} places that bound no area")
    return ring


def _drawn(polygons: list[Rings], size_l0: tuple[int, int], shape: tuple[int, int]) -> Mask:
    """All polygons; one may lie in a hole of another, so each is drawn alone, in its own box."""
    page = np.zeros(shape, bool)
    factors = np.array([shape[1] / size_l0[1], shape[0] / size_l0[0]])
    for outer, *holes in ([ring * factors for ring in rings] for rings in polygons if rings):
        left, top = (max(0, math.floor(low)) for low in outer.min(axis=0))
        ends = zip(outer.max(axis=0), page.shape[::-1], strict=True)
        right, bottom = (min(side, math.ceil(high) + 1) for high, side in ends)
        if right <= left or bottom <= top:
            continue
        box = Image.new("1", (right - left, bottom - top))
        pen = ImageDraw.Draw(box)
        for ring, ink in [(outer, 1), *((hole, 0) for hole in holes)]:
            pen.polygon((ring - (left, top)).ravel().tolist(), fill=ink)
        page[top:bottom, left:right] |= np.asarray(box)
    return page


def _polygons(node: Any) -> Iterator[list[Any]]:
    """The rings of every polygon: the outer one, then its holes; none of what has no place."""
    if isinstance(node, list):
        for one in node:
            yield from _polygons(one)
    elif node is None:
        return
    elif node["type"] == "FeatureCollection":
        yield from _polygons(node["features"])
    elif node["type"] == "Feature":
        yield from _polygons(node["geometry"])
    elif node["type"] == "GeometryCollection":
        yield from _polygons(node["geometries"])
    elif node["type"] == "Polygon":
        yield node["coordinates"]
    elif node["type"] == "MultiPolygon":
        yield from node["coordinates"]
    else:
        raise ValueError(f"a {node['type']} has no area")
