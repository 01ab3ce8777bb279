"""Seam ratio: how much sharper an image changes across window borders than elsewhere."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def seam_ratio(image: Float[Tensor, "3 H W"], side: int) -> float:
    """Mean gradient across the borders of windows of `side` px over that inside windows.

    1 is seamless. Only differences that cross a border count as border, and only those well
    inside a window (not next to a border) as inside.

    Raises:
        ValueError: the image is one window and has no borders.
    """
    if max(image.shape[-2:]) <= side:
        raise ValueError(f"an image of {tuple(image.shape[-2:])} px has no borders of {side} px")
    border, inside = [], []
    for axis in (1, 2):
        steps = image.diff(dim=axis).abs().mean(dim=0).movedim(axis - 1, 0)
        for i, line in enumerate(steps):
            place = (i + 1) % side
            if place == 0:
                border.append(line.mean())
            elif 2 <= place <= side - 2:
                inside.append(line.mean())
    return float(sum(border) / len(border) / (sum(inside) / len(inside)))
