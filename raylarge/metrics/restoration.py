"""How well one image restores another."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def psnr(image: Float[Tensor, "B ..."], reference: Float[Tensor, "B ..."]) -> Float[Tensor, "B"]:
    """Peak signal-to-noise ratio per sample in dB, for images in [-1, 1] (peak 2)."""
    error = (image - reference).square().flatten(1).mean(dim=1)
    return 10 * (4 / error.clamp_min(1e-12)).log10()
