"""Tissue masks that come from files: GeoJSON contours (QuPath, TRIDENT) or mask images.

Contours are polygons in level-0 pixels, (x, y); a mask image shows the whole slide at any
resolution, and every pixel that is not black is tissue. Tissue by colour is in `tissue.py`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Bool
from PIL import Image, ImageDraw

from raylarge import storage
from raylarge.errors import UserError

Mask = Bool[np.ndarray, "rows columns"]


def read(path: str, size_l0: tuple[int, int], shape: tuple[int, int]) -> Mask:
    """A slide's mask from a file.

    Args:
        path: ends with .geojson or .json, or else names an image.
        size_l0: (rows, columns) of the slide at level 0.
        shape: (rows, columns) of the mask that is wanted.

    Raises:
        UserError: no such file, or it is not what its ending says.
    """
    content = storage.read_bytes(path)
    if path.endswith((".geojson", ".json")):
        return _contours(path, content, size_l0, shape)
    try:
        picture = (
            Image.open(io.BytesIO(content)).convert("L").resize(shape[::-1], Image.Resampling.BOX)
        )
    except (OSError, Image.DecompressionBombError) as error:
        raise UserError(f"mask {path} is no image that can be read ({error}).") from error
    return np.asarray(picture) > 127 if _binary(content) else np.asarray(picture) > 0


def _binary(content: bytes) -> bool:
    """Whether the image knows 0 and 255 alone: then a pixel is tissue where most of it is."""
    extrema = Image.open(io.BytesIO(content)).convert("L").getextrema()
    return extrema == (0, 255)


def _contours(path: str, content: bytes, size_l0: tuple[int, int], shape: tuple[int, int]) -> Mask:
    page = Image.new("1", shape[::-1])
    pen = ImageDraw.Draw(page)
    factors = (shape[1] / size_l0[1], shape[0] / size_l0[0])
    try:
        for outer, *holes in _polygons(json.loads(content)):
            for ring, ink in [(outer, 1), *((hole, 0) for hole in holes)]:
                pen.polygon([(x * factors[0], y * factors[1]) for x, y, *_ in ring], fill=ink)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"mask {path} is no GeoJSON of polygons in level-0 pixels ({error})."
        ) from error
    return np.asarray(page, dtype=bool)


def _polygons(node: dict[str, Any] | list[Any]) -> Iterator[list[Any]]:
    """The rings of every polygon: the outer one, then its holes."""
    if isinstance(node, list):
        for one in node:
            yield from _polygons(one)
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
