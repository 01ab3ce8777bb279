"""A light trainable autoencoder (f4, 3 channels), whose convolutions all run at latent size.

    image [B, 3, P, P] -unshuffle 4-> [B, 48, P/4, P/4] -convs-> latent [B, 3, P/4, P/4]

Latents are standardised per channel, so that the diffusion models see unit variance. Images are
RGB in [-1, 1]. The layout follows the pixel-unshuffle front of ESPCN (Shi et al. 2016). Other
packages use it through `autoencoder.Autoencoder`.
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from jaxtyping import Float
from torch import Tensor, nn


class _Residual(nn.Module):
    """x + conv(silu(conv(silu(x)))), initially the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        silu = nn.functional.silu
        out: Tensor = x + self.second(silu(self.first(silu(x))))
        return out


class LightAutoencoder(ModelMixin, ConfigMixin):
    """Deterministic convolutional autoencoder; `shift` and `scale` standardise the latent."""

    @register_to_config
    def __init__(
        self, factor: int = 4, latent_channels: int = 3, width: int = 64, blocks: int = 3
    ) -> None:
        super().__init__()
        pixels = 3 * factor**2
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(factor),
            nn.Conv2d(pixels, width, 3, padding=1),
            *[_Residual(width) for _ in range(blocks)],
            nn.Conv2d(width, latent_channels, 3, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, width, 3, padding=1),
            *[_Residual(width) for _ in range(blocks)],
            nn.Conv2d(width, pixels, 3, padding=1),
            nn.PixelShuffle(factor),
        )
        self.register_buffer("shift", torch.zeros(1, latent_channels, 1, 1))
        self.register_buffer("scale", torch.ones(1, latent_channels, 1, 1))

    def encode(self, image: Float[Tensor, "B 3 P P"]) -> Float[Tensor, "B c p p"]:
        """Return the standardised latent of an image in [-1, 1]."""
        latent: Tensor = (self.encoder(image) - self.shift) / self.scale
        return latent

    def decode(self, latent: Float[Tensor, "B c p p"]) -> Float[Tensor, "B 3 P P"]:
        """Return the image of a standardised latent, not clamped."""
        image: Tensor = self.decoder(latent * self.scale + self.shift)
        return image

    def forward(self, image: Float[Tensor, "B 3 P P"]) -> Float[Tensor, "B 3 P P"]:
        """Return the reconstruction."""
        return self.decode(self.encode(image))

    @torch.no_grad()
    def standardise(self, images: Float[Tensor, "B 3 P P"]) -> None:
        """Set `shift` and `scale` so that the latents of these images have mean 0, std 1."""
        latent = self.encoder(images)
        self.shift.copy_(latent.mean(dim=(0, 2, 3), keepdim=True))
        self.scale.copy_(latent.std(dim=(0, 2, 3), keepdim=True))
