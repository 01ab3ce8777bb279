"""Tile encoders: what turns a base tile into the raw embedding that conditions generation.

    uint8 [B, P, P, 3] -resize, standardise-> [B, 3, input_px, input_px] -net-> float16 [B, width]

One card per encoder says what it is and where it comes from (`ssl_cards.py`); `timm:ARCHITECTURE`
is a card for whatever timm can build. Embeddings are raw, as the network gives them; normalising
belongs to the model that reads them. Three members need no download: `efficientnet_lite0` is no
SSL encoder but an ImageNet-supervised stand-in for one, `toy` computes colour and gradient
statistics, and `none` is the absence of a condition.
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
    """A loaded encoder; deterministic for one batch size on one kind of hardware."""

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
        """Raw embeddings of a batch of tiles; blank tiles are tiles like any other."""
        one = self.card
        x = ssl_networks.to_inputs(images, one.input_px, one.colour, one.resample, self._device)
        with torch.inference_mode():
            raw = self._network(x.to(self._dtype))
        embeddings: np.ndarray = raw.float().cpu().numpy().astype(np.float16)
        return embeddings


def load(
    name: str, weights: str = "", device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Encoder:
    """The encoder of a card.

    Args:
        name: of the card, or `timm:ARCHITECTURE`.
        weights: a .safetensors, .pth, .pt or .bin file, or a folder that holds one; without it
            they come from the package or the hub that the card names.
        device: where the network runs.
        dtype: its precision; embeddings are float16 in any case.

    Raises:
        UserError: no card has that name, or its weights are missing, out of reach or others'.
    """
    return Encoder(card(name), weights, device, dtype)


def card(name: str) -> EncoderCard:
    """The card of a name.

    Raises:
        UserError: no card has that name.
    """
    if name.startswith("timm:"):
        return ssl_networks.timm_card(name.removeprefix("timm:"))
    if name not in CARDS:
        known = ", ".join(CARDS)
        raise UserError(f"there is no encoder '{name}'; choose one of: {known}, timm:ARCHITECTURE.")
    return CARDS[name]


def check_weights(card: EncoderCard, weights: str) -> None:
    """Refuse at once what could not be loaded later.

    Raises:
        UserError: weights that are not there, for a card that takes none, or of which it has no
            other source.
    """
    if weights and not card.files:
        raise UserError(f"encoder '{card.name}' takes no weights; leave embed.weights out.")
    if weights:
        hub.find_weights(weights, card.files)
    elif card.files and not card.hub:
        raise UserError(f"encoder '{card.name}' is on no hub: {_cure(card)}")


def weights_digest(card: EncoderCard, weights: str) -> str:
    """Return a short name for the weights that a user gives; empty where they come with the card.

    Where the file holds several copies of the network, the key of the one in use follows the
    digest: `0123456789abcdef state_dict_ema`.

    Raises:
        UserError: as `check_weights`.
    """
    check_weights(card, weights)
    if not weights:
        return ""
    path = hub.find_weights(weights, card.files)
    key = ""
    with suppress(UserError):  # `load` says what is wrong with the file
        key = ssl_networks.chosen_key(card, path)
    return f"{storage.digest_file(path)} {key}".rstrip()


def _cure(card: EncoderCard) -> str:
    have = f"get its weights from {card.where}" if card.where else "give its weights"
    if card.gated:
        have = f"it is gated: ask for access at {card.where} and log in with `hf auth login`"
    return f"{have}, or name a file that you have: embed.weights=/path/to/file."


def _network(
    card: EncoderCard, weights: str, device: str, dtype: torch.dtype
) -> tuple[Network, torch.dtype]:
    """The card's network and its precision: statistics without weights stay in float32."""
    check_weights(card, weights)
    if not card.files:
        network = ssl_networks.load_builtin(card)
        if isinstance(network, nn.Module):
            return network.to(device, dtype), dtype
        return network, torch.float32
    if weights:
        path = hub.find_weights(weights, card.files)
    else:
        told = f"encoder '{card.name}': {_cure(card)}"
        path = hub.fetch(card.hub, card.files, told)
    return ssl_networks.with_pooling(card, ssl_networks.load(card, path).to(device, dtype)), dtype
