"""Task `vae`: the light autoencoder on EXAMPLES of all scales.

Loss: L1 on pixels plus L1 on their first differences, which keeps nuclei and fibres sharp.
Samples are mirrored at random. At the end the latents are standardised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from raylarge.diffusion.noise import generator
from raylarge.models import bundle as bundles
from raylarge.models.light import LightAutoencoder
from raylarge.train.task import Batch, Facts

if TYPE_CHECKING:
    from raylarge.train.launch import Train


@dataclass(frozen=True)
class VaeConfig:
    """Size of the autoencoder and weight of its gradient loss."""

    factor: int = 4
    latent_channels: int = 3
    width: int = 64
    blocks: int = 3
    gradient: float = 0.5


class _Network(nn.Module):
    """The autoencoder and its loss per sample."""

    def __init__(self, vae: LightAutoencoder, gradient: float, seed: int) -> None:
        super().__init__()
        self.vae, self.gradient, self.seed = vae, gradient, seed

    def forward(self, batch: Batch) -> Float[Tensor, "B"]:
        """The loss of each sample."""
        image = _mirrored(batch["image"], batch["sample"], self.seed)
        error = self.vae(image) - image
        loss = error.abs().flatten(1).mean(dim=1)
        for axis in (2, 3):
            loss = loss + self.gradient * error.diff(dim=axis).abs().flatten(1).mean(dim=1)
        return loss.float()


class VaeTask:
    """Trains the light autoencoder."""

    name = "vae"
    table = "examples"
    averaged = None

    def __init__(self, config: VaeConfig, seed: int, patch_px: int) -> None:
        self.config, self.patch_px = config, patch_px
        size = {k: v for k, v in vars(config).items() if k != "gradient"}
        self.network = _Network(LightAutoencoder(**size), config.gradient, seed)

    def finish(
        self,
        bundle: str,
        averaged: dict[str, Tensor] | None,
        facts: dict[str, Any],
        batch: Batch,
    ) -> None:
        """Standardise the latents on a batch of training images; write `vae/`."""
        vae = self.network.vae.cpu()
        vae.standardise(batch["image"])
        bundles.save(bundle, {"vae": vae}, {"patch_px": self.patch_px, "vae": facts})


def build(config: Train, facts: Facts) -> VaeTask:
    """The task, its weights drawn from the training's seed."""
    assert facts.image is not None
    torch.manual_seed(config.seed)
    return VaeTask(config.vae, config.seed, facts.image[-1])


def _mirrored(image: Tensor, samples: Tensor, seed: int) -> Tensor:
    """Each image flipped along rows, columns, both or neither, by its sample's address."""
    flips = [
        generator(seed, "flip", sample >> 32, sample & 0xFFFFFFFF).random(2) < 0.5
        for sample in samples.tolist()
    ]
    mirrored = [
        single.flip([axis + 1 for axis in (0, 1) if flip[axis]])
        for single, flip in zip(image, flips, strict=True)
    ]
    return torch.stack(mirrored)
