"""Tile encoders: map a base tile to the raw embedding that conditions generation.

    uint8 [B, P, P, 3] -resize, standardise-> [B, 3, input_px, input_px] -net-> float16 [B, width]

A card per encoder describes network and weights (`ssl_cards.py`); `timm:ARCHITECTURE` is a card for
any architecture of timm. Embeddings are raw; the models that read them normalise. Three encoders
need no download: `efficientnet_lite0` (ImageNet-supervised, a substitute for SSL encoders), `toy`
(colour and gradient statistics) and `none` (no condition).
"""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import torch
from jaxtyping import Float16, UInt8
from torch import nn

from raylarge import storage
from raylarge.errors import UserError
from raylarge.models import hub, ssl_networks
from raylarge.models.ssl_cards import CARDS, EncoderCard
from raylarge.models.ssl_networks import Network


class Encoder:
    """A loaded encoder; deterministic for one batch size on one type of hardware."""

    def __init__(
        self,
        card: EncoderCard,
        weights: str = "",
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Load the card's network; see `load`."""
        self.card = card
        self._network, self._dtype = _network(card, weights, device, dtype)
        self._device = device

    def __call__(self, images: UInt8[np.ndarray, "B P P 3"]) -> Float16[np.ndarray, "B width"]:
        """Return raw embeddings of a batch of tiles; blank tiles are no exception."""
        card = self.card
        x = ssl_networks.to_inputs(images, card.input_px, card.colour, card.resample, self._device)
        with torch.inference_mode():
            raw = self._network(x.to(self._dtype))
        embeddings: np.ndarray = raw.float().cpu().numpy().astype(np.float16)
        return embeddings


def load(
    name: str, weights: str = "", device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Encoder:
    """Load the encoder of a card.

    Args:
        name: of the card, or `timm:ARCHITECTURE`.
        weights: a .safetensors, .pth, .pt or .bin file, or a folder with one; by default those of
            the card's package or hub.
        device: of the network.
        dtype: of the network; embeddings are always float16.

    Raises:
        UserError: an unknown card, or weights that are missing, unreachable or of another network.
    """
    return Encoder(card(name), weights, device, dtype)


def card(name: str) -> EncoderCard:
    """Return the card of a name.

    Raises:
        UserError: an unknown name.
    """
    if name.startswith("timm:"):
        return ssl_networks.timm_card(name.removeprefix("timm:"))
    if name not in CARDS:
        names = ", ".join(CARDS)
        raise UserError(f"there is no encoder '{name}'; choose one of: {names}, timm:ARCHITECTURE.")
    return CARDS[name]


def check_weights(card: EncoderCard, weights: str) -> None:
    """Check, without loading, that there are weights for a card.

    Raises:
        UserError: weights that are missing, or given for a card that has its own.
    """
    if weights and not card.files:
        raise UserError(f"encoder '{card.name}' takes no weights; leave embed.weights out.")
    if weights:
        hub.find_weights(weights, card.files)
    elif card.files and not card.hub:
        raise UserError(f"encoder '{card.name}' is on no hub: {_cure(card)}")


def weights_digest(card: EncoderCard, weights: str) -> str:
    """Return the digest of a user's weight file; empty if the weights come with the card.

    If the file contains several copies of the network, the key of the one in use follows:
    `0123456789abcdef state_dict_ema`.

    Raises:
        UserError: as `check_weights`.
    """
    check_weights(card, weights)
    if not weights:
        return ""
    path = hub.find_weights(weights, card.files)
    key = ""
    with suppress(UserError):  # reported by `load`
        key = ssl_networks.chosen_key(card, path)
    return f"{storage.digest_file(path)} {key}".rstrip()


def _cure(card: EncoderCard) -> str:
    source = f"get its weights from {card.where}" if card.where else "give its weights"
    if card.gated:
        source = f"it is gated: ask for access at {card.where} and log in with `hf auth login`"
    return f"{source}, or name a file that you have: embed.weights=/path/to/file."


def _network(
    card: EncoderCard, weights: str, device: str, dtype: torch.dtype
) -> tuple[Network, torch.dtype]:
    """Return the card's network and its precision; functions without weights stay in float32."""
    check_weights(card, weights)
    if not card.files:
        network = ssl_networks.load_builtin(card)
        if isinstance(network, nn.Module):
            return network.to(device, dtype), dtype
        return network, torch.float32
    if weights:
        path = hub.find_weights(weights, card.files)
    else:
        path = hub.fetch(card.hub, card.files, f"encoder '{card.name}': {_cure(card)}")
    return ssl_networks.with_pooling(card, ssl_networks.load(card, path).to(device, dtype)), dtype
