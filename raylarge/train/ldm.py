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
from raylarge.models import bundle as bundles
from raylarge.models import unet as unets
from raylarge.models.summarizer import Summarizer
from raylarge.models.unet import UNetConfig
from raylarge.train.task import Batch, Facts

if TYPE_CHECKING:
    from raylarge.train.launch import Train


@dataclass(frozen=True)
class SummarizerConfig:
    """Size of the Summarizer; the defaults are the published ones."""

    width: int = 512
    layers: int = 12
    heads: int = 8


@dataclass(frozen=True)
class LdmConfig:
    """Sizes of the networks, and what they learn.

    Attributes:
        drop: share of samples whose condition is dropped.
        prediction: `epsilon` as published, or `v_prediction`, which samples well much sooner.
    """

    unet: UNetConfig = field(default_factory=UNetConfig)
    summarizer: SummarizerConfig = field(default_factory=SummarizerConfig)
    drop: float = 0.1
    prediction: str = "epsilon"


class _Network(nn.Module):
    """U-Net and Summarizer and their loss per sample."""

    def __init__(
        self, unet: nn.Module, summarizer: Summarizer, config: LdmConfig, seed: int
    ) -> None:
        super().__init__()
        self.unet, self.summarizer = unet, summarizer
        self.drop, self.seed = config.drop, seed
        self.schedule = Schedule(prediction=config.prediction)

    def forward(self, batch: Batch) -> Float[Tensor, "B"]:
        """The loss of each sample."""
        x_0, samples = batch["latent"], batch["sample"]
        tokens = self.summarizer(
            batch["grid"], batch["grid_rows"] * batch["grid_columns"], batch["scale"]
        )
        drawn = draws(samples, x_0.shape[1:], self.seed, "ldm", self.schedule.length)
        tokens = tokens * (drawn.coin >= self.drop)[:, None, None]
        x_t = self.schedule.noised(x_0, drawn.eps, drawn.t)
        output = self.unet(x_t, drawn.t, encoder_hidden_states=tokens, return_dict=False)[0]
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
        summarizer = Summarizer(
            channels=facts.channels, scales=max(facts.scales) + 1, **vars(config.summarizer)
        )
        self.network = _Network(unet, summarizer, config, seed)
        self.averaged = unet

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
        bundles.save(bundle, parts, {"ldm": facts}, self.network.schedule)


def build(config: Train, facts: Facts) -> LdmTask:
    """The task, its weights drawn from the training's seed."""
    torch.manual_seed(config.seed)
    return LdmTask(config.ldm, facts, config.seed)
