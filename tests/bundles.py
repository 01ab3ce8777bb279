"""Small bundles with random networks of every kind."""

import torch
from diffusers import AutoencoderTiny

from raylarge.models import autoencoder, bundle, unet
from raylarge.models.embedder import VectorEmbedder
from raylarge.models.light_autoencoder import LightAutoencoder
from raylarge.models.summarizer import ConvSummarizer, Summarizer

WEIGHTS = "diffusion_pytorch_model.safetensors"


def networks():
    """One of each kind that can be the autoencoder."""
    torch.manual_seed(0)
    narrow = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
    return {
        "light": LightAutoencoder(width=8, blocks=1),
        "vq": autoencoder.vq((32, 32, 32), 1, (16, 3)),
        "kl": autoencoder.kl((32, 32, 32), 1, 3, 0.2),
        "tiny": AutoencoderTiny(
            **narrow, latent_channels=3, num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1)
        ),
    }


def conditioners():
    """One of each kind that can be the Summarizer, for 8-channel embeddings."""
    return {
        "vit": Summarizer(8, 16, 1, 2, 3),
        "cnn": ConvSummarizer(8, 16, 3),
        "vector": VectorEmbedder(8, 6, 16, 3),
    }


def small_unet():
    config = unet.UNetConfig((8, 16), (False, True), layers=1, heads=2, groups=4)
    return unet.build(config, (3, 8, 8), context=16)


def written(folder, vae="light", conditioner="vit", **more):
    parts = {"vae": networks()[vae], "unet": small_unet()}
    parts |= {"summarizer": conditioners()[conditioner]} | more
    bundle.save(str(folder), parts, {"patch_px": 32})
    return str(folder), parts


def other(network):
    """The same network with one weight moved."""
    with torch.no_grad():
        next(network.parameters()).add_(1)
    return network
