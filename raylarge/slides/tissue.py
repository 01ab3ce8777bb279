"""Find tissue on a slide: it is colourful against the near-white glass.

Otsu's threshold (IEEE Trans. SMC 9(1), 1979) on the blurred chroma (largest minus smallest
channel) of a thumbnail. Otsu always splits, even a slide of one kind; so its threshold is
clamped to a band in which both an empty and a full slide come out right. Chroma, unlike
HSV saturation, is low for black too: dark edges and air bubbles are no tissue.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, UInt8
from scipy import ndimage

LOWEST_CHROMA, HIGHEST_CHROMA = 12.0, 32.0
"""Levels of 255: below the first nothing is tissue, above the second everything is."""
_BLUR_PX = 1.0


def tissue_mask(thumbnail: UInt8[np.ndarray, "rows columns 3"]) -> Bool[np.ndarray, "rows columns"]:
    """Return which pixels of a thumbnail (4 to 16 um/px) show tissue; fat and lumina do not."""
    chroma = np.ptp(thumbnail.astype(np.float32), axis=-1)
    blurred = ndimage.gaussian_filter(chroma, _BLUR_PX)
    threshold = np.clip(otsu(blurred), LOWEST_CHROMA, HIGHEST_CHROMA)
    mask: np.ndarray = ndimage.median_filter(blurred > threshold, size=3)
    return mask


def otsu(values: Float[np.ndarray, "rows columns"]) -> float:
    """Return Otsu's threshold of values in 0..255, by a histogram of 256 bins."""
    counts, edges = np.histogram(values, bins=256, range=(0, 256))
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    sums = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        gap = sums / below - (sums[-1] - sums) / above
        between = np.nan_to_num(below * above * gap**2)
    return float(edges[1:][np.argmax(between)])


def tissue_fraction(
    mask: Bool[np.ndarray, "rows columns"], cells_px: float, grid: tuple[int, int]
) -> Float[np.ndarray, "grid_rows grid_columns"]:
    """Return the share of tissue in each tile of the base grid; beyond the mask there is none.

    Args:
        mask: of a thumbnail of the slide.
        cells_px: side of a tile in pixels of the mask.
        grid: (rows, columns) of tiles.
    """
    rows = _averages(mask.shape[0], cells_px, grid[0])
    columns = _averages(mask.shape[1], cells_px, grid[1])
    return (rows @ mask.astype(np.float64) @ columns.T).astype(np.float32)


def _averages(length: int, cell: float, count: int) -> np.ndarray:
    """[count, length]: the weight of each pixel in each cell; weights of a whole cell sum to 1."""
    starts = np.arange(count)[:, None] * cell
    pixels = np.arange(length)[None]
    overlap = np.minimum(starts + cell, pixels + 1) - np.maximum(starts, pixels)
    weights: np.ndarray = np.clip(overlap, 0, None) / cell
    return weights
