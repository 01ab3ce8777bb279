"""Task `ldm`: the U-Net and the Summarizer, jointly, on LATENTS of all scales.

Loss: L2 on the prediction (noise, as published, or v). With probability p the whole condition
becomes zeros, after the Summarizer. The U-Net is averaged, as published. Source: ZoomLDM
section 3.1, supplement S3.1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from raylarge.diffusion.loss import draws, per_sample
from raylarge.diffusion.schedule import Schedule
from raylarge.errors import UserError
from raylarge.models import bundle as bundles
from raylarge.models import published, weights
from raylarge.models import unet as unets
from raylarge.models.embedder import VectorEmbedder
from raylarge.models.summarizer import ConvSummarizer, Summarizer
from raylarge.models.unet import UNet, UNetConfig
from raylarge.train.task import Batch, Facts

if TYPE_CHECKING:
    from raylarge.train.launch import Train


@dataclass(frozen=True)
class SummarizerConfig:
    """What conditions the U-Net; the defaults are the published Summarizer.

    Attributes:
        kind: `vit` (ZoomLDM), `cnn` (its Table S3) or `vector` (Graikos et al.: one token).
        width: of the context tokens.
        layers: of the ViT.
        heads: of the ViT.
    """

    kind: str = "vit"
    width: int = 512
    layers: int = 12
    heads: int = 8


@dataclass(frozen=True)
class LdmConfig:
    """Sizes of the networks, and what they learn.

    Attributes:
        drop: share of samples whose condition is dropped.
        prediction: `epsilon` as published, or `v_prediction`, which samples well much sooner.
        init: a checkpoint of Latent Diffusion whose U-Net to start from; what it was
            conditioned on (ImageNet's classes) is left behind.
    """

    unet: UNetConfig = field(default_factory=UNetConfig)
    summarizer: SummarizerConfig = field(default_factory=SummarizerConfig)
    drop: float = 0.1
    prediction: str = "epsilon"
    init: str = ""


class _Network(nn.Module):
    """U-Net and Summarizer and their loss per sample."""

    def __init__(self, unet: nn.Module, summarizer: Any, config: LdmConfig, seed: int) -> None:
        super().__init__()
        self.unet, self.summarizer = unet, summarizer
        self.drop, self.seed = config.drop, seed
        self.schedule = Schedule(prediction=config.prediction)

    def forward(self, batch: Batch) -> Float[Tensor, "B"]:
        """The loss of each sample."""
        x_0, samples = batch["latent"], batch["sample"]
        size = torch.stack([batch["grid_rows"], batch["grid_columns"]], dim=1)
        tokens = self.summarizer(batch["grid"], batch["scale"], size)
        drawn = draws(samples, x_0.shape[1:], self.seed, "ldm", self.schedule.length)
        kept = (drawn.coin >= self.drop)[:, None, None]
        tokens = torch.where(kept, tokens, self.summarizer.null(len(tokens)))
        x_t = self.schedule.noised(x_0, drawn.eps, drawn.t)
        output = self.unet(x_t, drawn.t, tokens)
        return per_sample(output, self.schedule.target(x_0, drawn.eps, drawn.t))


class LdmTask:
    """Trains the latent diffusion model with its Summarizer."""

    name = "ldm"
    table = "latents"

    def __init__(self, config: LdmConfig, facts: Facts, seed: int) -> None:
        assert facts.latent is not None
        channels, rows, columns = facts.latent
        context = config.summarizer.width
        unet = unets.build(config.unet, (channels, rows, columns), context)
        if config.init:
            initialise(unet, config.init, config.unet.heads)
        summarizer = _conditioner(config.summarizer, facts)
        self.network = _Network(unet, summarizer, config, seed)
        self.averaged = unet
        licence = {"encoder": facts.encoder.get("licence", "unknown")}
        self.known = {"encoder": facts.encoder, "licence": licence, "base_mpp": facts.base_mpp}

    def finish(
        self,
        bundle: str,
        averaged: dict[str, Tensor] | None,
        facts: dict[str, Any],
        batch: Batch,
    ) -> None:
        """Write `unet/` (averaged) and `summarizer/`."""
        if averaged is not None:
            self.network.unet.load_state_dict(averaged)
        parts = {"unet": self.network.unet.cpu(), "summarizer": self.network.summarizer.cpu()}
        known = {"ldm": facts, **self.known}
        bundles.save(bundle, parts, known, self.network.schedule)


def initialise(unet: UNet, path: str, heads: int) -> None:
    """Start a U-Net from a published checkpoint's.

    Raises:
        UserError: no U-Net in the file, names missing or unknown, or another size.
    """
    found = published.unet_from_published(weights.content(path), heads).state_dict()
    weights.compare(unet.state_dict(), found, "a U-Net of the size in ldm.unet")
    unet.load_state_dict(found)


def _conditioner(config: SummarizerConfig, facts: Facts) -> nn.Module:
    """The network that makes context tokens of embeddings.

    Raises:
        UserError: no such kind.
    """
    known = {"channels": facts.channels, "width": config.width, "scales": max(facts.scales) + 1}
    if config.kind == "vit":
        return Summarizer(layers=config.layers, heads=config.heads, **known)
    if config.kind not in ("cnn", "vector"):
        raise UserError(f"ldm.summarizer.kind '{config.kind}' is not vit, cnn or vector.")
    return ConvSummarizer(**known) if config.kind == "cnn" else VectorEmbedder(**known)


def build(config: Train, facts: Facts) -> LdmTask:
    """The task, its weights drawn from the training's seed."""
    torch.manual_seed(config.seed)
    return LdmTask(config.ldm, facts, config.seed)
