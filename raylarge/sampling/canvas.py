"""Assemble windows on a canvas, and decode latents in overlapping, blended windows.

Blending weights are the published Gaussian, exp(-(x^2 + y^2) / sigma^2) on [-1, 1]^2 with
sigma .8 at strides of a quarter side. A band of rows is decoded from every window that
touches it, summed in row-major order: neighbouring bands agree to the bit on shared windows,
and a band's bytes do not depend on who decodes its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from raylarge.geometry import Patch, batches, origins
from raylarge.models.autoencoder import Codec

SIGMA = 0.8
Origins = Sequence[tuple[int, int]]


def kernel(side: int, sigma: float = SIGMA) -> Float[Tensor, "side side"]:
    """The Gaussian blending window, 1 at its largest."""
    axis = torch.linspace(-1, 1, side) ** 2
    window = torch.exp(-(axis[:, None] + axis[None]) / sigma**2)
    return window / window.max()


def gather(canvas: Float[Tensor, "c H W"], windows: Origins, side: int) -> Tensor:
    """Cut windows out of a canvas: [n, c, side, side]; origins in the canvas' own cells."""
    return torch.stack([canvas[:, r : r + side, k : k + side] for r, k in windows])


def scatter(
    patches: Float[Tensor, "n c s s"], windows: Origins, size: tuple[int, int]
) -> Float[Tensor, "c H W"]:
    """Put windows that do not overlap onto a canvas; what no window covers is zero."""
    side = patches.shape[-1]
    canvas = patches.new_zeros(patches.shape[1], *size)
    for patch, (r, k) in zip(patches, windows, strict=True):
        canvas[:, r : r + side, k : k + side] = patch
    return canvas


def arranged(
    latents: Sequence[Tensor],
    groups: Sequence[Origins],
    width: int,
    rows: tuple[int, int] | None = None,
) -> tuple[Float[Tensor, "c h W"], int]:
    """Latents of batches of patches put side by side, and the patch row that is the first.

    Args:
        latents: [B, c, s, s] each.
        groups: (row, column) of each batch's patches.
        width: of the canvas, in cells.
        rows: latent rows [first, last) to return; the batches have all of their patches.
    """
    cells = [cell for group in groups for cell in group]
    side = latents[0].shape[-1]
    first, last = min(row for row, _ in cells), max(row for row, _ in cells)
    places = [((row - first) * side, column * side) for row, column in cells]
    latent = scatter(torch.cat(list(latents)), places, ((last + 1 - first) * side, width))
    if rows is None:
        return latent, first
    return latent[:, rows[0] - first * side : rows[1] - first * side], rows[0] // side


def blend_weights(
    size: tuple[int, int], side: int, stride: int, sigma: float = SIGMA
) -> Float[Tensor, "n H W"]:
    """Each window's normalised weights over the canvas; they sum to 1 on every pixel."""
    places = [
        (r, k) for r in origins(size[0], side, stride) for k in origins(size[1], side, stride)
    ]
    window = kernel(side, sigma)
    weights = torch.stack([scatter(window[None, None], [place], size)[0] for place in places])
    return weights / weights.sum(dim=0)


def touching(height: int, side: int, stride: int, top: int, bottom: int) -> list[int]:
    """Starts of the window rows that overlap canvas rows top .. bottom - 1."""
    return [r for r in origins(height, side, stride) if r < bottom and r + side > top]


@dataclass(frozen=True)
class PixelBand:
    """Pixel rows top .. bottom - 1 of a canvas, and where the latents at hand begin.

    Attributes:
        height_px: height of the whole canvas.
        offset_lat: the canvas row, in latent cells, of the first latent row at hand.
    """

    top: int
    bottom: int
    height_px: int
    offset_lat: int = 0


def decode_band(
    autoencoder: Codec, latent: Float[Tensor, "c h w"], band: PixelBand, patch: Patch, batch: int
) -> Float[Tensor, "3 rows W"]:
    """Pixel rows of the blended decode of a latent canvas.

    Args:
        latent: latent rows of the canvas from the band's offset on, all that its windows need.
        batch: windows per decoder call, fixed.
    """
    side, factor, stride = patch.side_px, patch.factor, patch.side_px // 4
    rows = touching(band.height_px, side, stride, band.top, band.bottom)
    columns = origins(latent.shape[-1] * factor, side, stride)
    places = [(r, k) for r in rows for k in columns]
    cut = [(r // factor - band.offset_lat, k // factor) for r, k in places]
    weight = kernel(side).to(latent)
    total = latent.new_zeros(3, band.bottom - band.top, latent.shape[-1] * factor)
    mass = latent.new_zeros(1, *total.shape[1:])
    for group in batches(len(places), batch):
        images = autoencoder.decode(gather(latent, [cut[i] for i in group], patch.side_lat))
        for i, image in zip(dict.fromkeys(group), images, strict=False):
            r, k = places[i]
            first, last = max(r, band.top), min(r + side, band.bottom)
            inside, there = slice(first - r, last - r), slice(first - band.top, last - band.top)
            total[:, there, k : k + side] += weight[inside] * image[:, inside]
            mass[:, there, k : k + side] += weight[inside]
    return total.div_(mass)
