"""Bundles without training: tiny and full-size networks with random weights, and an oracle."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from raylarge.diffusion.schedule import Schedule
from raylarge.geometry import Patch
from raylarge.models import unet
from raylarge.models.autoencoder import Autoencoder, vq_f4
from raylarge.models.bundle import Bundle
from raylarge.models.cdm import CDM
from raylarge.models.light_autoencoder import LightAutoencoder
from raylarge.models.summarizer import ConvSummarizer, Summarizer
from raylarge.models.unet import UNetConfig

WIDTH = 8
"""Channels of the embeddings of `tiny`."""


class Blocks:
    """An orthogonal autoencoder without weights, of factor 4 and 3 channels like VQ-f4.

    A latent cell is four times the mean of its 4 x 4 pixels, and encode is decode's transpose.
    """

    def encode(self, image: Tensor) -> Tensor:
        """Return a quarter of the sum of each block."""
        return nn.functional.avg_pool2d(image, 4) * 4

    def decode(self, latent: Tensor) -> Tensor:
        """Return blocks of constant colour, a quarter of the cell."""
        return nn.functional.interpolate(latent / 4, scale_factor=4, mode="nearest")


def in_precision(bundle: Bundle, dtype: torch.dtype) -> Bundle:
    """Convert U-Net, autoencoder and conditioner of a bundle to a dtype, channels-last."""
    for part in (bundle.unet, bundle.vae, bundle.summarizer):
        nn.Module.to(part, dtype=dtype)
        nn.Module.to(part, memory_format=torch.channels_last)
    return bundle


def oracle(side_px: int = 256, scales: int = 8) -> Bundle:
    """Build a bundle without networks, for a closed-form denoiser, with the papers' sizes."""
    patch = Patch(side_px=side_px, factor=4, channels=3, scales=scales)
    conditioner = ConvSummarizer(channels=4, width=4, scales=scales)
    return Bundle(Blocks(), None, conditioner, None, Schedule(), patch, "oracle")


def tiny(scales: int = 5) -> Bundle:
    """Build networks of a few hundred thousand parameters for patches of 64 px, in float32."""
    torch.manual_seed(0)
    config = UNetConfig(channels=(32, 64), attention=(False, True), layers=1, heads=4)
    vae = LightAutoencoder(width=16, blocks=1)
    conditioner = Summarizer(channels=WIDTH, width=64, layers=1, heads=4, scales=scales)
    cdm = CDM(channels=64, width=64, depth=1, heads=4, scales=scales, learn_sigma=False)
    patch = Patch(side_px=64, factor=4, channels=3, scales=scales)
    return _bundle(unet.build(config, patch.latent, context=64), vae, conditioner, cdm, patch)


def full(device: str) -> Bundle:
    """Build the published U-Net, VQ-f4 and Summarizer with random weights, on a device."""
    torch.manual_seed(0)
    patch = Patch(side_px=256, factor=4, channels=3, scales=8)
    network = unet.build(UNetConfig(), patch.latent, 512)
    return _bundle(network, vq_f4(), Summarizer(), None, patch, device)


def _bundle(
    network: nn.Module,
    vae: nn.Module,
    conditioner: nn.Module,
    cdm: Any,
    patch: Patch,
    device: str = "cpu",
) -> Bundle:
    """Return the parts as a bundle, in evaluation mode."""
    codec = Autoencoder(vae)
    for part in filter(None, (network, codec, conditioner, cdm)):
        part.eval().requires_grad_(False).to(device)
    return Bundle(codec, network, conditioner, cdm, Schedule(), patch, "random", device)
