"""Cross-scale error: how far an image, made small, is from the guide it grew under.

Two forms differ in what is made small: the whole mosaic (`cross_scale_error`), where A reaches
across the borders of patches, or each patch by itself with mirrored borders, as the constraint
`window` does (`WindowError`), which can be told band by band.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from raylarge.resample import bicubic_matrix, downsample


def cross_scale_error(image: Float[Tensor, "3 H W"], guide: Float[Tensor, "3 P P"]) -> float:
    """||A(image) - guide|| / ||guide - mean(guide)||, both in [-1, 1].

    A is the data's own downsampling. 0 is agreement; 1 is as far off as a flat image of the
    guide's mean colour. A canvas that is not square or not a power of two covers only the
    top-left part of the guide, and only that part is compared.

    Raises:
        ValueError: no power of two relates the canvas to the guide.
    """
    small = downsample(image, _factor(tuple(image.shape[-2:]), guide))
    covered = guide[:, : small.shape[-2], : small.shape[-1]]
    spread = covered - covered.mean(dim=(1, 2), keepdim=True)
    return float((small - covered).norm() / spread.norm())


def window_error(image: Float[Tensor, "3 H W"], guide: Float[Tensor, "3 P P"]) -> float:
    """The cross-scale error in its window form (`WindowError`) of an image in memory.

    Raises:
        ValueError: the image is not made of P x P patches, or of more than the guide has pixels.
    """
    error = WindowError(guide, (image.shape[-2], image.shape[-1]))
    error.add(image)
    return error.value


class WindowError:
    """The cross-scale error with A inside each P x P patch, of an image that comes in bands.

    Each patch is made small by itself, mirrored at its own borders, and compared with its block
    of the guide: what the constraint `window` minimises. Only near the borders of patches does
    it differ from `cross_scale_error`. Kept in memory: P rows, already made narrow.
    """

    def __init__(self, guide: Float[Tensor, "3 P P"], size: tuple[int, int]) -> None:
        """Start above the first row.

        Args:
            guide: the finished guide, in [-1, 1].
            size: (rows, columns) of the image in pixels.

        Raises:
            ValueError: the image is not made of P x P patches, or of more than the guide has
                pixels.
        """
        side = guide.shape[-1]
        if any(length % side for length in size):
            raise ValueError(f"an image of {size} px is not made of patches of {side} px")
        factor = _factor(size, guide)
        self._size, self._matrix = size, torch.from_numpy(bicubic_matrix(side, factor)).to(guide)
        self._covered = guide[:, : size[0] // factor, : size[1] // factor].double()
        self._narrow = guide.new_empty(3, side, size[1] // factor)
        self._seen, self._squares = 0, 0.0

    def add(self, rows: Float[Tensor, "3 rows W"]) -> None:
        """Take the next rows, in [-1, 1], any number of them.

        Raises:
            ValueError: rows of another width, or more than the image has.
        """
        height, width = self._size
        if rows.shape[-1] != width or self._seen + rows.shape[-2] > height:
            raise ValueError(
                f"{rows.shape[-2]} rows of {rows.shape[-1]} px after {self._seen} do not fit an "
                f"image of {self._size} px"
            )
        side = self._narrow.shape[-2]
        while rows.shape[-2]:
            at = self._seen % side
            part, rows = rows[:, : side - at], rows[:, side - at :]
            patches = part.to(self._narrow).unflatten(-1, (-1, side))
            self._narrow[:, at : at + part.shape[1]] = (patches @ self._matrix.mT).flatten(-2)
            self._seen += part.shape[1]
            if self._seen % side == 0:
                self._compare()

    def _compare(self) -> None:
        """Make the finished row of patches small and compare it with its rows of the guide."""
        small = (self._matrix @ self._narrow).double()
        bottom = self._seen * small.shape[-2] // self._narrow.shape[-2]
        covered = self._covered[:, bottom - small.shape[-2] : bottom]
        self._squares += float((small - covered).square().sum())

    @property
    def value(self) -> float:
        """The error of the whole image; 0 is agreement, 1 a flat image of the mean colour.

        Raises:
            ValueError: rows are missing.
        """
        if self._seen < self._size[0]:
            raise ValueError(f"{self._seen} rows of {self._size[0]} have come")
        spread = self._covered - self._covered.mean(dim=(1, 2), keepdim=True)
        return float(torch.tensor(self._squares, dtype=torch.float64).sqrt() / spread.norm())


def _factor(size: tuple[int, ...], guide: Tensor) -> int:
    """The power of two by which an image is larger than the guide that covers it."""
    factor = 1
    while factor * guide.shape[-1] < max(size):
        factor *= 2
    return factor
