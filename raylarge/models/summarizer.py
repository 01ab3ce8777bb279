"""The Summarizer: maps a grid of embeddings and a scale to 65 conditioning tokens.

    cells [B, 64, C] (n real, then zeros) -normalise-> -linear-> n of 64 slots, learned pads
    around them -prepend the scale's embedding-> transformer -> 65 tokens -> layer norm

Source: ZoomLDM, section 3.1 and supplement S3.1; the convolutional one is that of Table S3. The
null condition is zeros *after* the Summarizer. Names follow torchvision's ViT encoder, as those of
the published weights do.
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from jaxtyping import Float, Int
from torch import Tensor, nn

from raylarge.models.conditioner import SIDE, SLOTS, normalise, read_cells


class _Layer(nn.Module):
    """A pre-norm transformer layer with exact GELU (torchvision's EncoderBlock)."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=1e-6)
        self.self_attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.self_attention(normed, normed, normed, need_weights=False)[0]
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class Summarizer(ModelMixin, ConfigMixin):
    """ViT over up to 64 embeddings and a scale token; 12 layers of width 512 as published.

    Args:
        raw: inputs are raw embeddings, normalised here; the published module expects normalised
            ones.
        hidden: width inside the layers' MLPs; 0 is four times `width`.
    """

    @register_to_config
    def __init__(  # noqa: PLR0913 (diffusers keeps a constructor's parameters as the config)
        self,
        channels: int = 1024,
        width: int = 512,
        layers: int = 12,
        heads: int = 8,
        scales: int = 8,
        raw: bool = True,
        hidden: int = 0,
    ) -> None:
        super().__init__()
        hidden = hidden or 4 * width
        self.dim_reduce = nn.Linear(channels, width)
        self.pad_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mag_embedding = nn.Embedding(scales, width)
        self.pos_embedding = nn.Parameter(torch.randn(1, SLOTS + 1, width) * 0.02)
        self.encoder_layers = nn.ModuleList([_Layer(width, heads, hidden) for _ in range(layers)])
        self.ln = nn.LayerNorm(width, eps=1e-6)
        self.final_proj = nn.Linear(width, width)
        self.layer_norm = nn.LayerNorm(width, eps=1e-5)

    def forward(
        self,
        grid: Float[Tensor, "B ..."],
        scale: Int[Tensor, " B"],
        size: Int[Tensor, "B 2"] | None = None,
    ) -> Float[Tensor, "B 65 D"]:
        """Return context tokens of a batch of embedding grids.

        Args:
            grid: grids [B, C, h, w] of any shape (pooled where they have more than 64 cells),
                or cells [B, 64, C], row-major with zeros after the real ones.
            scale: scale index of each sample.
            size: rows and columns of each sample's cells.

        Raises:
            UserError: embeddings of another width, or an empty grid.
        """
        cells, size = read_cells(grid, size, self.config.channels)
        cells = normalise(cells) if self.config.raw else cells
        x = self._place(self.dim_reduce(cells.to(self.dim_reduce.weight)), size.prod(dim=-1))
        x = torch.cat([self.mag_embedding(scale)[:, None], x], dim=1) + self.pos_embedding
        for layer in self.encoder_layers:
            x = layer(x)
        tokens: Tensor = self.layer_norm(self.final_proj(self.ln(x)))
        return tokens

    def null(self, count: int) -> Float[Tensor, "B 65 D"]:
        """Return zeros, the published null condition."""
        return self.pad_token.new_zeros(count, SLOTS + 1, self.config.width)

    def _place(
        self, tokens: Float[Tensor, "B 64 D"], count: Int[Tensor, " B"]
    ) -> Float[Tensor, "B 64 D"]:
        """Centre the n real tokens among 64 slots, from slot 32 - n // 2; pads elsewhere."""
        slot = torch.arange(SLOTS, device=tokens.device)
        source = slot - (SLOTS // 2 - count // 2)[:, None]
        real = (source >= 0) & (source < count[:, None])
        index = source.clamp(0, SLOTS - 1)[..., None].expand_as(tokens)
        return torch.where(real[..., None], tokens.gather(1, index), self.pad_token)


class ConvSummarizer(ModelMixin, ConfigMixin):
    """Four convolutions over the grid, resized to 8 x 8 cells by nearest neighbour.

    The paper specifies "a simple 4-layer CNN" (Table S3). Here the scale is a token and a bias of
    the first layer, and the output has the Summarizer's shape.
    """

    @register_to_config
    def __init__(
        self, channels: int = 1024, width: int = 512, scales: int = 8, raw: bool = True
    ) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, width, 1)
        self.mixing = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1) for _ in range(3)])
        self.mag_embedding = nn.Embedding(scales, width)
        self.layer_norm = nn.LayerNorm(width, eps=1e-5)

    def forward(
        self,
        grid: Float[Tensor, "B ..."],
        scale: Int[Tensor, " B"],
        size: Int[Tensor, "B 2"] | None = None,
    ) -> Float[Tensor, "B 65 D"]:
        """Return context tokens; arguments and errors as of `Summarizer`."""
        cells, size = read_cells(grid, size, self.config.channels)
        cells = normalise(cells) if self.config.raw else cells
        magnitude = self.mag_embedding(scale)
        x = self.reduce(_spread(cells.to(self.reduce.weight), size)) + magnitude[..., None, None]
        for layer in self.mixing:
            x = layer(nn.functional.gelu(x))
        tokens: Tensor = torch.cat([magnitude[:, None], x.flatten(2).mT], dim=1)
        return self.layer_norm(tokens)

    def null(self, count: int) -> Float[Tensor, "B 65 D"]:
        """Return zeros, as `Summarizer` does."""
        return self.reduce.weight.new_zeros(count, SLOTS + 1, self.config.width)


def _spread(cells: Float[Tensor, "B 64 C"], size: Int[Tensor, "B 2"]) -> Float[Tensor, "B C 8 8"]:
    """Resize each grid to 8 x 8 by nearest neighbour: row i is row i h // 8 of the grid."""
    index = torch.arange(SIDE, device=cells.device)
    rows, columns = (index * size[:, axis, None] // SIDE for axis in (0, 1))
    source = (rows[:, :, None] * size[:, 1, None, None] + columns[:, None]).flatten(1)
    spread = cells.gather(1, source[..., None].expand(-1, -1, cells.shape[-1]))
    return spread.mT.unflatten(-1, (SIDE, SIDE))
