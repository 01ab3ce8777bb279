"""The denoising U-Net: diffusers' `UNet2DConditionModel`, configured as in the papers.

Published: channels 192, 384, 576, 960, two layers per block, attention from the second level
down, one head, context 512 (400,920,579 parameters). `attention_head_dim` of diffusers means
the number of heads here. Source: ZoomLDM and Latent Diffusion (`cin256-v2`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers import UNet2DConditionModel
from jaxtyping import Float, Num
from torch import Tensor, nn

from raylarge.models import attention
from raylarge.models.attention import CachedContext


@dataclass(frozen=True)
class UNetConfig:
    """Size of the U-Net; the defaults are the published ones.

    Attributes:
        channels: width of each level, finest first.
        attention: whether each level attends to the context.
        layers: residual blocks per level.
        heads: attention heads at every level.
        groups: groups of every group norm; divides all channels.
    """

    channels: tuple[int, ...] = (192, 384, 576, 960)
    attention: tuple[bool, ...] = (False, True, True, True)
    layers: int = 2
    heads: int = 1
    groups: int = 32


class UNet(UNet2DConditionModel):
    """`UNet2DConditionModel` called as (x_t, t, context); its folder loads into diffusers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        attention.enable_cached_context(self)

    # diffusers reads the config's keys from the signature.
    __init__.__wrapped__ = UNet2DConditionModel.__init__  # type: ignore[attr-defined]

    def context(self, tokens: Float[Tensor, "B n D"]) -> CachedContext:
        """Return a context for many calls, with keys and values of the tokens computed once."""
        return attention.cached_context(self, tokens)

    def forward(
        self,
        x_t: Float[Tensor, "B c h w"],
        t: Num[Tensor, "..."] | int | float,
        context: Float[Tensor, "B n D"] | CachedContext,
        **residuals: Any,
    ) -> Float[Tensor, "B c2 h w"]:
        """Return the prediction: noise, v or x_0, as its schedule says.

        Args:
            t: timesteps, one per sample or one for all; fractions are allowed.
            context: conditioning tokens, or the result of `context`.
            residuals: of a ControlNet (`down_block_additional_residuals`, …).
        """
        output: Tensor = super().forward(
            x_t, t, encoder_hidden_states=context, return_dict=False, **residuals
        )[0]
        return output

    def features(
        self,
        x_t: Float[Tensor, "B c h w"],
        t: Num[Tensor, "..."] | int | float,
        context: Float[Tensor, "B n D"],
    ) -> tuple[Float[Tensor, "B c2 h w"], list[Float[Tensor, "B d h2 w2"]]]:
        """Return the prediction, and the outputs of the middle and each output block.

        The list is [middle, out 0, …] in the published numbering (`return_intermediates`): at
        full size the middle and out 0 to out 11, so out i has index i + 1.
        """
        outputs: list[Tensor] = []

        def append(_module: nn.Module, _inputs: Any, output: Any) -> None:
            outputs.append(output[0] if isinstance(output, tuple) else output)

        hooks = [block.register_forward_hook(append) for block in _output_blocks(self)]
        try:
            predicted = self(x_t, t, context)
        finally:
            for hook in hooks:
                hook.remove()
        return predicted, outputs


def _output_blocks(unet: UNet2DConditionModel) -> list[nn.Module]:
    """Return the modules whose outputs are those of the published middle and output blocks."""
    blocks = [unet.mid_block]
    for block in unet.up_blocks:
        last = block.resnets if not hasattr(block, "attentions") else block.attentions
        blocks += list(last[:-1])
        blocks.append(block.upsamplers[0] if block.upsamplers else last[-1])
    return blocks


def build(
    config: UNetConfig,
    latent: tuple[int, int, int],
    context: int,
    inputs: int = 0,
    depth: int = 1,
) -> UNet:
    """Build a U-Net with random weights.

    Args:
        config: its size.
        latent: channels, rows and columns of the prediction.
        context: width of the context tokens.
        inputs: channels of x_t; 0: those of the prediction.
        depth: transformer blocks in each attention module; 1 as published.
    """
    down = ["CrossAttnDownBlock2D" if on else "DownBlock2D" for on in config.attention]
    up = ["CrossAttnUpBlock2D" if on else "UpBlock2D" for on in reversed(config.attention)]
    return UNet(
        sample_size=latent[1],
        in_channels=inputs or latent[0],
        out_channels=latent[0],
        block_out_channels=tuple(config.channels),
        layers_per_block=config.layers,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        mid_block_type="UNetMidBlock2DCrossAttn",
        cross_attention_dim=context,
        attention_head_dim=config.heads,
        norm_num_groups=config.groups,
        transformer_layers_per_block=depth,
    )
