"""Condition inversion: the embeddings under which the model would have made an image.

    z = Enc(image), u ~ N(0, 1);  200 times, t from 950 down to 50:  Adam on u of

    mean sqrt(abar_t) (1 - abar_t) (eps(z_t, t, f(u, scale)) - eps)^2
        - .05 mean over pairs of cos(u_i, u_j)

The networks stay as they are and there is no guidance. Samples never meet: the loss is a sum
over them, Adam is element by element, and all draws stand at addresses (scale, row, column,
step), where step 0 is u's start. Source: ZoomLDM, supplement S3.3; weight, rate and prior are
those of the released code, which reads abar[t - 1] where this reads abar[t].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from raylarge.diffusion.noise import normal
from raylarge.diffusion.schedule import Schedule
from raylarge.diffusion.steps import eps_of
from raylarge.errors import UserError
from raylarge.models.conditioner import Conditioner, normalise


@dataclass(frozen=True)
class Inversion:
    """Settings; the defaults are the published ones.

    Attributes:
        iterations: steps of Adam (supplement S3.3).
        rate: Adam's learning rate (released code).
        first: timestep of the first iteration (supplement S3.3).
        last: timestep of the last one; those between are evenly spaced, rounded down.
        similarity: weight of the prior, the mean cosine between tokens (released code).
    """

    iterations: int = 200
    rate: float = 0.1
    first: int = 950
    last: int = 50
    similarity: float = 0.05

    @property
    def timesteps(self) -> list[int]:
        """The timestep of each iteration."""
        return [int(t) for t in np.linspace(self.first, self.last, self.iterations)]


PUBLISHED = Inversion()


@dataclass(frozen=True)
class Model:
    """What is inverted.

    Attributes:
        unet: called as (x_t, t, context).
        schedule: says what it predicts.
        dtype: both networks' precision; everything else is computed in float32 or better.
    """

    unet: Callable[..., Tensor]
    conditioner: Conditioner
    schedule: Schedule
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Places:
    """Where the samples stand: their draws follow from it, and the conditioner is told the scale.

    Attributes:
        seed: all randomness follows from it.
        scale: the scale of the images.
        windows: row and column of each image, counted in patches of that scale.
    """

    seed: int
    scale: int
    windows: tuple[tuple[int, int], ...]


def invert(
    model: Model,
    latents: Float[Tensor, "B c p p"],
    shape: tuple[int, int, int],
    places: Places,
    how: Inversion = PUBLISHED,
) -> Float[Tensor, "B C h w"]:
    """Embeddings that explain images, one grid per image, in float32 or better.

    Each token has mean 0 and standard deviation 1, so the grids are ready both for conditioners
    that normalise and for those that do not, and can be cut into the grids of finer windows.

    Args:
        latents: the images, encoded.
        shape: (C, rows, columns) of a grid; published: a row and a column per base patch.

    Raises:
        UserError: settings that do not fit the schedule, or embeddings that do not fit the
            conditioner.
        ValueError: not one place per latent.
    """
    _check(model, latents, places, how)
    z = latents.to(torch.promote_types(latents.dtype, torch.float32))

    def draw(size: tuple[int, ...], step: int) -> Tensor:
        addresses = [(places.scale, row, column, step) for row, column in places.windows]
        return normal(size, places.seed, "inversion", addresses).to(z)

    u = draw(shape, 0).requires_grad_()
    adam = torch.optim.Adam([u], lr=how.rate)
    with torch.enable_grad(), _frozen(model.unet, model.conditioner):
        for step, t in enumerate(how.timesteps, start=1):
            grid = _normalised(u)
            loss = denoising(model, grid, z, draw(tuple(z.shape[1:]), step), t, places.scale)
            loss = loss - how.similarity * likeness(grid)
            u.grad = torch.autograd.grad(loss.sum(), u)[0]
            adam.step()
    return _normalised(u).detach()


def denoising(
    model: Model,
    grid: Float[Tensor, "B C h w"],
    z: Float[Tensor, "B c p p"],
    eps: Float[Tensor, "B c p p"],
    t: int,
    scale: int,
) -> Float[Tensor, " B"]:
    """How badly embeddings explain each latent at one timestep (supplement, Eq. S9).

    mean sqrt(abar) (1 - abar) (eps(z_t, t, f(u, scale)) - eps)^2
    """
    abar = float(model.schedule.abar[t])
    z_t = model.schedule.noised(z, eps, t)
    scales = torch.full((len(z),), scale, device=z.device)
    tokens = model.conditioner(grid.to(model.dtype), scales, None)
    output = model.unet(z_t.to(model.dtype), t, tokens).to(z_t.dtype)
    predicted = eps_of(z_t, model.schedule.x_0(z_t, output, t), abar)
    return abar**0.5 * (1 - abar) * (predicted - eps).square().flatten(1).mean(dim=1)


def likeness(grid: Float[Tensor, "B C h w"]) -> Float[Tensor, " B"]:
    """Mean cosine over all pairs of a grid's tokens, each with itself included: |mean u/|u||^2."""
    unit = nn.functional.normalize(grid.flatten(2), dim=1)
    return unit.mean(dim=2).square().sum(dim=1)


def _normalised(u: Tensor) -> Tensor:
    return normalise(u.movedim(1, -1)).movedim(-1, 1)


@contextmanager
def _frozen(*networks: Any) -> Iterator[None]:
    """Parameters without gradients for a while: what only they need is not kept in memory."""
    modules = [network for network in networks if isinstance(network, nn.Module)]
    free = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in free:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in free:
            parameter.requires_grad_(True)


def _check(model: Model, latents: Tensor, places: Places, how: Inversion) -> None:
    length = model.schedule.length
    if how.iterations < 1 or not all(0 <= t < length for t in (how.first, how.last)):
        raise UserError(
            f"an inversion of {how.iterations} iterations from timestep {how.first} to {how.last} "
            f"does not fit; take at least 1 iteration, and timesteps 0 to {length - 1}."
        )
    if len(latents) != len(places.windows):
        raise ValueError(f"{len(latents)} latents, but {len(places.windows)} places")
