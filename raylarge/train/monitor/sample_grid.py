"""Sheets: what a network in training makes of fixed noise, beside what it should look like.

    held-out samples -spread-> conditions ─┐
    CDM -draw-> tokens of a scale ─────────┴-> U-Net, DDIM -> latents -decode-> rows of a sheet

Noise stands at (scale, place in the row), so one cell of every sheet of a run begins with the
same noise and shows progress alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from raylarge import images
from raylarge.diffusion.noise import normal
from raylarge.diffusion.schedule import Schedule
from raylarge.diffusion.solvers import solve
from raylarge.models.autoencoder import Autoencoder
from raylarge.models.denoiser import NetworkDenoiser, bind_context, guided
from raylarge.train.task import Batch

Pixels = UInt8[np.ndarray, "_ _ 3"]
AT_ONCE = 8
"""Images in one pass: a sheet must fit beside what training keeps on the card."""
COLUMNS = 4
"""Images of each scale that a CDM draws."""


@dataclass(frozen=True)
class Painter:
    """Draws images of context tokens, where and in the precision that its networks are.

    Attributes:
        unet: called as (x_t, t, tokens).
        schedule: that it is trained on.
        vae: decodes latents; without one they are shown by their first three channels.
        null: tokens of no condition [1, n, D]; zeros, as in ZoomLDM, if left out.
        steps: of DDIM.
        guidance: w; 1 is none.
    """

    unet: Any
    schedule: Schedule
    vae: Autoencoder | None = None
    null: Tensor | None = None
    steps: int = 20
    guidance: float = 2.0

    def sample(
        self, tokens: Float[Tensor, "B n D"], noise: Float[Tensor, "B c h w"]
    ) -> Float[Tensor, "B c h w"]:
        """Latents of noise under a condition, float32 on the CPU."""
        weight = next(self.unet.parameters())
        null = None if self.null is None else self.null.to(weight)
        denoiser = guided(NetworkDenoiser(self.unet, self.schedule), self.guidance, null)
        found = []
        for some, begin in zip(tokens.split(AT_ONCE), noise.split(AT_ONCE), strict=True):
            estimate = bind_context(denoiser, some.to(weight))
            x_t = begin.to(weight.device)
            found.append(solve(estimate, x_t, self.schedule, "ddim", self.steps).float().cpu())
        return torch.cat(found)

    def show(
        self, latents: Float[Tensor, "B c h w"], like: Float[Tensor, "B c h w"] | None = None
    ) -> list[Pixels]:
        """Latents as pixels.

        Args:
            like: whose least and largest values become black and white, where there is no
                autoencoder; the latents' own if left out.
        """
        if self.vae is None:
            like = latents if like is None else like
            return [_colour(*pair) for pair in zip(latents, like, strict=True)]
        weight = next(self.vae.parameters())
        decoded = [self.vae.decode(some.to(weight)).cpu() for some in latents.split(AT_ONCE)]
        return list(images.to_uint8(torch.cat(decoded)))


@torch.no_grad()
def ldm_sheet(
    painter: Painter, condition: Callable[[Batch], Tensor], batch: Batch, seed: int
) -> Pixels:
    """For each scale some held-out samples: each as it is, and drawn from its condition.

    Args:
        painter: with the U-Net in training.
        condition: makes context tokens of a batch, on any device.
        batch: held-out samples, not too many (`spread`), on the CPU: `scale`, `latent`, and what
            `condition` reads.
        seed: of the noise.
    """
    scale, latent = batch["scale"], batch["latent"].float()
    made = painter.sample(condition(batch), _noise(latent.shape[1:], seed, scale.tolist()))
    pairs = list(zip(painter.show(latent), painter.show(made, latent), strict=True))
    columns = ["reference", "generated"] * int(scale.bincount().max())
    return _sheet(pairs, scale.tolist(), columns)


@torch.no_grad()
def cdm_sheet(painter: Painter, cdm: Any, scales: Sequence[int], seed: int) -> Pixels:
    """For each scale four images of tokens that the CDM draws.

    Args:
        painter: with a trained U-Net.
        cdm: in training.
        scales: a row each.
        seed: of the tokens and of the noise.
    """
    config = painter.unet.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    drawn = [cdm.draw(k, seed, [(k, 0, i) for i in range(COLUMNS)]) for k in scales]
    places = [k for k in scales for _ in range(COLUMNS)]
    made = painter.sample(torch.cat(drawn), _noise(shape, seed, places))
    return _sheet([(image,) for image in painter.show(made)], places)


def spread(batch: Batch, per_scale: int) -> Batch:
    """Some samples of each scale, far apart in the order of their indices: always the same.

    Args:
        batch: has `scale` and `sample`.
        per_scale: most of each scale.

    Returns:
        All columns of those samples, by scale and index.
    """
    scale, sample = batch["scale"].tolist(), batch["sample"].tolist()
    taken: list[int] = []
    for k in sorted(set(scale)):
        here = sorted((i for i, other in enumerate(scale) if other == k), key=sample.__getitem__)
        count = min(per_scale, len(here))
        taken += [here[i * len(here) // count] for i in range(count)]
    return {name: value[torch.tensor(taken)] for name, value in batch.items()}


def _noise(shape: Sequence[int], seed: int, scales: Sequence[int]) -> Float[Tensor, "n c h w"]:
    """Noise of samples in a row each, which stands at (scale, place among those of its scale)."""
    addresses = [(k, scales[:i].count(k)) for i, k in enumerate(scales)]
    return normal(shape, seed, "sheet", addresses)


def _sheet(
    cells: Sequence[Sequence[Pixels]], scales: Sequence[int], columns: Sequence[str] = ()
) -> Pixels:
    """A row for each scale; small images are enlarged, and larger ones not shrunk below 256 px."""
    rows: dict[int, list[Pixels]] = {k: [] for k in sorted(set(scales))}
    for k, some in zip(scales, cells, strict=True):
        rows[k] += some
    side = max(cells[0][0].shape)
    names = [f"scale {k}" for k in rows]
    return images.sheet(list(rows.values()), names, columns, min(max(side, 128), 256))


def _colour(latent: Float[Tensor, "c h w"], like: Float[Tensor, "c h w"]) -> Pixels:
    """The first three channels from black to white; a single one as grey."""
    low, high = like[:3].min(), like[:3].max()
    shown = ((latent[:3] - low) / (high - low).clamp_min(1e-8)).clamp(0, 1) * 2 - 1
    return images.to_uint8(shown if len(shown) == 3 else shown[:1].expand(3, -1, -1))
