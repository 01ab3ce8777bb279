"""A published checkpoint as a bundle: checked as a whole, then written part by part.

    weights.ckpt (1,750 tensors) [+ CDM]  ->  vae/ unet/ scheduler/ summarizer/ cdm/

The files are mapped, not read: names and shapes of all parts are fitted to each other first, so
that a refusal leaves nothing behind; then beside the part being written little is in memory.
What a user must know of the checkpoint and it does not say is given or guessed here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raylarge import storage
from raylarge.errors import UserError
from raylarge.models import bundle, bundle_parts, published, published_schedule, ssl, weights
from raylarge.models.autoencoder import Autoencoder
from raylarge.models.weights import FittedNetwork

_ENCODERS = {(1024, 8): "uni", (1024, 4): "dinov2_vitl14_reg"}
"""Embedding width and scales of ZoomLDM's two published models, and what embedded for them."""


@dataclass(frozen=True)
class ImportConfig:
    """Which files become which bundle.

    Attributes:
        checkpoint: of ZoomLDM or of Graikos et al. Example: weights.ckpt.
        cdm: the CDM's own checkpoint, if there is one. Example: cdm.pt.
        out: the bundle, a folder or a URL, where there is none yet. Example: bundle.
        patch_px: side of the images that the model was trained on.
        encoder: card of the encoder that embedded for it; found by width where it is published.
            Example: uni.
        ema: take the U-Net's average, as the published samplers do.
        heads: attention heads of the U-Net, the Summarizer and the CDM, which no tensor tells.
    """

    checkpoint: str = ""
    out: str = ""
    cdm: str = ""
    patch_px: int = 256
    encoder: str = ""
    ema: bool = True
    heads: tuple[int, int, int] = (1, 8, 12)


def import_bundle(config: ImportConfig) -> dict[str, int]:
    """Write the bundle, once every part is known to fit the others.

    An import that was killed while it wrote is finished by the same command; no other bundle is
    written over.

    Returns:
        Parameters of each part, the CDM's fixed table of positions counted as published.

    Raises:
        UserError: a file that cannot be opened or is no such checkpoint, weights that are not
            finite, parts that do not fit each other, or a bundle at `out` already; nothing is
            written then.
    """
    if not (config.checkpoint.strip() and config.out.strip()):
        raise UserError("checkpoint= and out= are needed: the file, and the bundle to write.")
    state = weights.open_checkpoint(config.checkpoint)
    found = _parts(state, config)
    schedule = published_schedule.schedule_from_published(state)
    _check_fit(found, config.patch_px)
    facts = {"patch_px": config.patch_px, **_encoder_facts(config.encoder, found["summarizer"])}
    facts["source"] = _source(config)
    _check_place(config.out, facts["source"])
    for checked in found.values():
        weights.check_finite(checked.state, checked.whose)
    del state
    counts: dict[str, int] = {}
    for name in list(found):
        part = found.pop(name).load()
        bundle.save(config.out, {name: part}, facts, schedule)
        counts[name] = _size(part)
    return counts


def _parts(state: published.State, config: ImportConfig) -> dict[str, FittedNetwork[Any]]:
    """Every part by name, its tensors named and shaped as they must be."""
    if published.has_embedder(state):
        conditioner: FittedNetwork[Any] = published.checked_embedder(state)
    else:
        conditioner = published.checked_summarizer(state, config.heads[1], raw=True)
    found: dict[str, FittedNetwork[Any]] = {
        "vae": published.checked_autoencoder(state),
        "summarizer": conditioner,
        "unet": published.checked_unet(state, config.heads[0], config.ema),
    }
    if config.cdm:
        found["cdm"] = published.checked_cdm(weights.open_checkpoint(config.cdm), config.heads[2])
    return found


def _check_fit(found: dict[str, FittedNetwork[Any]], patch_px: int) -> None:
    """Refuse parts that cannot work together.

    Raises:
        UserError: saying what each of two parts has.
    """
    vae, unet, conditioner = (found[name].network for name in ("vae", "unet", "summarizer"))
    codec = Autoencoder(vae)
    if patch_px < 1 or patch_px % codec.factor:
        raise UserError(f"patch_px={patch_px} is not a positive multiple of {codec.factor}.")
    tokens, width = conditioner.null(1).shape[1:]
    scales = conditioner.config.scales
    images = {vae.config.in_channels, vae.config.out_channels} - {3}
    if images:
        raise UserError(f"not supported: images of {images.pop()} channels; a bundle's have 3.")
    latents = "the U-Net's {} and the autoencoder's latents"
    _agree(latents.format("inputs"), "channels", (unet.config.in_channels, codec.channels))
    _agree(latents.format("outputs"), "channels", (unet.config.out_channels, codec.channels))
    context = unet.config.cross_attention_dim
    _agree("the U-Net's context and the conditioner's tokens", "channels", (context, width))
    if "cdm" in found:
        cdm = found["cdm"].network.config
        pair = "the CDM and the conditioner"
        _agree(pair, "channels", (cdm.channels, width))
        _agree(pair, "tokens", (cdm.tokens, tokens))
        _agree(pair, "scales", (cdm.scales, scales))


def _agree(what: str, unit: str, sizes: tuple[int, int]) -> None:
    if sizes[0] != sizes[1]:
        raise UserError(
            f"not supported: {what} have {sizes[0]} and {sizes[1]} {unit}; give files of one model."
        )


def _check_place(out: str, source: dict[str, str]) -> None:
    """Refuse to write over a bundle, other than one that the same import has begun.

    Raises:
        UserError: saying where it is.
    """
    if not bundle_parts.exists(out):
        return
    listed = bundle_parts.read_index(out)
    whole = all(
        name in listed for name in (*bundle.REQUIRED, *(["cdm"] if "cdm" in source else []))
    )
    if whole or bundle.facts(out).get("source") != source:
        raise UserError(f"there is a bundle at {out}; give another out= or remove it.")


def _encoder_facts(name: str, conditioner: FittedNetwork[Any]) -> dict[str, Any]:
    """The encoder's card and the licence terms that come with it.

    Raises:
        UserError: the named encoder gives embeddings of another width.
    """
    width, scales = conditioner.network.config.channels, conditioner.network.config.scales
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


def _source(config: ImportConfig) -> dict[str, str]:
    """Names and digests of the files, without their folders."""
    named = {"checkpoint": config.checkpoint, "cdm": config.cdm}
    return {
        key: f"{Path(path).name} sha256:{storage.digest_file(path)}"
        for key, path in named.items()
        if path
    }


def _size(part: nn.Module) -> int:
    """Parameters of a part, with a CDM's table of positions, which is none of them."""
    positions = getattr(part, "pos_embed", torch.empty(0))
    return sum(parameter.numel() for parameter in part.parameters()) + positions.numel()
