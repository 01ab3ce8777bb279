"""The Summarizer: a grid of embeddings and a scale in, 65 conditioning tokens out.

    cells [B, 64, C] (n real, then zeros) -normalise-> -linear-> n of 64 slots, learned pads
    around them -prepend the scale's embedding-> transformer -> 65 tokens -> layer norm

Source: ZoomLDM, section 3.1 and supplement S3.1. The null condition is zeros *after* the
Summarizer. Names follow torchvision's ViT encoder, as the published weights do.
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from jaxtyping import Float, Int
from torch import Tensor, nn

SLOTS = 64
SIDE = 8


def pool(grid: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h2 w2"]:
    """A grid averaged down to at most 8 x 8 cells (adaptive average pooling, per axis)."""
    rows, columns = (min(side, SIDE) for side in grid.shape[-2:])
    return nn.functional.adaptive_avg_pool2d(grid, (rows, columns))


def cells_of(grid: Float[Tensor, "B C h w"]) -> tuple[Float[Tensor, "B 64 C"], Int[Tensor, "B"]]:
    """A batch of equal raw grids as padded cells, row by row, and how many cells are real."""
    cells = pool(grid).flatten(2).mT
    count = torch.full((len(cells),), cells.shape[1], device=cells.device)
    return nn.functional.pad(cells, (0, 0, 0, SLOTS - cells.shape[1])), count


def normalise(cells: Float[Tensor, "B n C"]) -> Float[Tensor, "B n C"]:
    """Each embedding to mean 0 and (unbiased) standard deviation 1 over its own channels."""
    mean, std = cells.mean(dim=-1, keepdim=True), cells.std(dim=-1, keepdim=True)
    return (cells - mean) / (std + 1e-8)


class _Layer(nn.Module):
    """A pre-norm transformer layer with exact GELU (torchvision's EncoderBlock)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=1e-6)
        self.self_attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.self_attention(normed, normed, normed, need_weights=False)[0]
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class Summarizer(ModelMixin, ConfigMixin):
    """ViT over up to 64 embeddings and a scale token; 12 layers of width 512 as published."""

    @register_to_config
    def __init__(
        self,
        channels: int = 1024,
        width: int = 512,
        layers: int = 12,
        heads: int = 8,
        scales: int = 8,
    ) -> None:
        super().__init__()
        self.dim_reduce = nn.Linear(channels, width)
        self.pad_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mag_embedding = nn.Embedding(scales, width)
        self.pos_embedding = nn.Parameter(torch.randn(1, SLOTS + 1, width) * 0.02)
        self.encoder_layers = nn.ModuleList([_Layer(width, heads) for _ in range(layers)])
        self.ln = nn.LayerNorm(width, eps=1e-6)
        self.final_proj = nn.Linear(width, width)
        self.layer_norm = nn.LayerNorm(width, eps=1e-5)

    def forward(
        self,
        cells: Float[Tensor, "B 64 C"],
        count: Int[Tensor, "B"],
        scale: Int[Tensor, "B"],
    ) -> Float[Tensor, "B 65 D"]:
        """Tokens of `count` raw embeddings per sample (row-major first, padding after).

        Args:
            cells: raw embeddings, at most 8 x 8 per sample (`cells_of` pools larger grids).
            count: how many of the 64 are real.
            scale: scale index of each sample.
        """
        x = self._place(self.dim_reduce(normalise(cells)), count)
        x = torch.cat([self.mag_embedding(scale)[:, None], x], dim=1) + self.pos_embedding
        for layer in self.encoder_layers:
            x = layer(x)
        tokens: Tensor = self.layer_norm(self.final_proj(self.ln(x)))
        return tokens

    def _place(
        self, tokens: Float[Tensor, "B 64 D"], count: Int[Tensor, "B"]
    ) -> Float[Tensor, "B 64 D"]:
        """Centre the n real tokens among 64 slots, from slot 32 - n // 2; pads elsewhere."""
        slot = torch.arange(SLOTS, device=tokens.device)
        source = slot - (SLOTS // 2 - count // 2)[:, None]
        real = (source >= 0) & (source < count[:, None])
        index = source.clamp(0, SLOTS - 1)[..., None].expand_as(tokens)
        return torch.where(real[..., None], tokens.gather(1, index), self.pad_token)
