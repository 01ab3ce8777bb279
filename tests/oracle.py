"""A bundle without weights: closed-form denoiser, exact autoencoder. Sampling becomes linear."""

import torch

from raylarge.diffusion.schedule import Schedule
from raylarge.geometry import Patch
from raylarge.models.bundle import Bundle
from raylarge.models.summarizer import ConvSummarizer

PATCH = Patch(side_px=32, factor=2, channels=12, scales=4)


class Unshuffle:
    """An orthogonal autoencoder: pixels regrouped, nothing lost."""

    def encode(self, image):
        return torch.nn.functional.pixel_unshuffle(image, 2)

    def decode(self, latent):
        return torch.nn.functional.pixel_shuffle(latent, 2)


def bundle(patch=PATCH):
    conditioner = ConvSummarizer(channels=4, width=4, scales=patch.scales)
    return Bundle(Unshuffle(), None, conditioner, None, Schedule(), patch, "oracle")
