"""Cross-scale error: the distance between a downsampled image and the guide that it follows.

There are two forms. `cross_scale_error` downsamples the whole mosaic, so that A reaches across
the borders of patches. `WindowError` downsamples each patch alone with mirrored borders, as the
constraint `window` does, and accepts an image in bands of rows.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from raylarge.resample import bicubic_matrix, downsample


def cross_scale_error(image: Float[Tensor, "3 H W"], guide: Float[Tensor, "3 P P"]) -> float:
    """Return ||A(image) - guide|| / ||guide - mean(guide)||, both images in [-1, 1].

    A is the downsampling of the data. 0 is agreement; a flat image of the guide's mean colour
    gives 1. A canvas that is not square or no power of two covers the top-left part of the guide,
    and only that part is compared.
    """
    small = downsample(image, _factor(tuple(image.shape[-2:]), guide))
    covered = guide[:, : small.shape[-2], : small.shape[-1]]
    spread = covered - covered.mean(dim=(1, 2), keepdim=True)
    return float((small - covered).norm() / spread.norm())


def window_error(image: Float[Tensor, "3 H W"], guide: Float[Tensor, "3 P P"]) -> float:
    """Return the `WindowError` of an image in memory; same errors."""
    error = WindowError(guide, (image.shape[-2], image.shape[-1]))
    error.add(image)
    return error.value


class WindowError:
    """Cross-scale error with A inside each P x P patch, of an image that arrives in bands.

    Each patch is downsampled alone, mirrored at its own borders, and compared with its block of
    the guide: the quantity that the constraint `window` minimises. It differs from
    `cross_scale_error` only near the borders of patches. Memory: P rows, already narrowed.
    """

    def __init__(self, guide: Float[Tensor, "3 P P"], size: tuple[int, int]) -> None:
        """Initialize for an image whose first row comes next.

        Args:
            guide: the finished guide, in [-1, 1].
            size: (rows, columns) of the image in pixels.

        Raises:
            ValueError: the image is not made of P x P patches.
        """
        side = guide.shape[-1]
        if any(length % side for length in size):
            raise ValueError(f"an image of {size} px is not made of patches of {side} px")
        factor = _factor(size, guide)
        self._size, self._matrix = size, torch.from_numpy(bicubic_matrix(side, factor)).to(guide)
        self._covered = guide[:, : size[0] // factor, : size[1] // factor].double()
        self._narrow = guide.new_empty(3, side, size[1] // factor)
        self._row_count, self._squares = 0, 0.0

    def add(self, rows: Float[Tensor, "3 rows W"]) -> None:
        """Add the next rows, any number of them, in [-1, 1].

        Raises:
            ValueError: rows of another width, or more than the image has.
        """
        height, width = self._size
        if rows.shape[-1] != width or self._row_count + rows.shape[-2] > height:
            raise ValueError(
                f"{rows.shape[-2]} rows of {rows.shape[-1]} px after {self._row_count} do not fit "
                f"an image of {self._size} px"
            )
        side = self._narrow.shape[-2]
        while rows.shape[-2]:
            at = self._row_count % side
            part, rows = rows[:, : side - at], rows[:, side - at :]
            patches = part.to(self._narrow).unflatten(-1, (-1, side))
            self._narrow[:, at : at + part.shape[1]] = (patches @ self._matrix.mT).flatten(-2)
            self._row_count += part.shape[1]
            if self._row_count % side == 0:
                self._compare()

    def _compare(self) -> None:
        """Downsample the complete row of patches and compare it with its rows of the guide."""
        small = (self._matrix @ self._narrow).double()
        bottom = self._row_count * small.shape[-2] // self._narrow.shape[-2]
        covered = self._covered[:, bottom - small.shape[-2] : bottom]
        self._squares += float((small - covered).square().sum())

    @property
    def value(self) -> float:
        """Error of the whole image; 0 is agreement, 1 a flat image of the mean colour.

        Raises:
            ValueError: rows are missing.
        """
        if self._row_count < self._size[0]:
            raise ValueError(f"{self._row_count} rows of {self._size[0]} were added")
        spread = self._covered - self._covered.mean(dim=(1, 2), keepdim=True)
        return float(torch.tensor(self._squares, dtype=torch.float64).sqrt() / spread.norm())


def _factor(size: tuple[int, ...], guide: Tensor) -> int:
    """Return the power of two by which the guide must be enlarged to cover an image."""
    factor = 1
    while factor * guide.shape[-1] < max(size):
        factor *= 2
    return factor
