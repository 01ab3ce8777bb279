"""Task `cdm`: the diffusion transformer that draws Summarizer outputs for a scale.

Targets are the trained Summarizer's raw tokens for the grids of LATENTS; the loss is on the
predicted x_0. Source: ZoomLDM section 3.1, supplement S3.1; DiT. Ours: tokens standardised by
scale, by choice (`models/cdm.py`).
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from raylarge.config import require
from raylarge.diffusion.loss import learned_variance_losses, mse_per_sample, training_draws
from raylarge.models import bundle as bundles
from raylarge.models.cdm import CDM
from raylarge.train.ingest import Ingest, latents_table
from raylarge.train.monitor.sample_grid import Painter, cdm_sheet
from raylarge.train.task import Batch, DataFacts, Run, SampleSource
from raylarge.train.tasks.ldm import check_conditioner, condition

STATISTICS, SOME = 1024, 64
"""Training samples whose tokens tell the units of each scale, and how many at a time."""


@dataclass(frozen=True)
class CdmConfig:
    """Size of the diffusion transformer; the defaults are DiT-B, as published."""

    width: int = 768  # of the tokens
    depth: int = 12  # transformer blocks
    heads: int = 12  # attention heads
    learn_sigma: bool = True  # predict the variance, too
    standardised: bool = False  # by scale; raw as published

    def check(self) -> None:
        """Refuse values that no network can be made of.

        Raises:
            UserError: naming the key, its value and what it may be.
        """
        even = self.width >= 2 and self.width % 2 == 0  # half sines, half cosines
        divides = self.heads >= 1 and self.width % self.heads == 0
        require(
            ("cdm.width", self.width, even, "an even number above 0"),
            ("cdm.depth", self.depth, self.depth >= 1, "1 or more"),
            ("cdm.heads", self.heads, divides, f"a divisor of cdm.width={self.width}"),
        )


class CdmLoss(nn.Module):
    """The CDM and its loss per sample; the conditioner is frozen and not part of it."""

    def __init__(self, cdm: CDM, summarizer: Any) -> None:
        super().__init__()
        self.cdm = cdm
        self.frozen = [summarizer.requires_grad_(False)]  # in a list: not a submodule

    def forward(self, batch: Batch) -> Float[Tensor, " B"]:
        """The loss of each sample."""
        x_0 = self.cdm.to_standard(self.tokens(batch), batch["scale"])
        eps, t, schedule = batch["eps"], batch["t"], self.cdm.schedule
        x_t = schedule.noised(x_0, eps, t)
        output = self.cdm(x_t, t, batch["scale"])
        if not self.cdm.config.learn_sigma:
            return mse_per_sample(output, x_0)
        return torch.add(*learned_variance_losses(output, x_0, x_t, t, schedule))

    @torch.no_grad()
    def tokens(self, batch: Batch) -> Float[Tensor, "B C n"]:
        """The Summarizer's raw tokens, channels first."""
        return condition(self.frozen[0].to(batch["grid"].device), batch).mT


class CdmTask:
    """Trains the conditioning diffusion model, for any conditioner (`models/conditioner.py`)."""

    def __init__(self, config: CdmConfig, bundle: Any, seed: int) -> None:
        summarizer = bundle.summarizer
        cdm = CDM(
            channels=summarizer.config.width,
            tokens=summarizer.null(1).shape[1],  # 65 of a Summarizer, 1 or 2 of a VectorEmbedder
            scales=summarizer.config.scales,
            **vars(config),
        )
        self.network, self.seed, self.bundle = CdmLoss(cdm, summarizer), seed, bundle
        self.averaged = cdm

    def standardise(self, rows: SampleSource) -> None:
        """Have the CDM work in the units of the first samples' tokens."""
        starts = range(0, STATISTICS, SOME)
        some = [rows.batch(range(start, start + SOME)) for start in starts]
        tokens = torch.cat([self.network.tokens(batch) for batch in some])
        self.network.cdm.standardise(tokens, torch.cat([batch["scale"] for batch in some]))

    def draw(self, batch: Batch) -> Batch:
        """Timesteps and noise."""
        config, length = self.network.cdm.config, self.network.cdm.schedule.length
        shape = (config.channels, config.tokens)
        return {
            **batch,
            **training_draws(batch["sample"], shape, self.seed, "cdm-train", length)._asdict(),
        }

    def sheet(self, batch: Batch) -> UInt8[np.ndarray, "H W 3"]:
        """Images of the tokens that are drawn for each scale."""
        cdm, bundle = self.network.cdm, self.bundle
        unet = bundle.unet.to(next(cdm.parameters()).device)
        painter = Painter(unet, bundle.schedule, bundle.vae, bundle.summarizer.null(1))
        return cdm_sheet(painter, cdm, sorted(set(batch["scale"].tolist())), self.seed)

    def finish(
        self,
        bundle: str,
        averaged: dict[str, Tensor] | None,
        facts: dict[str, Any],
        batch: Batch,
    ) -> None:
        """Write `cdm/` (averaged)."""
        if averaged is not None:
            self.network.cdm.load_state_dict(averaged)
        bundles.save(bundle, {"cdm": self.network.cdm.cpu()}, {"cdm": facts})


def source(config: CdmConfig, run: Run, split: str = "train") -> Ingest:
    """The grids of the latents that the U-Net learns from, and vectors of their regions."""
    region = bundles.facts(run.out).get("ldm", {}).get("config", {}).get("ldm", {}).get("region")
    columns = {latents_table(run.data, run.out): ("grid",)} | (
        {region: ("vector",)} if region else {}
    )
    return Ingest(run.data, columns, run.recipe, split)


def build(config: CdmConfig, run: Run, facts: DataFacts) -> CdmTask:
    """The task, its weights drawn from the training's seed.

    Raises:
        UserError: the bundle `out` holds no trained Summarizer yet.
    """
    bundle = bundles.load(run.out, without={"cdm", "controlnet", "vae_small"})
    check_conditioner(bundle.summarizer, facts, run.out)
    torch.manual_seed(run.recipe.seed)
    task = CdmTask(config, bundle, run.recipe.seed)
    if config.standardised and not task.network.cdm.pos_embed.is_meta:  # plans have no values
        with closing(source(config, run)) as rows:
            task.standardise(rows)
    return task
