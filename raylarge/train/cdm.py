"""Task `cdm`: the diffusion transformer that draws Summarizer outputs for a scale.

Targets are the trained Summarizer's raw tokens for the grids of LATENTS; the loss is on the
predicted x_0. Source: ZoomLDM section 3.1, supplement S3.1; DiT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from raylarge.diffusion.loss import draws, learned_range, per_sample
from raylarge.models import bundle as bundles
from raylarge.models.cdm import CDM
from raylarge.train.task import Batch, Facts

if TYPE_CHECKING:
    from raylarge.train.launch import Train


@dataclass(frozen=True)
class CdmConfig:
    """Size of the diffusion transformer; the defaults are DiT-B, as published."""

    width: int = 768
    depth: int = 12
    heads: int = 12
    learn_sigma: bool = True


class _Network(nn.Module):
    """The CDM and its loss per sample; the conditioner is frozen and not part of it."""

    def __init__(self, cdm: CDM, summarizer: Any, seed: int) -> None:
        super().__init__()
        self.cdm, self.seed = cdm, seed
        self._frozen = [summarizer.requires_grad_(False)]  # in a list: not a submodule

    def forward(self, batch: Batch) -> Float[Tensor, "B"]:
        """The loss of each sample."""
        summarizer = self._frozen[0].to(batch["grid"].device)
        size = torch.stack([batch["grid_rows"], batch["grid_columns"]], dim=1)
        with torch.no_grad():
            x_0 = summarizer(batch["grid"], batch["scale"], size).mT  # channels first
        schedule = self.cdm.schedule
        drawn = draws(batch["sample"], x_0.shape[1:], self.seed, "cdm-train", schedule.length)
        x_t = schedule.noised(x_0, drawn.eps, drawn.t)
        output = self.cdm(x_t, drawn.t, batch["scale"])
        if not self.cdm.config.learn_sigma:
            return per_sample(output, x_0)
        return torch.add(*learned_range(output, x_0, x_t, drawn.t, schedule))


class CdmTask:
    """Trains the conditioning diffusion model, for any conditioner (`models/cells.py`)."""

    name = "cdm"
    table = "latents"

    def __init__(self, config: CdmConfig, summarizer: Any, seed: int) -> None:
        cdm = CDM(
            channels=summarizer.config.width,
            tokens=summarizer.null(1).shape[1],  # 65 of a Summarizer, 1 or 2 of a VectorEmbedder
            scales=summarizer.config.scales,
            **vars(config),
        )
        self.network = _Network(cdm, summarizer, seed)
        self.averaged = cdm

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


def build(config: Train, facts: Facts) -> CdmTask:
    """The task, its weights drawn from the training's seed.

    Raises:
        UserError: the bundle `out` holds no trained Summarizer yet.
    """
    torch.manual_seed(config.seed)
    summarizer = bundles.load(config.out).summarizer
    return CdmTask(config.cdm, summarizer, config.seed)
