"""What becomes of a finished order: its files, the same from a job as from the service.

    FOLDER/image.png  FOLDER/guide.png (of a large image)  FOLDER/order.json

Each picture carries in itself that it is synthetic, the order, the bundle's digest, and
whether it is novel or derived from a real image.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
from jaxtyping import UInt8

from raylarge import images, storage
from raylarge.fleet.facts import Facts
from raylarge.metrics.consistency import cross_scale_error
from raylarge.metrics.seams import seam_ratio
from raylarge.order import Order
from raylarge.sampling.joint import Large


def marks(order: Order, facts: Facts) -> dict[str, str]:
    """The text fields of an order's pictures; embeddings are named by the digest, not copied."""
    document = order.as_json()
    document["condition"]["data"] = ""
    derived = order.condition.kind == "embeddings"
    return {
        "Order": json.dumps(document, sort_keys=True),
        "OrderDigest": order.digest,
        "Bundle": facts.digest,
        "Origin": "derived from a real image" if derived else "novel",
    }


def write(folder: str, order: Order, facts: Facts, result: Any) -> dict[str, str]:
    """Write the files of a result, the image last; name -> path."""
    paths = {"order.json": write_order(folder, order)}
    text = marks(order, facts)
    if (guide := guide_of(result)) is not None:
        paths["guide.png"] = storage.join(folder, "guide.png")
        images.write_png(paths["guide.png"], guide, text)
    paths["image.png"] = storage.join(folder, "image.png")
    images.write_png(paths["image.png"], image_of(result), text)
    return paths


def write_order(folder: str, order: Order) -> str:
    """Write the order as JSON that `order.parse` reads; the path."""
    path = storage.join(folder, "order.json")
    storage.write_json(path, order.as_json())
    return path


def image_of(result: Any) -> UInt8[np.ndarray, "H W 3"]:
    """The large image; of separate patches, all of them row by row in a near-square mosaic.

    Patch i stands at row i // n, column i % n, n = ceil(sqrt(count)); what is left is white.
    """
    if isinstance(result, Large):
        return result.image
    count, side = len(result), result.shape[1]
    columns = math.isqrt(count - 1) + 1
    rows = -(-count // columns)
    cells = np.full((rows * columns, side, side, 3), 255, np.uint8)
    cells[:count] = result
    grid = cells.reshape(rows, columns, side, side, 3).swapaxes(1, 2)
    return grid.reshape(rows * side, columns * side, 3)


def guide_of(result: Any) -> UInt8[np.ndarray, "P P 3"] | None:
    """The finished guide of a large image, if it had one."""
    if not isinstance(result, Large) or result.frames is None:
        return None
    return images.to_uint8(result.frames[-1])


def measure(result: Any, side: int) -> dict[str, float]:
    """Cross-scale error and seam ratio of a large image made of windows of `side` px."""
    if guide_of(result) is None:
        return {}
    image = images.to_float(result.image)
    return {
        "cross_scale_error": cross_scale_error(image, result.frames[-1]),
        "seam_ratio": seam_ratio(image, side),
    }
