"""Settings of the tile encoder, and what of them decides the embeddings of a folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from raylarge import tables
from raylarge.data.pipeline import ActorConfig, without_actors
from raylarge.errors import UserError
from raylarge.models import ssl

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


@dataclass(frozen=True)
class EmbedConfig(ActorConfig):
    """Which encoder looks at the base tiles, and by what means."""

    encoder: str = "efficientnet_lite0"  # a card's name (models/ssl_cards.py)
    weights: str = ""  # file or folder of weights, on every node. Example: model.bin
    batch: int = 32  # tiles of one pass
    dtype: str = "float32"
    """The network's precision: float32, bfloat16 or float16."""


def section(config: EmbedConfig) -> dict[str, Any]:
    """What of the config the embeddings depend on: weights count by their content, not their path.

    Raises:
        UserError: an unknown encoder or precision, or weights that are missing.
    """
    if config.dtype not in DTYPES:
        raise UserError(f"embed.dtype={config.dtype}: choose one of {', '.join(DTYPES)}.")
    values = without_actors(config)
    digest = ssl.weights_digest(ssl.card(config.encoder), values.pop("weights"))
    return {**values, "weights": digest} if digest else values


def section_in(root: str, config: EmbedConfig) -> dict[str, Any]:
    """The section of the embeddings in a folder: imported ones tell their own.

    Raises:
        UserError: as `section`.
    """
    manifest = tables.read_manifest(root, "embed")
    stored = manifest["config"]["embed"] if manifest else {}
    return stored if "imported" in stored else section(config)
