"""Autoencoders: four networks, one class, one meaning of "latent".

    image [B, 3, P, P] in [-1, 1] -encode-> latent [B, c, P/f, P/f] -decode-> image (not clamped)

A latent is what the diffusion models see: scaled as the network's config says, and before
quantisation, which belongs to `decode`. The networks are diffusers' (`VQModel`,
`AutoencoderKL`, `AutoencoderTiny`) and the light trainable one; a bundle keeps them as they are.
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
    """What sampling and the data engine need of an autoencoder."""

    def encode(self, image: Float[Tensor, "B 3 P P"]) -> Float[Tensor, "B c p p"]:
        """The latent of an image in [-1, 1]."""
        ...

    def decode(self, latent: Float[Tensor, "B c p p"]) -> Float[Tensor, "B 3 P P"]:
        """The image of a latent (not clamped)."""
        ...


class Autoencoder(nn.Module):
    """Any of the networks as a deterministic codec.

    Of a KL network's posterior the mean is the latent. A VQ network quantises in `decode`,
    whatever its precision, by distances in float32; derivatives pass straight through. Inputs
    of another precision than the network's are cast, and the reply is cast back: a tiny network
    is best left in float32, since the derivative of its ReLUs in bfloat16 points elsewhere
    (cosine .96 on H&E, against .999 of the others).

    Raises:
        TypeError: another kind of network.
    """

    network: Any

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        if not isinstance(network, NETWORKS):
            known = ", ".join(kind.__name__ for kind in NETWORKS)
            raise TypeError(f"{type(network).__name__} is not one of {known}")
        self.network = network
        self.factor, self.channels = latent_sizes(type(network).__name__, dict(self.network.config))

    def encode(self, image: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B c h w"]:
        """The latent of an image in [-1, 1]; its sides are multiples of `factor`."""
        if isinstance(self.network, LightAutoencoder):
            return self.network.encode(image.to(self.network.dtype)).to(image.dtype)
        encoded = self.network.encode(image.to(self.network.dtype), return_dict=False)[0]
        if isinstance(self.network, AutoencoderKL):
            encoded = encoded.mode()
        scale, shift = self._affine()
        latent: Tensor = (encoded - shift) * scale
        return latent.to(image.dtype)

    def decode(self, latent: Float[Tensor, "B c h w"]) -> Float[Tensor, "B 3 H W"]:
        """The image of a latent, about in [-1, 1], not clamped."""
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
        """The nearest code of each cell of a VQ latent, and its index.

        The value is the code, the derivative that of the identity.

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
        """Scale and shift that the network's config puts between it and the latent."""
        if isinstance(self.network, VQModel):  # released code: scale 1.0, whatever the config says
            return 1.0, 0.0
        config: Any = self.network.config
        return config.scaling_factor or 1.0, config.shift_factor or 0.0


def latent_sizes(kind: str, config: dict[str, Any]) -> tuple[int, int]:
    """Pixels per latent cell along one side, and latent channels, of a network's config."""
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
    """Latent Diffusion's VQ-f4 (3 channels, 55,322,782 parameters) with fresh weights."""
    return vq((128, 256, 512), layers=2, codes=(codes, 3))


def vq(channels: tuple[int, ...], layers: int, codes: tuple[int, int], z: int = 3) -> VQModel:
    """A VQ autoencoder of Latent Diffusion's kind.

    Args:
        channels: width of each level, finest first.
        layers: residual blocks per level (one more in the decoder).
        codes: size of the codebook, and width of a code.
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
    """A KL autoencoder of Latent Diffusion's kind.

    Args:
        channels: width of each level, finest first.
        layers: residual blocks per level (one more in the decoder).
        latent: latent channels.
        scale: what the mean is multiplied by (0.18215 in Stable Diffusion).
    """
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=layers,
        latent_channels=latent,
        scaling_factor=scale,
    )
