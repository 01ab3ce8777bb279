"""The conditioning diffusion model (CDM): a diffusion transformer that draws Summarizer tokens.

It generates the tokens of a scale, so that sampling needs no real image: x_0-prediction on the
squared-cosine schedule, adaLN-zero blocks. Source: ZoomLDM, section 3.1 and S3.1; DiT (Peebles &
Xie 2023), whose parameter names are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

from raylarge.diffusion.noise import normal
from raylarge.diffusion.schedule import SamplerStep, Schedule
from raylarge.diffusion.steps import ddim
from raylarge.errors import UserError


def sinusoid(t: Num[Tensor, " B"], width: int, sine_first: bool) -> Float[Tensor, "B width"]:
    """Return a sinusoidal embedding with periods up to 10,000; DiT's positions put sines first."""
    half = width // 2
    exact = t if t.is_floating_point() else t.float()
    rates = torch.exp(-math.log(10000.0) * torch.arange(half).to(exact) / half)
    angles = exact[:, None] * rates
    waves = [angles.sin(), angles.cos()] if sine_first else [angles.cos(), angles.sin()]
    return torch.cat(waves, dim=1)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "B n D"]) -> Float[Tensor, "B n D"]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return out


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


class _AdaLNBlock(nn.Module):
    """A transformer block modulated by (timestep, scale); initially the identity."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = _Mlp(width, hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, 1)
        x = x + gate_a[:, None] * self.attn(_modulate(self.norm1(x), shift_a, scale_a))
        return x + gate_m[:, None] * self.mlp(_modulate(self.norm2(x), shift_m, scale_m))


class _Final(nn.Module):
    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, 1)
        out: Tensor = self.linear(_modulate(self.norm_final(x), shift, scale))
        return out


class CDM(ModelMixin, ConfigMixin):
    """Predicts clean tokens from noisy ones, a timestep and a scale (DiT-B as published).

    Args:
        channels: width of a token.
        learn_sigma: a second half of the output channels interpolates the logarithm of the
            variance, as published; only the training loss uses it.
        hidden: width inside the blocks' MLPs; 0 is four times `width`.
        standardised: work in units in which every value of a scale's tokens has mean 0 and
            deviation 1, set by `standardise`. Raw tokens, as published, may differ in variance
            between scales (18 times in a young model), and the largest dominates the loss.
    """

    @register_to_config
    def __init__(  # noqa: PLR0913 (diffusers keeps a constructor's parameters as the config)
        self,
        channels: int = 512,
        tokens: int = 65,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        scales: int = 8,
        learn_sigma: bool = True,
        hidden: int = 0,
        standardised: bool = False,
    ) -> None:
        super().__init__()
        self.x_embedder = nn.Linear(channels, width)
        positions = sinusoid(torch.arange(tokens).double(), width, sine_first=True)
        self.register_buffer("pos_embed", positions[None].float())
        self.t_embedder = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.y_embedder = nn.Embedding(scales, width)
        self.blocks = nn.ModuleList(
            [_AdaLNBlock(width, heads, hidden or 4 * width) for _ in range(depth)]
        )
        self.final_layer = _Final(width, channels * (2 if learn_sigma else 1))
        if standardised:
            self.register_buffer("shift", torch.zeros(scales, channels, tokens))
            self.register_buffer("spread", torch.ones(scales, channels, tokens))
        self.schedule = Schedule("squaredcos", prediction="sample")
        self._start_as_identity()

    def _start_as_identity(self) -> None:
        """Initialize every block and the output with zeros (adaLN-zero; DiT, section 3.2)."""
        for name, parameter in self.named_parameters():
            if "adaLN_modulation" in name or "final_layer.linear" in name:
                nn.init.zeros_(parameter)

    def forward(
        self, x_t: Float[Tensor, "B C n"], t: Int[Tensor, " B"], scale: Int[Tensor, " B"]
    ) -> Float[Tensor, "B C2 n"]:
        """Return the estimate of the clean tokens in the CDM's units; with `learn_sigma` C2 = 2 C.

        Raises:
            UserError: another number of tokens than `config.tokens`.
        """
        if x_t.shape[-1] != self.config.tokens:
            raise UserError(
                f"the CDM is for {self.config.tokens} tokens, but there are {x_t.shape[-1]}; "
                f"train it for the conditioner of its bundle (model=cdm)."
            )
        embedded = sinusoid(t, 256, sine_first=False).to(x_t)
        c = self.t_embedder(embedded) + self.y_embedder(scale)
        x = self.x_embedder(x_t.mT) + self.pos_embed
        for block in self.blocks:
            x = block(x, c)
        output: Tensor = self.final_layer(x, c).mT
        return output

    @torch.no_grad()
    def standardise(self, tokens: Float[Tensor, "B C n"], scale: Int[Tensor, " B"]) -> None:
        """Set the units of every scale of some raw tokens.

        The spread of a value is at least a hundredth of the scale's, so that values which hardly
        vary are not amplified.
        """
        for k in scale.unique().tolist():
            selected = tokens[scale == k]
            deviation = selected.std(dim=0, correction=0)
            least = deviation.square().mean().sqrt() / 100
            self.shift[k] = selected.mean(dim=0)
            self.spread[k] = deviation.clamp(min=least) if least > 0 else 1.0

    def to_standard(
        self, tokens: Float[Tensor, "B C n"], scale: Int[Tensor, " B"]
    ) -> Float[Tensor, "B C n"]:
        """Convert raw tokens to the units of `forward`."""
        if not self.config.standardised:
            return tokens
        units: Tensor = (tokens - self.shift[scale]) / self.spread[scale]
        return units

    def to_raw(
        self, tokens: Float[Tensor, "B C n"], scale: Int[Tensor, " B"]
    ) -> Float[Tensor, "B C n"]:
        """Convert tokens in the units of `forward` to raw ones."""
        if not self.config.standardised:
            return tokens
        raw: Tensor = tokens * self.spread[scale] + self.shift[scale]
        return raw

    @torch.no_grad()
    def denoise(
        self, x_t: Float[Tensor, "B C n"], steps: Sequence[SamplerStep], scale: int
    ) -> Float[Tensor, "B C n"]:
        """Return raw tokens from noise by DDIM (eta 0)."""
        scales = torch.full((len(x_t),), scale, device=x_t.device)
        for step in steps:
            x_0 = self(x_t, torch.full_like(scales, step.t), scales)[:, : x_t.shape[1]]
            x_t = ddim(x_t, x_0, step)
        return self.to_raw(x_t, scales)

    def draw(
        self, scale: int, seed: int, addresses: Sequence[Sequence[int]], recipe: str = "paper"
    ) -> Float[Tensor, "B n C"]:
        """Draw tokens of one scale, one sample per noise address.

        Args:
            recipe: `paper` (50 uniform DDIM steps, section S3.1) or `released` (200 steps of a
                respaced schedule), both without guidance: there is no null scale.

        Raises:
            UserError: another recipe.
        """
        if recipe not in RECIPES:
            raise UserError(f"there is no CDM recipe '{recipe}'; choose: {', '.join(RECIPES)}.")
        shape = (self.config.tokens, self.config.channels)
        noise = normal(shape, seed, "cdm", addresses).to(self.x_embedder.weight)
        return self.denoise(noise.mT, RECIPES[recipe](self.schedule), scale).mT


RECIPE_STEPS = {"paper": 50, "released": 200}
RECIPES: dict[str, Callable[[Schedule], list[SamplerStep]]] = {
    "paper": lambda schedule: schedule.steps(RECIPE_STEPS["paper"]),
    "released": lambda schedule: schedule.respaced(RECIPE_STEPS["released"]),
}
