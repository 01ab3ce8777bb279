"""Conditioning of Graikos et al.: one embedding per patch, optionally one of its region.

    e / |e|_2 -linear-> 1 token          patch and region: 2 tokens

The null condition is a *zero embedding* through the same linear layers: their biases, not zeros
as in ZoomLDM. Source: Graikos et al., section 3.1 and supplement section 14; parameter
names are the published ones. Any encoder of `ssl` fits (their Table 7 compares four).
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from jaxtyping import Float, Int
from torch import Tensor, nn

from raylarge.models.conditioner import SLOTS, read_cells


class VectorEmbedder(ModelMixin, ConfigMixin):
    """Maps embeddings to 1 token, or to 2 if `region` is the width of a region's embedding."""

    @register_to_config
    def __init__(
        self, channels: int = 768, region: int = 0, width: int = 512, scales: int = 1
    ) -> None:
        super().__init__()
        self.patch_fc = nn.Linear(channels, width)
        self.region_fc = nn.Linear(region, width) if region else None

    def forward(
        self,
        grid: Float[Tensor, "B ..."],
        scale: Int[Tensor, " B"],
        size: Int[Tensor, "B 2"] | None = None,
        region: Float[Tensor, "B R"] | None = None,
    ) -> Float[Tensor, "B n D"]:
        """Return context tokens of a batch of patches.

        Args:
            grid: embeddings [B, C, h, w] or cells [B, 64, C]; those of one patch are averaged.
            scale: unused; these models have one scale.
            size: rows and columns of each sample's cells.
            region: embeddings of the regions; zeros by default, as at published inference.

        Raises:
            UserError: embeddings of another width, or an empty grid.
        """
        cells, size = read_cells(grid, size, self.config.channels)
        real = torch.arange(SLOTS, device=cells.device) < size.prod(dim=-1)[:, None]
        mean = (cells * real[..., None]).sum(dim=1) / real.sum(dim=1, keepdim=True)
        weight = self.patch_fc.weight
        tokens = [self.patch_fc(nn.functional.normalize(mean, dim=-1).to(weight))]
        if self.region_fc is not None:
            region = mean.new_zeros(len(mean), self.config.region) if region is None else region
            tokens.append(self.region_fc(nn.functional.normalize(region, dim=-1).to(weight)))
        return torch.stack(tokens, dim=1)

    def null(self, count: int) -> Float[Tensor, "B n D"]:
        """Return the tokens of zero embeddings: the biases."""
        layers = [self.patch_fc] if self.region_fc is None else [self.patch_fc, self.region_fc]
        return torch.stack([layer.bias for layer in layers]).expand(count, -1, -1)
