"""The PatchGAN discriminator that an autoencoder may learn against, and its hinge loss.

    image [B, 3, P, P] -convs-> a score for each overlapping patch [B, 1, h, w]; high: real

Isola et al. 2017 (pix2pix), section 6.1.2, 70 × 70 px by default; hinge loss as in the code of
VQGAN (Esser et al. 2021). Where those normalise over the batch, here each image is by itself
(GroupNorm): a sample's loss then does not depend on its company, on the micro-batch or on the
worker, and the real and the made images of a step may share one pass.
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
"""Groups of channels that are normalised together (Wu & He 2018, section 4.1)."""


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Size of a discriminator, by default the published one.

    Attributes:
        width: channels of the first layer, a multiple of 16; they double with each layer, up
            to eightfold.
        layers: that halve the sides.
    """

    width: int = 64
    layers: int = 3

    def check(self, side: int) -> None:
        """Refuse sizes that cannot be, or that leave an image of a side in px no patch.

        Raises:
            UserError: such a size.
        """
        if self.width < 1 or self.width % 16 or self.layers < 1 or side < 3 * 2**self.layers:
            raise UserError(
                f"a discriminator of width {self.width} and {self.layers} layers cannot judge "
                f"images of {side} px: give a width that 16 divides, and one layer or more, but "
                f"no more than leave 3 px of the {side}, halved by each."
            )


class Discriminator(nn.Module):
    """Convolutions of 4 px: those that halve the sides, one more, and the scores."""

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
        """The score of each patch; no bound."""
        scores: Tensor = self.network(image)
        return scores


def hinge_loss(
    real: Float[Tensor, "B 1 h w"], made: Float[Tensor, "B 1 h w"]
) -> Float[Tensor, "B"]:
    """The discriminator's loss of each sample.

    ½ mean max(0, 1 - D(x)) + ½ mean max(0, 1 + D(x̂))
    """
    lacks = nn.functional.relu(1.0 - real.float()), nn.functional.relu(1.0 + made.float())
    return 0.5 * (lacks[0].flatten(1).mean(dim=1) + lacks[1].flatten(1).mean(dim=1))


def adversarial_loss(
    discriminator: nn.Module,
    image: Float[Tensor, "B 3 P P"],
    made: Float[Tensor, "B 3 P P"],
    weight: float,
) -> Float[Tensor, "B"]:
    """Both networks' terms in one loss, so that one optimiser does for both.

    weight · mean -D'(x̂)  +  hinge(D(x), D(x̂'))

    A dash means detached: what made x̂ learns from the first term alone, and the discriminator
    from the second alone.

    Args:
        discriminator: D, all of its parameters at hand (not sharded).
        image: x.
        made: x̂, of the same image.
        weight: of the first term; Adam makes the discriminator's own scale irrelevant.
    """
    fixed = {name: value.detach() for name, value in discriminator.named_parameters()}
    fooled = functional_call(discriminator, fixed, (made,)).float().flatten(1).mean(dim=1)
    real, told = discriminator(torch.cat([image, made.detach()])).chunk(2)
    return hinge_loss(real, told) - weight * fooled
