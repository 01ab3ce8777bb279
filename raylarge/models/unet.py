"""The denoising U-Net: diffusers' `UNet2DConditionModel`, configured as the papers' one.

Published: channels 192, 384, 576, 960, two layers per block, attention from the second level
down, one head, context 512 (400,920,579 parameters). `attention_head_dim` of diffusers means
the number of heads here.
"""

from __future__ import annotations

from dataclasses import dataclass

from diffusers import UNet2DConditionModel


@dataclass(frozen=True)
class UNetConfig:
    """Size of the U-Net; the defaults are the published ones.

    Attributes:
        channels: width of each level, finest first.
        attention: which levels attend to the context.
        layers: residual blocks per level.
        heads: attention heads at every level.
        groups: groups of every group norm; divides all channels.
    """

    channels: tuple[int, ...] = (192, 384, 576, 960)
    attention: tuple[bool, ...] = (False, True, True, True)
    layers: int = 2
    heads: int = 1
    groups: int = 32


def build(config: UNetConfig, latent: tuple[int, int, int], context: int) -> UNet2DConditionModel:
    """A U-Net with fresh weights, for latents (c, h, w) and context tokens of a width."""
    down = ["CrossAttnDownBlock2D" if on else "DownBlock2D" for on in config.attention]
    up = ["CrossAttnUpBlock2D" if on else "UpBlock2D" for on in reversed(config.attention)]
    return UNet2DConditionModel(
        sample_size=latent[1],
        in_channels=latent[0],
        out_channels=latent[0],
        block_out_channels=tuple(config.channels),
        layers_per_block=config.layers,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        mid_block_type="UNetMidBlock2DCrossAttn",
        cross_attention_dim=context,
        attention_head_dim=config.heads,
        norm_num_groups=config.groups,
    )
