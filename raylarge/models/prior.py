"""The grid prior: diffusion over a small grid of SSL embeddings, conditioned on one vector.

    vector (text embedding, class, RNA …) -draw-> grid of raw embeddings [C, 4, 4], rows first

A residual convolutional network predicts x_0 from the noisy grid and the timestep, in additional
channels; 1000 steps of DDPM's linear schedule; guidance with negative prompts. Source: Graikos et
al. (CVPR 2024), supplement 14, which does not specify the sizes, how the vector enters (here by
FiLM) and the padding (here zeros).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from jaxtyping import Float, Num
from torch import Tensor, nn

from raylarge.diffusion.noise import normal
from raylarge.diffusion.schedule import Schedule
from raylarge.diffusion.steps import ddim
from raylarge.errors import UserError
from raylarge.models.cdm import sinusoid

_TIME = 64  # channels of the timestep
_GROUP = 16  # channels per group of every group norm, so that one cell has statistics


@dataclass(frozen=True)
class GridSampling:
    """Settings for sampling grids.

    Attributes:
        steps: 1 to 999, spaced by `Schedule.steps`; 999 visits every timestep.
        guidance: w in u + w (c - u); 1 is the conditional model itself.
        eta: 0 is DDIM, 1 ancestral sampling.
        shape: rows and columns of the grid; by default the model's `side`.
    """

    steps: int = 50
    guidance: float = 1.0
    eta: float = 0.0
    shape: tuple[int, int] | None = None


class _FilmBlock(nn.Module):
    """x + conv(silu(film(norm(conv(silu(norm(x))))))), with FiLM (1 + scale) h + shift."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(width), _norm(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.film = nn.Linear(width, 2 * width)

    def forward(
        self, x: Float[Tensor, "B D h w"], c: Float[Tensor, "B D"]
    ) -> Float[Tensor, "B D h w"]:
        """Return x plus a residual whose second norm is scaled and shifted by the condition."""
        silu = nn.functional.silu
        shift, scale = self.film(c)[:, :, None, None].chunk(2, dim=1)
        h = (1 + scale) * self.norm2(self.conv1(silu(self.norm1(x)))) + shift
        out: Tensor = x + self.conv2(silu(h))
        return out


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(max(1, width // _GROUP), width)


class GridPrior(ModelMixin, ConfigMixin):
    """Predicts a clean standardised grid from a noisy one, a timestep and a vector.

    The vector enters by FiLM in every block, standardised per feature and with one more feature
    that is 1. The null condition is the zero vector, all of whose features are 0.

    Args:
        channels: width of one embedding.
        vector: width of the condition.
        side: default rows and columns of a grid; the network is convolutional.
        width: of every convolution, a multiple of 16.
        blocks: residual blocks.
    """

    @register_to_config
    def __init__(
        self, channels: int, vector: int, side: int = 4, width: int = 512, blocks: int = 4
    ) -> None:
        super().__init__()
        self.vector_in = nn.Sequential(nn.Linear(vector + 1, width), nn.SiLU())
        self.grid_in = nn.Conv2d(channels + _TIME, width, 3, padding=1)
        self.body = nn.ModuleList([_FilmBlock(width) for _ in range(blocks)])
        self.norm_out = _norm(width)
        self.grid_out = nn.Conv2d(width, channels, 3, padding=1)
        for parameter in self.grid_out.parameters():
            nn.init.zeros_(parameter)
        self.register_buffer("shift", torch.zeros(1, channels, 1, 1))
        self.register_buffer("scale", torch.ones(1, channels, 1, 1))
        self.register_buffer("vector_shift", torch.zeros(1, vector))
        self.register_buffer("vector_scale", torch.ones(1, vector))
        self.schedule = Schedule("linear", 1000, 1e-4, 0.02, "sample")

    @torch.no_grad()
    def standardise(self, grids: Float[Tensor, "B C h w"], vectors: Float[Tensor, "n V"]) -> None:
        """Set the buffers so that these raw grids and vectors have mean 0, std 1 per channel.

        Zero vectors (missing conditions) do not count; constant channels are only shifted.
        """
        _check_width(vectors, self.config.vector)
        conditions = vectors[vectors.any(dim=1)]
        self.shift.copy_(grids.mean(dim=(0, 2, 3), keepdim=True))
        self.scale.copy_(_spread(grids.std(dim=(0, 2, 3), keepdim=True)))
        if len(conditions) > 1:
            self.vector_shift.copy_(conditions.mean(dim=0, keepdim=True))
            self.vector_scale.copy_(_spread(conditions.std(dim=0, keepdim=True)))

    def to_standard(self, grids: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        """Convert raw embeddings to the units of `forward`: the x_0 of training."""
        x_0: Tensor = (grids - self.shift) / self.scale
        return x_0

    def forward(
        self,
        x_t: Float[Tensor, "B C h w"],
        t: Num[Tensor, " B"],
        vector: Float[Tensor, "B V"],
    ) -> Float[Tensor, "B C h w"]:
        """Return the estimate of the clean standardised grid.

        Args:
            t: timesteps, 0 to 999.
            vector: raw conditions; a row of zeros is the null condition.

        Raises:
            UserError: a vector of another width than the model's.
        """
        _check_width(vector, self.config.vector)
        is_set = vector.any(dim=1, keepdim=True).to(vector)
        features = is_set * (vector - self.vector_shift) / self.vector_scale
        c = self.vector_in(torch.cat([features, is_set], dim=1))
        time = sinusoid(t, _TIME, sine_first=False).to(x_t)[:, :, None, None]
        x = self.grid_in(torch.cat([x_t, time.expand(-1, -1, *x_t.shape[2:])], dim=1))
        for block in self.body:
            x = block(x, c)
        x_0: Tensor = self.grid_out(nn.functional.silu(self.norm_out(x)))
        return x_0

    def draw(
        self,
        vectors: Float[Tensor, "#B V"],
        seed: int,
        addresses: Sequence[Sequence[int]],
        steps: int = 50,
        guidance: float = 1.0,
        negative: Float[Tensor, "#B _"] | None = None,
    ) -> Float[Tensor, "B C h w"]:
        """Sample raw grids by DDIM; see `sample`."""
        return self.sample(vectors, seed, addresses, GridSampling(steps, guidance), negative)

    @torch.no_grad()
    def sample(
        self,
        vectors: Float[Tensor, "#B V"],
        seed: int,
        addresses: Sequence[Sequence[int]],
        settings: GridSampling,
        negative: Float[Tensor, "#B _"] | None = None,
    ) -> Float[Tensor, "B C h w"]:
        """Sample grids of raw embeddings, one per noise address, independent of the batch.

        Args:
            vectors: conditions, one per address or one for all; zeros are the null condition.
            addresses: up to five integers each; noise of later steps adds the timestep.
            negative: replaces the null condition as u, so guidance > 1 leads away from it.

        Raises:
            UserError: vectors of another width than the model's, or neither 1 nor one each.
            ValueError: more steps than 999.
        """
        shape = (self.config.channels, *(settings.shape or (self.config.side, self.config.side)))
        x_t = normal(shape, seed, "prior", addresses).to(self.shift)
        vectors = self._each(vectors, len(x_t))
        u_vectors = self._each(
            torch.zeros_like(vectors) if negative is None else negative, len(x_t)
        )
        for step in self.schedule.steps(settings.steps):
            x_0 = self._guided(x_t, step.t, torch.cat([vectors, u_vectors]), settings.guidance)
            noise = None
            if settings.eta > 0:
                at_step = [(*address, step.t) for address in addresses]
                noise = normal(shape, seed, "prior walk", at_step).to(x_t)
            x_t = ddim(x_t, x_0, step, settings.eta, noise)
        grids: Tensor = x_t * self.scale + self.shift
        return grids

    def _guided(
        self, x_t: Float[Tensor, "B C h w"], t: int, vectors: Float[Tensor, "2*B V"], w: float
    ) -> Float[Tensor, "B C h w"]:
        """Return u + w (c - u), both in one batch; c if w = 1."""
        ts = torch.full((len(vectors),), t, device=x_t.device)
        if w == 1.0:
            c: Tensor = self(x_t, ts[: len(x_t)], vectors[: len(x_t)])
            return c
        c, u = self(torch.cat([x_t, x_t]), ts, vectors).chunk(2)
        return u + w * (c - u)

    def _each(self, vectors: Tensor, count: int) -> Tensor:
        """Return the vectors, one for each of `count` grids."""
        _check_width(vectors, self.config.vector)
        if len(vectors) not in (1, count):
            raise UserError(
                f"there are {len(vectors)} conditions for {count} grids; give one for each grid, "
                f"or one for all of them."
            )
        return vectors.to(self.shift).expand(count, -1)


def _spread(std: Tensor) -> Tensor:
    """Return standard deviations to divide by: 1 for constant channels."""
    return torch.where(std > 1e-6, std, torch.ones_like(std))


def _check_width(vectors: Tensor, width: int) -> None:
    if vectors.shape[1] != width:
        raise UserError(
            f"the condition has {vectors.shape[1]} features, the grid prior needs {width}; "
            f"give vectors of the kind that it was trained on."
        )
