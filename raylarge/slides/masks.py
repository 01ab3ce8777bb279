"""Tissue masks that come from files: GeoJSON contours (QuPath, TRIDENT) or mask images.

Contours are polygons in level-0 pixels, (x, y); a mask image shows the whole slide at any
resolution (`mask_images.py`), and every pixel that is not black is tissue. Where it is finer than
the grid, a cell is tissue if at least half of it is. Tissue by colour is in `tissue.py`.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Bool
from PIL import Image, ImageDraw

from raylarge import storage
from raylarge.errors import UserError
from raylarge.slides import mask_images
from raylarge.slides.protocol import UnreadableSlide, user_errors

Rings = list[np.ndarray]
Mask = Bool[np.ndarray, "rows columns"]
_WITHOUT_AREA = ("Point", "MultiPoint", "LineString", "MultiLineString")
_MOST_PX = 1e9
"""No slide has such a side; drawing counts in 32 bits."""
_SPECK_PX = 20
_DEGREES = (180, 90)


def read(
    path: str, size_l0: tuple[int, int], shape: tuple[int, int], notes: list[str] | None = None
) -> Mask:
    """Return a slide's mask from a file.

    Args:
        path: ends with .geojson or .json, or else names an image.
        size_l0: (rows, columns) of the slide at level 0.
        shape: (rows, columns) of the mask that is wanted.
        notes: takes what was left out of the mask, and that it is empty.

    Raises:
        SlideError: no such file, it is not what its ending says, or it does not fit the slide:
            its slide has no mask.
    """
    notes = [] if notes is None else notes
    with user_errors(path, "mask"):
        content = _content(path)
        if path.lower().endswith((".geojson", ".json")):
            mask = _drawn(_contours(content, notes), size_l0, shape, notes)
        else:
            mask = mask_images.shares(content, size_l0, shape)
    if not mask.any():
        notes.append("the mask shows no tissue at all")
    return mask


def _content(path: str) -> bytes:
    local = storage.absolute(path)
    if storage.is_local(path) and os.path.exists(local) and not os.path.isfile(local):
        raise UnreadableSlide("the path names a folder, pipe or device; name a mask's file.")
    try:
        return storage.read_bytes(path)
    except UserError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise UnreadableSlide("the file does not exist; check the path.") from error
        if isinstance(error.__cause__, PermissionError):
            raise UnreadableSlide("the file may not be read; check its permissions.") from error
        raise


def _contours(content: bytes, notes: list[str]) -> list[Rings]:
    """Return the polygons of a GeoJSON; each is its outer ring and its holes, [n, (x, y)]."""
    skipped: Counter[str] = Counter()
    try:
        geometries = _polygons(json.loads(content), skipped)
        polygons = [[_ring(ring, skipped) for ring in rings] for rings in geometries if rings]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = f"a member {error} is missing" if isinstance(error, KeyError) else str(error)
        raise UnreadableSlide(
            f"the file is no GeoJSON of polygons in level-0 pixels ({why})."
        ) from error
    open_rings = skipped.pop("open", 0)
    if open_rings:
        notes.append(f"{open_rings} rings of the mask are not closed: their ends were joined")
    if skipped:
        words = ", ".join(f"{count} {kind}" for kind, count in sorted(skipped.items()))
        if not polygons:
            raise UnreadableSlide(
                "the file is no GeoJSON of polygons in level-0 pixels (it holds shapes without "
                f"area alone: {words})."
            )
        notes.append(f"shapes of the mask without area were left out: {words}")
    return polygons


def _ring(places: Any, skipped: Counter[str]) -> np.ndarray:
    if not isinstance(places, list):
        raise ValueError(f"a ring that is no list: {str(places)[:40]}")
    for place in places:
        if not isinstance(place, list) or len(place) < 2:
            raise ValueError(f"a place that is no [x, y]: {str(place)[:40]}")
        for value in place[:2]:
            if type(value) not in (int, float) or not abs(value) <= _MOST_PX:
                raise ValueError(f"a coordinate that is no number of pixels: {str(value)[:40]}")
    ring = np.array([place[:2] for place in places], float).reshape(-1, 2)
    closed = len(ring) > 1 and bool((ring[0] == ring[-1]).all())
    if len(ring) - closed < 3:
        raise ValueError(f"a ring of {len(ring)} places that bound no area")
    skipped.update({"open": 1} if not closed else {})
    return ring


def _drawn(
    polygons: list[Rings], size_l0: tuple[int, int], shape: tuple[int, int], notes: list[str]
) -> Mask:
    """Draw all polygons, each in its own box, since one may lie in a hole of another."""
    _refuse_elsewhere(polygons, size_l0)
    page, outside = np.zeros(shape, bool), 0
    factors = np.array([shape[1] / size_l0[1], shape[0] / size_l0[0]])
    for outer, *holes in ([ring * factors for ring in rings] for rings in polygons):
        left, top = (max(0, math.floor(low)) for low in outer.min(axis=0))
        ends = zip(outer.max(axis=0), page.shape[::-1], strict=True)
        right, bottom = (min(side, math.ceil(high) + 1) for high, side in ends)
        if right <= left or bottom <= top:
            outside += 1
            continue
        box = Image.new("1", (right - left, bottom - top))
        pen = ImageDraw.Draw(box)
        for ring, ink in [(outer, 1), *((hole, 0) for hole in holes)]:
            pen.polygon((ring - (left, top)).ravel().tolist(), fill=ink)
        page[top:bottom, left:right] |= np.asarray(box)
    if outside:
        notes.append(f"{outside} of the mask's {len(polygons)} polygons lie off the slide")
    return page


def _refuse_elsewhere(polygons: list[Rings], size_l0: tuple[int, int]) -> None:
    """Refuse polygons that are not in this slide's level-0 pixels.

    Raises:
        UnreadableSlide: all lie off the slide, or in a speck of its corner, as degrees do.
    """
    if not polygons:
        return
    boxes = np.array([[rings[0].min(axis=0), rings[0].max(axis=0)] for rings in polygons])
    low, high = boxes[:, 0].min(axis=0), boxes[:, 1].max(axis=0)
    sides = np.array(size_l0[::-1])
    off = ((boxes[:, 0] >= sides) | (boxes[:, 1] < 0)).any(axis=1)
    whole = all((ring == np.round(ring)).all() for rings in polygons for ring in rings)
    degrees = (np.abs([low, high]) <= _DEGREES).all() and not whole
    speck = degrees and (high - low).max() <= _SPECK_PX and sides.max() > 50 * _SPECK_PX
    if not off.all() and not speck:
        return
    where = "off the slide" if off.all() else "in a speck of the slide"
    hint = "; they look like degrees of longitude and latitude" if degrees else ""
    raise UnreadableSlide(
        f"the mask has all of its {len(polygons)} polygons {where} (x {low[0]:.6g} to "
        f"{high[0]:.6g}, y {low[1]:.6g} to {high[1]:.6g}, and the slide is {size_l0[1]} x "
        f"{size_l0[0]}){hint}; export them in level-0 pixels of this slide."
    )


def _polygons(node: Any, skipped: Counter[str]) -> Iterator[list[Any]]:
    """Yield the rings of every polygon, its holes last; count shapes without area in `skipped`."""
    if isinstance(node, list):
        for one in node:
            yield from _polygons(one, skipped)
        return
    if node is None:
        return
    if not isinstance(node, dict):
        raise ValueError(f"{str(node)[:40]} is no object")
    kind = node["type"]
    if kind == "FeatureCollection":
        yield from _polygons(node["features"], skipped)
    elif kind == "Feature":
        yield from _polygons(node["geometry"], skipped)
    elif kind == "GeometryCollection":
        yield from _polygons(node["geometries"], skipped)
    elif kind == "Polygon":
        yield _listed(node["coordinates"])
    elif kind == "MultiPolygon":
        yield from map(_listed, _listed(node["coordinates"]))
    elif kind in _WITHOUT_AREA:
        skipped[kind] += 1
    else:
        raise ValueError(f"a {str(kind)[:40]} has no area")


def _listed(node: Any) -> list[Any]:
    if not isinstance(node, list):
        raise ValueError(f"coordinates that are no list: {str(node)[:40]}")
    return node
