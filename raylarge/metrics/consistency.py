"""Cross-scale error: how far an image, made small, is from the guide it grew under."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from raylarge.resample import downsample


def cross_scale_error(image: Float[Tensor, "3 H W"], guide: Float[Tensor, "3 P P"]) -> float:
    """||A(image) - guide|| / ||guide - mean(guide)||, both in [-1, 1].

    A is the data's own downsampling. 0 is agreement; 1 is as far off as a flat image of the
    guide's mean colour. A canvas that is not square or not a power of two covers only the
    top-left part of the guide, and only that part is compared.

    Raises:
        ValueError: no power of two relates the canvas to the guide.
    """
    factor = 1
    while factor * guide.shape[-1] < max(image.shape[-2:]):
        factor *= 2
    small = downsample(image, factor)
    covered = guide[:, : small.shape[-2], : small.shape[-1]]
    spread = covered - covered.mean(dim=(1, 2), keepdim=True)
    return float((small - covered).norm() / spread.norm())
