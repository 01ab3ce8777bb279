"""Task `ldm`: the U-Net and the Summarizer, jointly, on LATENTS of all scales.

Loss: L2 on the prediction (noise, as published, or v). With probability p the whole condition
becomes the null condition, after the Summarizer. The U-Net is averaged, as published. Source:
ZoomLDM section 3.1, supplement S3.1. For Graikos et al.'s two tokens the vectors of a VECTORS
table are the embeddings of the patches' regions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from raylarge.config import format_value, require
from raylarge.diffusion.loss import min_snr_weights, mse_per_sample, training_draws
from raylarge.diffusion.schedule import PREDICTIONS, Schedule
from raylarge.errors import UserError
from raylarge.models import bundle as bundles
from raylarge.models import published, weights
from raylarge.models import unet as unets
from raylarge.models.embedder import VectorEmbedder
from raylarge.models.summarizer import ConvSummarizer, Summarizer
from raylarge.models.unet import UNet, UNetConfig
from raylarge.train.ingest import Ingest, latents_table
from raylarge.train.monitor.sample_grid import Painter, ldm_sheet
from raylarge.train.task import Batch, DataFacts, Run

KINDS = ("vit", "cnn", "vector")


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
        stratified: spread the timesteps of a batch evenly; by chance, as published, otherwise.
        min_snr: gamma of the min-SNR weights; 0: every timestep weighs the same, as published.
        prediction: `epsilon` as published, or `v_prediction`, which samples well much sooner.
        region: a table `vectors-<digest>` with the embedding of each patch's region, which
            becomes a second token (kind `vector`); empty: patches alone. Example: vectors-0123abcd.
        average_summarizer: average the Summarizer, too.
        init: a checkpoint of Latent Diffusion whose U-Net to start from; what it was
            conditioned on (ImageNet's classes) is left behind. Example: model.ckpt.
    """

    unet: UNetConfig = field(default_factory=UNetConfig)
    summarizer: SummarizerConfig = field(default_factory=SummarizerConfig)
    drop: float = 0.1
    stratified: bool = False
    min_snr: float = 0.0
    prediction: str = "epsilon"
    region: str = ""
    average_summarizer: bool = False
    init: str = ""

    def check(self) -> None:
        """Refuse values that no network can be made of.

        Raises:
            UserError: naming the key, its value and what it may be.
        """
        tokens, vector = self.summarizer, self.summarizer.kind == "vector"
        divides = tokens.kind != "vit" or _divides(tokens.heads, [tokens.width])
        table = vector and self.region.startswith("vectors-")
        rules = (
            ("prediction", self.prediction, self.prediction in PREDICTIONS, _any(PREDICTIONS)),
            ("drop", self.drop, 0 <= self.drop <= 1, "0 to 1"),
            ("min_snr", self.min_snr, self.min_snr >= 0, "0 or more"),
            ("summarizer.kind", tokens.kind, tokens.kind in KINDS, _any(KINDS)),
            ("summarizer.width", tokens.width, tokens.width >= 1, "1 or more"),
            ("summarizer.layers", tokens.layers, tokens.layers >= 1, "1 or more"),
            ("summarizer.heads", tokens.heads, divides, f"a divisor of the width {tokens.width}"),
            (
                "region",
                self.region,
                not self.region or table,
                "a table vectors-DIGEST, for ldm.summarizer.kind=vector alone",
            ),
        )
        require(*((f"ldm.{key}", *rest) for key, *rest in rules))
        _check_unet(self.unet)


def _check_unet(config: UNetConfig) -> None:
    """Raises UserError: sizes that no U-Net has."""
    channels = config.channels
    on = {c for c, attends in zip(channels, config.attention, strict=False) if attends}
    attending = sorted(on.union(channels[-1:]))  # the middle has the last level's
    widths, groups = format_value(channels), config.groups
    rules = (
        ("channels", channels, min(channels, default=0) >= 1, "one or more widths above 0"),
        (
            "attention",
            config.attention,
            len(config.attention) == len(channels),
            f"one of true and false for each of channels={widths}",
        ),
        ("layers", config.layers, config.layers >= 1, "1 or more"),
        ("groups", groups, _divides(groups, channels), f"a divisor of all of channels={widths}"),
        (
            "heads",
            config.heads,
            _divides(config.heads, attending),
            f"a divisor of the channels {format_value(attending)} that attend",
        ),
    )
    require(*((f"ldm.unet.{key}", *rest) for key, *rest in rules))


def _divides(count: int, widths: Iterable[int]) -> bool:
    return count >= 1 and not any(width % count for width in widths)


def _any(choices: Sequence[str]) -> str:
    return f"{', '.join(choices[:-1])} or {choices[-1]}"


class LdmLoss(nn.Module):
    """U-Net and Summarizer and their loss per sample."""

    def __init__(self, unet: nn.Module, summarizer: Any, config: LdmConfig) -> None:
        super().__init__()
        self.unet, self.summarizer, self.drop = unet, summarizer, config.drop
        self.schedule = Schedule(prediction=config.prediction)
        self.min_snr = config.min_snr

    def forward(self, batch: Batch) -> Float[Tensor, " B"]:
        """The loss of each sample."""
        x_0, eps, t = batch["latent"], batch["eps"], batch["t"]
        tokens = condition(self.summarizer, batch)
        kept = (batch["coin"] >= self.drop)[:, None, None]
        tokens = torch.where(kept, tokens, self.summarizer.null(len(tokens)))
        output = self.unet(self.schedule.noised(x_0, eps, t), t, tokens)
        loss = mse_per_sample(output, self.schedule.target(x_0, eps, t))
        if self.min_snr and torch.is_grad_enabled():  # held-out losses stay comparable
            loss = loss * min_snr_weights(self.schedule, t, self.min_snr)
        return loss


class LdmTask:
    """Trains the latent diffusion model with its Summarizer."""

    def __init__(self, config: LdmConfig, facts: DataFacts, seed: int, vae: Any = None) -> None:
        assert facts.latent is not None
        channels, rows, columns = facts.latent
        context = config.summarizer.width
        unet = unets.build(config.unet, (channels, rows, columns), context)
        if config.init:
            initialise(unet, config.init, config.unet.heads)
        summarizer = _conditioner(config.summarizer, facts)
        self.network, self.seed, self.vae = LdmLoss(unet, summarizer, config), seed, vae
        self.averaged = self.network if config.average_summarizer else unet
        licence = {"encoder": facts.encoder.get("licence", "unknown")}
        self.stratified = config.stratified
        self.known = {"encoder": facts.encoder, "licence": licence, "base_mpp": facts.base_mpp}

    def draw(self, batch: Batch) -> Batch:
        """Timesteps, noise, and the coins that decide about the condition."""
        length, shape = self.network.schedule.length, batch["latent"].shape[1:]
        drawn = training_draws(batch["sample"], shape, self.seed, "ldm", length, self.stratified)
        return {**batch, **drawn._asdict()}

    def sheet(self, batch: Batch) -> UInt8[np.ndarray, "H W 3"]:
        """Held-out samples of each scale, and what is drawn from their conditions."""
        unet, summarizer = self.network.unet, self.network.summarizer
        painter = Painter(unet, self.network.schedule, self.vae, summarizer.null(1))
        return ldm_sheet(painter, partial(condition, summarizer), batch, self.seed)

    def finish(
        self,
        bundle: str,
        averaged: dict[str, Tensor] | None,
        facts: dict[str, Any],
        batch: Batch,
    ) -> None:
        """Write `unet/` (averaged) and `summarizer/` (by choice)."""
        if averaged is not None:
            self.averaged.load_state_dict(averaged)
        parts = {"unet": self.network.unet.cpu(), "summarizer": self.network.summarizer.cpu()}
        known = {"ldm": facts, **self.known}
        bundles.save(bundle, parts, known, self.network.schedule)


def condition(summarizer: Any, batch: Batch) -> Float[Tensor, "B n D"]:
    """The context tokens of a batch, on the device of the Summarizer."""
    device = next(summarizer.parameters()).device
    names = ("grid", "scale", "grid_rows", "grid_columns")
    grid, scale, rows, columns = (batch[name].to(device) for name in names)
    more = {"region": batch["vector"].to(device)} if "vector" in batch else {}
    tokens: Tensor = summarizer(grid, scale, torch.stack([rows, columns], dim=1), **more)
    return tokens


def check_conditioner(summarizer: Any, facts: DataFacts, out: str) -> None:
    """Refuse data that a trained Summarizer cannot read.

    Raises:
        UserError: of other embeddings, or of scales that it does not know.
    """
    known = summarizer.config
    if facts.channels != known.channels:
        raise UserError(
            f"the data's embeddings have {facts.channels} values, those that {out} was trained on "
            f"{known.channels}; give the data it was trained on."
        )
    if max(facts.scales) >= known.scales:
        raise UserError(
            f"the data have scale {max(facts.scales)}, {out} knows {known.scales} scales from 0 "
            f"on; give the data it was trained on."
        )


def initialise(unet: UNet, path: str, heads: int) -> None:
    """Start a U-Net from a published checkpoint's.

    Raises:
        UserError: no U-Net in the file, names missing or unknown, or another size.
    """
    found = published.unet_from_published(weights.open_checkpoint(path), heads).state_dict()
    weights.check_names(unet.state_dict(), found, "a U-Net of the size in ldm.unet")
    unet.load_state_dict(found)


def _conditioner(config: SummarizerConfig, facts: DataFacts) -> nn.Module:
    """The network that makes context tokens of embeddings."""
    known = {"channels": facts.channels, "width": config.width, "scales": max(facts.scales) + 1}
    if config.kind == "vit":
        return Summarizer(layers=config.layers, heads=config.heads, **known)
    if config.kind == "cnn":
        return ConvSummarizer(**known)
    return VectorEmbedder(region=facts.vector, **known)


def source(config: LdmConfig, run: Run, split: str = "train") -> Ingest:
    """Latents of the bundle's autoencoder with their grids, and vectors of their regions."""
    columns = {latents_table(run.data, run.out): ("latent", "grid")}
    if config.region:
        columns[config.region] = ("vector",)
    return Ingest(run.data, columns, run.recipe, split)


def build(config: LdmConfig, run: Run, facts: DataFacts) -> LdmTask:
    """The task, its weights drawn from the training's seed.

    Raises:
        UserError: latents of a shape that the bundle's autoencoder does not make.
    """
    torch.manual_seed(run.recipe.seed)
    found = bundles.facts(run.out)
    vae = bundles.load_autoencoder(run.out) if found.get("digests", {}).get("vae") else None
    if vae is not None:
        made = (vae.channels, *(side // vae.factor for side in facts.image[1:]))
        if facts.latent != made:
            raise UserError(
                f"the latents in {run.data} are of shape {facts.latent}, the autoencoder of "
                f"{run.out} makes {made}; encode the examples again with it."
            )
    return LdmTask(config, facts, run.recipe.seed, vae)
