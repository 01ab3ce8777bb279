"""Autoencoders: one interface to diffusers' `VQModel`, `AutoencoderKL`, `AutoencoderTiny` and ours.

    image [B, 3, P, P] in [-1, 1] -encode-> latent [B, c, P/f, P/f] -decode-> image (not clamped)

A latent is what the diffusion models see: scaled as the network's config says, and before
quantisation, which is part of `decode`.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel
from jaxtyping import Float, Int
from torch import Tensor, nn

from raylarge.models.light_autoencoder import LightAutoencoder

NETWORKS: tuple[type, ...] = (LightAutoencoder, VQModel, AutoencoderKL, AutoencoderTiny)


@runtime_checkable
class Codec(Protocol):
    """The methods of an autoencoder that sampling and the data engine use."""

    def encode(self, image: Float[Tensor, "B 3 P P"]) -> Float[Tensor, "B c p p"]:
        """Return the latent of an image in [-1, 1]."""
        ...

    def decode(self, latent: Float[Tensor, "B c p p"]) -> Float[Tensor, "B 3 P P"]:
        """Return the image of a latent, not clamped."""
        ...


class Autoencoder(nn.Module):
    """Any of `NETWORKS` as a deterministic codec.

    The latent of a KL network is the mean of its posterior. A VQ network quantises in `decode`, by
    distances in float32; gradients pass straight through. Inputs are cast to the precision of the
    network and results cast back. Keep a tiny network in float32: in bfloat16 the derivative of its
    ReLUs has a cosine of .96 to the exact one on H&E, against .999 of the others.

    Raises:
        TypeError: another kind of network.
    """

    network: Any

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        if not isinstance(network, NETWORKS):
            names = ", ".join(kind.__name__ for kind in NETWORKS)
            raise TypeError(f"{type(network).__name__} is not one of {names}")
        self.network = network
        self.factor, self.channels = latent_sizes(type(network).__name__, dict(self.network.config))

    def encode(self, image: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B c h w"]:
        """Return the latent of an image in [-1, 1]; its sides are multiples of `factor`."""
        if isinstance(self.network, LightAutoencoder):
            return self.network.encode(image.to(self.network.dtype)).to(image.dtype)
        encoded = self.network.encode(image.to(self.network.dtype), return_dict=False)[0]
        if isinstance(self.network, AutoencoderKL):
            encoded = encoded.mode()
        scale, shift = self._affine()
        latent: Tensor = (encoded - shift) * scale
        return latent.to(image.dtype)

    def decode(self, latent: Float[Tensor, "B c h w"]) -> Float[Tensor, "B 3 H W"]:
        """Return the image of a latent, about in [-1, 1], not clamped."""
        if isinstance(self.network, LightAutoencoder):
            return self.network.decode(latent.to(self.network.dtype)).to(latent.dtype)
        scale, shift = self._affine()
        latent = latent / scale + shift
        extra = {}
        if isinstance(self.network, VQModel):
            latent, extra = self.quantise(latent)[0], {"force_not_quantize": True}
        image: Tensor = self.network.decode(
            latent.to(self.network.dtype), return_dict=False, **extra
        )[0]
        return image.to(latent.dtype)

    def quantise(
        self, latent: Float[Tensor, "B c h w"]
    ) -> tuple[Float[Tensor, "B c h w"], Int[Tensor, "B h w"]]:
        """Return the nearest code of each cell of a VQ latent, and its index.

        The derivative is that of the identity (straight-through).

        Raises:
            TypeError: the network has no codebook.
        """
        if not isinstance(self.network, VQModel):
            raise TypeError(f"{type(self.network).__name__} has no codebook")
        codes = self.network.quantize.embedding.weight
        cells = latent.detach().movedim(1, -1)
        index = torch.cdist(cells.flatten(0, 2).float(), codes.float()).argmin(dim=1)
        index = index.view(cells.shape[:-1])
        nearest = nn.functional.embedding(index, codes).movedim(-1, 1)
        return latent + (nearest - latent).detach(), index

    def _affine(self) -> tuple[float, float]:
        """Return scale and shift of latents by the network's config."""
        if isinstance(self.network, VQModel):  # the released code ignores its config: 1.0
            return 1.0, 0.0
        config: Any = self.network.config
        return config.scaling_factor or 1.0, config.shift_factor or 0.0


def latent_sizes(kind: str, config: dict[str, Any]) -> tuple[int, int]:
    """Return pixels per latent cell along one side, and latent channels, by a network's config."""
    if kind == "LightAutoencoder":
        return config["factor"], config["latent_channels"]
    levels = config[
        "encoder_block_out_channels" if kind == "AutoencoderTiny" else "block_out_channels"
    ]
    channels = (config.get("vq_embed_dim") if kind == "VQModel" else None) or config[
        "latent_channels"
    ]
    return 2 ** (len(levels) - 1), channels


def vq_f4(codes: int = 8192) -> VQModel:
    """Build Latent Diffusion's VQ-f4 (3 channels, 55,322,782 parameters) with random weights."""
    return vq((128, 256, 512), layers=2, codes=(codes, 3))


def vq(channels: tuple[int, ...], layers: int, codes: tuple[int, int], z: int = 3) -> VQModel:
    """Build a VQ autoencoder of Latent Diffusion's architecture.

    Args:
        channels: width of each level, finest first.
        layers: residual blocks per level (one more in the decoder).
        codes: number and width of codes.
        z: channels between encoder and quantiser.
    """
    return VQModel(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=layers,
        latent_channels=z,
        num_vq_embeddings=codes[0],
        vq_embed_dim=codes[1],
        scaling_factor=1.0,
    )


def kl(channels: tuple[int, ...], layers: int, latent: int, scale: float) -> AutoencoderKL:
    """Build a KL autoencoder of Latent Diffusion's architecture; arguments as of `vq`.

    `scale` multiplies the mean (0.18215 in Stable Diffusion).
    """
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=layers,
        latent_channels=latent,
        scaling_factor=scale,
    )
