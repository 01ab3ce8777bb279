"""Perceptual distances of images: LPIPS, and the distance of features of a small classifier.

    features of image and reference, normalised per cell -> (weighted) squared distance

LPIPS (Zhang et al. 2018, as in VQGAN and Latent Diffusion) needs the package `lpips` (extra
`eval`) and torchvision's VGG16, from a file or a download. `FeatureDistance` uses
EfficientNet-Lite0, whose weights come with a dependency.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from raylarge.errors import UserError
from raylarge.models import ssl, ssl_networks, state_dicts, weights

_STAGES = 3
"""Compared stages of EfficientNet-Lite0: 1/2, 1/4 and 1/8 of the image's side."""
SMALLEST = 16
"""Least side of an image in px: VGG16 halves it four times."""

_CURE = "give lpips_backbone=/path/to/vgg16-397923af.pth, torchvision's file"


class Perceptual(nn.Module):
    """LPIPS with fixed weights, in evaluation mode.

    Args:
        backbone: a file of torchvision's VGG16, whose classifier is ignored; by default
            torchvision's cache, or a download.

    Raises:
        UserError: no package, no weights, or those of another network.
    """

    def __init__(self, backbone: str = "") -> None:
        super().__init__()
        package = _package()
        state = weights.read_tensors(backbone) if backbone else _from_torchvision()
        with warnings.catch_warnings():  # the package calls torchvision by old names
            warnings.simplefilter("ignore", UserWarning)
            # Dropout stays (evaluation mode disables it): without it the package's weights would
            # have other names and be ignored silently.
            self.network = package.LPIPS(net="vgg", pnet_rand=True, verbose=False)
        features = {name: value for name, value in state.items() if name.startswith("features.")}
        expected = self.network.net.state_dict()  # slice3.10.weight is torchvision's features.10
        stored = {name: f"features.{name.split('.', 1)[1]}" for name in expected}
        by_stored_name = {stored[name]: value for name, value in expected.items()}
        weights.check_names(by_stored_name, features, "torchvision's VGG16")
        self.network.net.load_state_dict({name: features[stored[name]] for name in expected})
        self.eval().requires_grad_(False)

    def forward(
        self, image: Float[Tensor, "B 3 P P"], reference: Float[Tensor, "B 3 P P"]
    ) -> Float[Tensor, " B"]:
        """Return the distance of each pair of images in [-1, 1]; gradients reach both."""
        distance: Tensor = self.network(image, reference)
        return distance.float().flatten()


class FeatureDistance(nn.Module):
    """Squared distance of the first features of EfficientNet-Lite0.

        sum over stages of mean over cells of |f / |f| - g / |g||²

    LPIPS with all weights 1: early features of an ImageNet classifier respond to edges and
    textures that an L1 distance averages away.

    Raises:
        UserError: the package with the weights is missing.
    """

    def __init__(self) -> None:
        super().__init__()
        card = ssl.card("efficientnet_lite0")
        self.network: Any = ssl_networks.load_builtin(card)
        self.mean, self.deviation = card.colour
        self.eval().requires_grad_(False)

    def forward(
        self, image: Float[Tensor, "B 3 P P"], reference: Float[Tensor, "B 3 P P"]
    ) -> Float[Tensor, " B"]:
        """Return the distance of each pair of images in [-1, 1]; gradients reach `image`."""
        with torch.no_grad():
            target = self._features(reference)
        pairs = zip(self._features(image), target, strict=True)
        parts = [(a - b).square().sum(dim=1).flatten(1).mean(dim=1) for a, b in pairs]
        return torch.stack(parts).sum(dim=0)

    def _features(self, image: Float[Tensor, "B 3 P P"]) -> list[Tensor]:
        """Return features of unit length in every cell, stage by stage."""
        mean, deviation = (
            torch.tensor(values, device=image.device).reshape(3, 1, 1)
            for values in (self.mean, self.deviation)
        )
        x = ((image.float() + 1) / 2 - mean) / deviation
        stages = self.network.forward_intermediates(
            x, indices=list(range(_STAGES)), stop_early=True, intermediates_only=True
        )
        return [nn.functional.normalize(stage, dim=1, eps=1e-6) for stage in stages]


def _package() -> Any:
    try:
        return importlib.import_module("lpips")
    except ImportError as error:
        raise UserError(
            "LPIPS needs the package lpips: pip install 'raylarge[eval]', or leave lpips at 0."
        ) from error


def _from_torchvision() -> state_dicts.State:
    from torchvision.models import VGG16_Weights

    try:
        state = VGG16_Weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"the weights of VGG16 could not be loaded ({error}); {_CURE}.") from error
    return dict(state)
