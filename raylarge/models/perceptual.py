"""LPIPS, the perceptual distance of two images, by the package `lpips` (extra `eval`).

    VGG16's features of image and reference, normalised per cell -> weighted squared distance

Zhang et al. 2018, as in VQGAN and Latent Diffusion. The package brings the weights of the
distance; those of the backbone are torchvision's VGG16, from a file or from its hub.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from raylarge.errors import UserError
from raylarge.models import weights, wrappers

SMALLEST = 16
"""The least side of an image in px: VGG16 halves it four times."""

_CURE = "give lpips_backbone=/path/to/vgg16-397923af.pth, torchvision's file"


class Perceptual(nn.Module):
    """The distance, fixed and in evaluation mode.

    Args:
        backbone: a file of torchvision's VGG16 (its classifier is left out); empty: from
            torchvision's cache, which it fills by a download.

    Raises:
        UserError: no package, no weights, or those of another network.
    """

    def __init__(self, backbone: str = "") -> None:
        super().__init__()
        package = _package()
        found = weights.read(backbone) if backbone else _from_torchvision()
        with warnings.catch_warnings():  # the package calls torchvision by old names
            warnings.simplefilter("ignore", UserWarning)
            # With its dropout, which evaluation mode switches off: without it the package's
            # weights would have other names, and it would leave them out in silence.
            self.network = package.LPIPS(net="vgg", pnet_rand=True, verbose=False)
        features = {name: value for name, value in found.items() if name.startswith("features.")}
        wanted = self.network.net.state_dict()  # slice3.10.weight is torchvision's features.10
        stored = {name: f"features.{name.split('.', 1)[1]}" for name in wanted}
        named = {stored[name]: value for name, value in wanted.items()}
        weights.compare(named, features, "torchvision's VGG16")
        self.network.net.load_state_dict({name: features[stored[name]] for name in wanted})
        self.eval().requires_grad_(False)

    def forward(
        self, image: Float[Tensor, "B 3 P P"], reference: Float[Tensor, "B 3 P P"]
    ) -> Float[Tensor, "B"]:
        """The distance of each pair of images in [-1, 1]; derivatives reach both."""
        distance: Tensor = self.network(image, reference)
        return distance.float().flatten()


def _package() -> Any:
    try:
        return importlib.import_module("lpips")
    except ImportError as error:
        raise UserError(
            "LPIPS needs the package lpips: pip install 'raylarge[eval]', or leave lpips at 0."
        ) from error


def _from_torchvision() -> wrappers.State:
    from torchvision.models import VGG16_Weights

    try:
        state = VGG16_Weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"the weights of VGG16 could not be had ({error}); {_CURE}.") from error
    return dict(state)
