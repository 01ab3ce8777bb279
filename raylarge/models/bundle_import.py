"""Convert a published checkpoint to a bundle.

    weights.ckpt (1,750 tensors) [+ CDM]  ->  vae/ unet/ scheduler/ summarizer/ cdm/

Files are memory-mapped. Names and shapes of all parts are checked first, so that an error leaves
nothing behind; then the parts are written one by one, with little else in memory.
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
"""By embedding width and scales, the encoders of ZoomLDM's two published models."""


@dataclass(frozen=True)
class ImportConfig:
    """The files of an import, and facts that checkpoints do not contain.

    Attributes:
        checkpoint: of ZoomLDM or of Graikos et al. Example: weights.ckpt.
        cdm: checkpoint of the CDM, if there is one. Example: cdm.pt.
        out: folder or URL of the new bundle. Example: bundle.
        patch_px: side of the training images, px.
        encoder: card of the encoder of its embeddings; by default that of the published model of
            the same width. Example: uni.
        ema: import the averaged weights of the U-Net, as the published samplers do.
        heads: attention heads of the U-Net, the Summarizer and the CDM.
    """

    checkpoint: str = ""
    out: str = ""
    cdm: str = ""
    patch_px: int = 256
    encoder: str = ""
    ema: bool = True
    heads: tuple[int, int, int] = (1, 8, 12)


def import_bundle(config: ImportConfig) -> dict[str, int]:
    """Write the bundle after checking that all parts fit together.

    The same command completes an interrupted import; other bundles are not overwritten.

    Returns:
        Number of parameters of each part, with the CDM's fixed positions, as published.

    Raises:
        UserError: a file that cannot be opened or is another checkpoint, weights that are not
            finite, parts that do not fit together, or an existing bundle at `out`; nothing is
            written then.
    """
    if not (config.checkpoint.strip() and config.out.strip()):
        raise UserError("checkpoint= and out= are needed: the file, and the bundle to write.")
    state = weights.open_checkpoint(config.checkpoint)
    parts = _parts(state, config)
    schedule = published_schedule.schedule_from_published(state)
    _check_fit(parts, config.patch_px)
    facts = {"patch_px": config.patch_px, **_encoder_facts(config.encoder, parts["summarizer"])}
    facts["source"] = _source(config)
    _check_out(config.out, facts["source"])
    for checked in parts.values():
        weights.check_finite(checked.state, checked.whose)
    del state
    counts: dict[str, int] = {}
    for name in list(parts):
        part = parts.pop(name).load()
        bundle.save(config.out, {name: part}, facts, schedule)
        counts[name] = _size(part)
    return counts


def _parts(state: published.State, config: ImportConfig) -> dict[str, FittedNetwork[Any]]:
    """Return every part by name, with names and shapes of its tensors checked."""
    if published.has_embedder(state):
        conditioner: FittedNetwork[Any] = published.checked_embedder(state)
    else:
        conditioner = published.checked_summarizer(state, config.heads[1], raw=True)
    parts: dict[str, FittedNetwork[Any]] = {
        "vae": published.checked_autoencoder(state),
        "summarizer": conditioner,
        "unet": published.checked_unet(state, config.heads[0], config.ema),
    }
    if config.cdm:
        parts["cdm"] = published.checked_cdm(weights.open_checkpoint(config.cdm), config.heads[2])
    return parts


def _check_fit(parts: dict[str, FittedNetwork[Any]], patch_px: int) -> None:
    """Check that the sizes of the parts fit together.

    Raises:
        UserError: the first two sizes that differ.
    """
    vae, unet, conditioner = (parts[name].network for name in ("vae", "unet", "summarizer"))
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
    if "cdm" in parts:
        cdm = parts["cdm"].network.config
        pair = "the CDM and the conditioner"
        _agree(pair, "channels", (cdm.channels, width))
        _agree(pair, "tokens", (cdm.tokens, tokens))
        _agree(pair, "scales", (cdm.scales, scales))


def _agree(pair: str, unit: str, sizes: tuple[int, int]) -> None:
    if sizes[0] != sizes[1]:
        raise UserError(
            f"not supported: {pair} have {sizes[0]} and {sizes[1]} {unit}; give files of one model."
        )


def _check_out(out: str, source: dict[str, str]) -> None:
    """Check that there is no bundle at `out`, except an incomplete one of the same import.

    Raises:
        UserError: there is one.
    """
    if not bundle_parts.exists(out):
        return
    listed = bundle_parts.read_index(out)
    complete = all(
        name in listed for name in (*bundle.REQUIRED, *(["cdm"] if "cdm" in source else []))
    )
    if complete or bundle.facts(out).get("source") != source:
        raise UserError(f"there is a bundle at {out}; give another out= or remove it.")


def _encoder_facts(name: str, conditioner: FittedNetwork[Any]) -> dict[str, Any]:
    """Return the encoder's card and licence terms.

    Raises:
        UserError: the named encoder has embeddings of another width.
    """
    width, scales = conditioner.network.config.channels, conditioner.network.config.scales
    name = name or _ENCODERS.get((width, scales), "")
    if not name:
        return {}
    card = ssl.card(name)
    if card.width != width:
        raise UserError(
            f"encoder {name} has {card.width} channels, this checkpoint needs {width}; name the "
            f"encoder that it was trained with."
        )
    terms = {"encoder": card.licence, "weights": "as their authors state"}
    return {"encoder": card.as_json(), "licence": terms}


def _source(config: ImportConfig) -> dict[str, str]:
    """Return names and digests of the files, without their folders."""
    files = {"checkpoint": config.checkpoint, "cdm": config.cdm}
    return {
        key: f"{Path(path).name} sha256:{storage.digest_file(path)}"
        for key, path in files.items()
        if path
    }


def _size(part: nn.Module) -> int:
    """Return the number of parameters of a part, with the CDM's fixed positions."""
    positions = getattr(part, "pos_embed", torch.empty(0))
    return sum(parameter.numel() for parameter in part.parameters()) + positions.numel()
