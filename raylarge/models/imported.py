"""A published checkpoint as a bundle: read once, each part written as soon as it is known.

    weights.ckpt (1,750 tensors) [+ CDM]  ->  vae/ unet/ scheduler/ summarizer/ cdm/

The file is mapped, not read: beside the part being written little is in memory. What a user
must know of the checkpoint and it does not say (patch side, encoder) is given or guessed here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING
from torch import nn

from raylarge import storage
from raylarge.diffusion.schedule import Schedule
from raylarge.errors import UserError
from raylarge.models import bundle, published, ssl, weights

_ENCODERS = {(1024, 8): "uni", (1024, 4): "dinov2_vitl14_reg"}
"""Embedding width and scales of ZoomLDM's two published models, and what embedded for them."""


@dataclass(frozen=True)
class Import:
    """Which files become which bundle.

    Attributes:
        checkpoint: of ZoomLDM or of Graikos et al.
        cdm: the CDM's own checkpoint, if there is one.
        out: the bundle, a folder or a URL.
        patch_px: side of the images that the model was trained on.
        encoder: card of the encoder that embedded for it; found by width where it is published.
        ema: take the U-Net's average, as the published samplers do.
        heads: attention heads of the U-Net, the Summarizer and the CDM, which no tensor tells.
    """

    checkpoint: str = MISSING
    out: str = MISSING
    cdm: str = ""
    patch_px: int = 256
    encoder: str = ""
    ema: bool = True
    heads: tuple[int, int, int] = (1, 8, 12)


def import_bundle(config: Import) -> dict[str, int]:
    """Write the bundle; a part that is there already is replaced.

    Returns:
        Parameters of each part, the CDM's fixed table of positions counted as published.

    Raises:
        UserError: a file that cannot be opened or is no such checkpoint; nothing of a part is
            written then.
    """
    state = weights.content(config.checkpoint)
    facts = {"patch_px": config.patch_px, "source": _source(config)}
    counts: dict[str, int] = {}

    def put(name: str, part: Any, schedule: Schedule | None = None) -> None:
        bundle.save(config.out, {name: part}, facts, schedule)
        counts[name] = _size(part)

    conditioner = _conditioner(state, config)
    facts |= _encoder_facts(config.encoder, conditioner)
    put("vae", published.autoencoder_from_published(state))
    put("summarizer", conditioner)
    unet = published.unet_from_published(state, config.heads[0], config.ema)
    put("unet", unet, published.schedule_from_published(state))
    if config.cdm:
        del state, unet  # the CDM's file may be as large
        cdm = published.cdm_from_published(weights.content(config.cdm), config.heads[2])
        put("cdm", cdm)
        counts["cdm"] += cdm.pos_embed.numel()
    return counts


def _conditioner(state: published.State, config: Import) -> Any:
    if published.has_embedder(state):
        return published.embedder_from_published(state)
    return published.summarizer_from_published(state, config.heads[1], raw=True)


def _encoder_facts(name: str, conditioner: Any) -> dict[str, Any]:
    """The encoder's card and the licence terms that come with it.

    Raises:
        UserError: the named encoder gives embeddings of another width.
    """
    width, scales = conditioner.config.channels, conditioner.config.scales
    name = name or _ENCODERS.get((width, scales), "")
    if not name:
        return {}
    card = ssl.card(name)
    if card.width != width:
        raise UserError(
            f"encoder {name} gives {card.width} channels, this checkpoint takes {width}; name the "
            f"encoder that it was trained with."
        )
    terms = {"encoder": card.licence, "weights": "as their authors state"}
    return {"encoder": card.as_json(), "licence": terms}


def _source(config: Import) -> dict[str, str]:
    """Names and digests of the files, without their folders."""
    named = {"checkpoint": config.checkpoint, "cdm": config.cdm}
    return {
        key: f"{Path(path).name} sha256:{storage.digest_file(path)}"
        for key, path in named.items()
        if path
    }


def _size(part: nn.Module) -> int:
    return sum(parameter.numel() for parameter in part.parameters())
