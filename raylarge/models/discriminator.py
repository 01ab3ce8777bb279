"""PatchGAN discriminator for the adversarial training of autoencoders, and its hinge loss.

    image [B, 3, P, P] -convs-> a score for each overlapping patch [B, 1, h, w]; high: real

Isola et al. 2017 (pix2pix), section 6.1.2, 70 × 70 px by default; hinge loss as in the code of
VQGAN (Esser et al. 2021). Unlike theirs, images are normalised one by one (GroupNorm): the loss
of a sample does not depend on the rest of its batch, and real and reconstructed images share one
pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from raylarge.errors import UserError

_GROUPS = 32
"""Groups of each normalisation (Wu & He 2018, section 4.1)."""


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Size of a discriminator, by default the published one.

    Attributes:
        width: channels of the first layer, a multiple of 16; doubled by each layer, up to
            eightfold.
        layers: number of layers that halve the sides.
    """

    width: int = 64
    layers: int = 3

    def check(self, side: int) -> None:
        """Check the sizes for images of a side in px.

        Raises:
            UserError: impossible sizes, or too many layers for the side.
        """
        if self.width < 1 or self.width % 16 or self.layers < 1 or side < 3 * 2**self.layers:
            raise UserError(
                f"a discriminator of width {self.width} and {self.layers} layers cannot judge "
                f"images of {side} px: give a width that 16 divides, and one layer or more, but "
                f"no more than leave 3 px of the {side}, halved by each."
            )


class Discriminator(nn.Module):
    """Convolutions of 4 px: `layers` of stride 2, one of stride 1, and one for the scores."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        widths = [config.width * min(2**i, 8) for i in range(config.layers + 1)]
        first = nn.Conv2d(3, config.width, 4, stride=2, padding=1)
        parts: list[nn.Module] = [first, nn.LeakyReLU(0.2)]
        for i, (before, after) in enumerate(pairwise(widths), start=1):
            stride = 2 if i < config.layers else 1
            convolution = nn.Conv2d(before, after, 4, stride, padding=1, bias=False)
            parts += [convolution, nn.GroupNorm(_GROUPS, after), nn.LeakyReLU(0.2)]
        self.network = nn.Sequential(*parts, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for part in self.network:
            if isinstance(part, nn.Conv2d):
                nn.init.normal_(part.weight, 0.0, 0.02)

    def forward(self, image: Float[Tensor, "B 3 P P"]) -> Float[Tensor, "B 1 h w"]:
        """Return the unbounded score of each patch."""
        scores: Tensor = self.network(image)
        return scores


def hinge_loss(
    real: Float[Tensor, "B 1 h w"], fake: Float[Tensor, "B 1 h w"]
) -> Float[Tensor, " B"]:
    """Return the discriminator's loss of each sample.

    ½ mean max(0, 1 - D(x)) + ½ mean max(0, 1 + D(x̂))
    """
    relu = nn.functional.relu
    of_real, of_fake = relu(1.0 - real.float()), relu(1.0 + fake.float())
    return 0.5 * (of_real.flatten(1).mean(dim=1) + of_fake.flatten(1).mean(dim=1))


def adversarial_loss(
    discriminator: nn.Module,
    image: Float[Tensor, "B 3 P P"],
    reconstruction: Float[Tensor, "B 3 P P"],
    weight: float,
) -> Float[Tensor, " B"]:
    """Return the terms of both networks in one loss, so that one optimizer updates both.

    weight · mean -D'(x̂)  +  hinge(D(x), D(x̂'))

    A prime means detached: the autoencoder learns from the first term only, the discriminator from
    the second only.

    Args:
        discriminator: D, not sharded.
        image: x.
        reconstruction: x̂.
        weight: of the first term; Adam makes the scale of the second irrelevant.
    """
    fixed = {name: value.detach() for name, value in discriminator.named_parameters()}
    score = functional_call(discriminator, fixed, (reconstruction,)).float().flatten(1).mean(dim=1)
    real, fake = discriminator(torch.cat([image, reconstruction.detach()])).chunk(2)
    return hinge_loss(real, fake) - weight * score
