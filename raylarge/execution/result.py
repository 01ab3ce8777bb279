"""What becomes of a finished order: its files, the same from a job as from the service.

    FOLDER/image.png  image.tif (a pyramid)  guide.png (of a large image)  order.json

Each picture carries in itself that it is synthetic, the order, the bundle's digest, and
whether it is novel or derived from a real image.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import UInt8

from raylarge import images, storage
from raylarge import pyramid as pyramids
from raylarge.geometry import spans
from raylarge.metrics.consistency import WindowError
from raylarge.metrics.lines import MIN_WINDOWS, WindowLines
from raylarge.metrics.seams import SeamRatio
from raylarge.order import Order
from raylarge.sampling.bundle_facts import BundleFacts
from raylarge.sampling.joint import LargeImage

STRIP_ROWS = 32
"""Rows that are floats at a time."""
MEANING = {
    "cross_scale_error": "how far the image, made small, is from its guide; 0 is agreement, 1 as "
    "far off as one flat colour",
    "seam_ratio": "gradients across window borders over those inside; 1 is as sharp as elsewhere "
    "(lines of another brightness do not show here)",
    "window_lines": "a grid of windows in rows, columns, colours or contrast over chance; about 1 "
    "is none, above 3 there is one",
}
"""One line on each figure that is measured of a large image."""
PNG_PIXELS = 1 << 26
"""Larger images (8192 x 8192) are written as a pyramid alone."""


def marks(order: Order, facts: BundleFacts) -> dict[str, str]:
    """The text fields of an order's pictures; embeddings are named by the digest, not copied."""
    document = order.as_json()
    document["condition"]["data"] = document["source"]["image"] = ""
    derived = order.condition.kind == "embeddings" or order.algorithm == "superres"
    return {
        "Order": storage.as_json(document),
        "OrderDigest": order.digest,
        "Bundle": facts.digest,
        "Origin": "derived from a real image" if derived else "novel",
    }


def write(
    folder: str, order: Order, facts: BundleFacts, result: Any, pyramid: bool = False
) -> tuple[dict[str, str], dict[str, float]]:
    """Write the files of a result, the image last; name -> path, and what was measured.

    Args:
        pyramid: write a large image as a pyramidal TIFF too; beyond `PNG_PIXELS` it is the only
            form, and no more than a band is ever in memory.
    """
    paths = {"order.json": write_order(folder, order)}
    text = marks(order, facts)
    if (guide := guide_of(result)) is not None:
        paths["guide.png"] = storage.join(folder, "guide.png")
        images.write_png(paths["guide.png"], guide, text)
    if not isinstance(result, LargeImage):
        return paths | _png(folder, mosaic(result), text), {}
    small = order.size[0] * order.size[1] <= PNG_PIXELS
    whole = np.empty((*order.size, 3), np.uint8) if small else None
    measured = _Measured(order, facts, result)
    bands = measured.following(result.bands(), whole)
    if pyramid or not small:
        path = storage.join(folder, "image.tif")
        mpp = facts.base_mpp * (1 << order.scale) if facts.base_mpp else None
        pyramids.write(path, bands, order.size, mpp, text)
        paths["image.tif"] = path
    for _ in bands:
        pass
    if whole is not None:
        paths |= _png(folder, whole, text)
    return paths, measured.values()


def _png(folder: str, image: UInt8[np.ndarray, "H W 3"], text: dict[str, str]) -> dict[str, str]:
    path = storage.join(folder, "image.png")
    images.write_png(path, image, text)
    return {"image.png": path}


class _Measured:
    """Figures of a large image, taken from its bands as they pass."""

    def __init__(self, order: Order, facts: BundleFacts, result: LargeImage) -> None:
        self._error = self._seams = self._lines = None
        side = facts.patch.side_px
        if result.frames is not None:
            self._error = WindowError(result.frames[-1], order.size)
        if order.algorithm == "joint" and max(order.size) > side:
            self._seams = SeamRatio(side)
        if self._seams is not None and max(order.size) >= MIN_WINDOWS * side:
            self._lines = WindowLines(side)

    def following(
        self, bands: Iterable[np.ndarray], whole: np.ndarray | None
    ) -> Iterator[np.ndarray]:
        """The bands, measured on their way, and put together where the whole image is wanted."""
        top = 0
        for band in bands:
            for first, last in spans(len(band), STRIP_ROWS):
                rows = images.to_float(band[first:last])
                for measure in (self._error, self._seams, self._lines):
                    if measure is not None:
                        measure.add(rows)
            if whole is not None:
                whole[top : top + len(band)] = band
            top += len(band)
            yield band

    def values(self) -> dict[str, float]:
        """Return the figures of `MEANING` that mean something for this image.

        Of the cross-scale error A acts inside each window.
        """
        measures = zip(MEANING, (self._error, self._seams, self._lines), strict=True)
        return {name: one.value for name, one in measures if one is not None}


def write_order(folder: str, order: Order) -> str:
    """Write the order as JSON that `order.parse` reads; the path."""
    path = storage.join(folder, "order.json")
    storage.write_json(path, order.as_json())
    return path


def mosaic(patches: UInt8[np.ndarray, "n P P 3"]) -> UInt8[np.ndarray, "H W 3"]:
    """Separate patches row by row in a near-square picture.

    Patch i stands at row i // n, column i % n, n = ceil(sqrt(count)); what is left is white.
    """
    count, side = len(patches), patches.shape[1]
    columns = math.isqrt(count - 1) + 1
    rows = -(-count // columns)
    cells = np.full((rows * columns, side, side, 3), 255, np.uint8)
    cells[:count] = patches
    grid = cells.reshape(rows, columns, side, side, 3).swapaxes(1, 2)
    return grid.reshape(rows * side, columns * side, 3)


def guide_of(result: Any) -> UInt8[np.ndarray, "P P 3"] | None:
    """The finished guide of a large image, if it had one."""
    if not isinstance(result, LargeImage) or result.frames is None:
        return None
    return images.to_uint8(result.frames[-1])
