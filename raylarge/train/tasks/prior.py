"""Task `prior`: the grid prior, which imagines a grid of embeddings for a vector.

    vector of VECTORS, grid of 2^k x 2^k raw base embeddings of EXAMPLES -> GridPrior

Loss: L2 on the clean grid, in the network's units. A vector that is dropped is zeros, as where
a row has none: the null condition, so guidance and negative prompts work. Source: Graikos et
al., supplement 14.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from raylarge import images, storage, tables
from raylarge.diffusion.loss import mse_per_sample, training_draws
from raylarge.errors import UserError
from raylarge.models import bundle as bundles
from raylarge.models.conditioner import SIDE
from raylarge.models.prior import GridPrior
from raylarge.train.ingest import Ingest
from raylarge.train.task import Batch, DataFacts, Run, SampleSource

STATISTICS = 512
"""Samples, the first of the training, whose means and spreads are the network's units."""

SHOWN = 8
SHEET_STEPS = 50


@dataclass(frozen=True)
class PriorConfig:
    """What the prior learns from, and its size.

    Attributes:
        vectors: the table of vectors, `vectors-<digest>`; empty: the only one there is.
            Example: vectors-0123abcd.
        scale: of the examples whose grids it draws; 2, as published, has 4 x 4 cells.
        width: of every convolution, a multiple of 16.
        blocks: residual blocks.
        drop: share of samples whose vector is dropped.
    """

    vectors: str = ""
    scale: int = 2
    width: int = 512
    blocks: int = 4
    drop: float = 0.1

    @property
    def side(self) -> int:
        """Rows and columns of a grid: an example covers so many base tiles."""
        return 1 << self.scale

    def check(self) -> None:
        """Refuse values that make no sense.

        Raises:
            UserError: naming the key, its value and what it may be.
        """
        octaves = SIDE.bit_length() - 1  # larger grids are stored pooled
        for key, fine, wish in (
            ("scale", 0 <= self.scale <= octaves, f"0 to {octaves}"),
            ("width", self.width > 0 and self.width % 16 == 0, "a multiple of 16"),
            ("blocks", self.blocks >= 1, "1 or more"),
            ("drop", 0 <= self.drop <= 1, "0 to 1"),
        ):
            if not fine:
                raise UserError(f"prior.{key}={getattr(self, key)}: it must be {wish}.")


class PriorLoss(nn.Module):
    """The grid prior and its loss per sample."""

    def __init__(self, prior: GridPrior, drop: float) -> None:
        super().__init__()
        self.prior, self.drop, self.schedule = prior, drop, prior.schedule

    def forward(self, batch: Batch) -> Float[Tensor, " B"]:
        """The loss of each sample."""
        prior, t = self.prior, batch["t"]
        x_0 = prior.to_standard(grids_of(batch, prior.config.side))
        vector = batch["vector"] * (batch["coin"] >= self.drop)[:, None]
        x_t = self.schedule.noised(x_0, batch["eps"], t)
        return mse_per_sample(prior(x_t, t, vector), x_0)


class PriorTask:
    """Trains the grid prior."""

    def __init__(self, prior: GridPrior, drop: float, seed: int, origin: dict[str, Any]) -> None:
        self.network, self.averaged = PriorLoss(prior, drop), prior
        self.seed, self.origin = seed, origin

    def draw(self, batch: Batch) -> Batch:
        """The batch with timesteps, noise and the coin that drops a vector."""
        prior = self.network.prior
        side, length = prior.config.side, prior.schedule.length
        shape = (prior.config.channels, side, side)
        drawn = training_draws(batch["sample"], shape, self.seed, "prior-train", length)
        return {**batch, **drawn._asdict()}

    def sheet(self, batch: Batch) -> UInt8[np.ndarray, "H W 3"]:
        """Grids of the data, draws for their vectors, and draws for none, in false colours.

        Red, green and blue are the first principal components of the data's embeddings.
        """
        prior = self.network.prior
        true = grids_of(batch, prior.config.side)[:SHOWN].to(prior.device)
        vectors, addresses = batch["vector"][:SHOWN], [(i,) for i in range(len(true))]
        rows = {"data": true}
        for name, given in (("drawn", vectors), ("no vector", torch.zeros_like(vectors))):
            rows[name] = prior.draw(given.to(prior.device), self.seed, addresses, SHEET_STEPS)
        pixels = false_colours([prior.to_standard(grids) for grids in rows.values()])
        return images.sheet([list(row) for row in pixels], list(rows), cell_px=64)

    def finish(
        self,
        bundle: str,
        averaged: dict[str, Tensor] | None,
        facts: dict[str, Any],
        batch: Batch,
    ) -> None:
        """Write `prior/` (averaged), and what its vectors were made with."""
        if averaged is not None:
            self.network.prior.load_state_dict(averaged)
        known = {"prior": {**facts, "vectors": self.origin}}
        bundles.save(bundle, {"prior": self.network.prior.cpu()}, known)


def grids_of(batch: Batch, side: int) -> Float[Tensor, "B C {side} {side}"]:
    """Raw grids of a batch's cells, which come row by row."""
    return batch["grid"][:, : side * side].mT.unflatten(2, (side, side))


def false_colours(
    grids: list[Float[Tensor, "B C h w"]],
) -> list[UInt8[np.ndarray, "B h w 3"]]:
    """Grids as pixels: three principal components of the first ones, 2.5 sigma either way."""
    cells = grids[0].movedim(1, -1).flatten(0, 2).cpu()
    mean = cells.mean(dim=0)
    _, sizes, axes = torch.linalg.svd(cells - mean, full_matrices=False)
    spread = (2.5 * sizes[:3] / len(cells) ** 0.5).clamp_min(1e-6)
    found = []
    for some in grids:
        along = (some.movedim(1, -1).cpu() - mean) @ axes[:3].mT / spread
        along = nn.functional.pad(along, (0, 3 - along.shape[-1]))  # of fewer than 3 channels
        found.append(images.to_uint8(along.movedim(-1, 1)))
    return found


def vectors_table(data: str, name: str) -> str:
    """The table of vectors that is meant: the one named, or the only one there is.

    Raises:
        UserError: there are none, or several and no name.
    """
    if name:
        return name if name.startswith("vectors-") else f"vectors-{name}"
    made = [path.rsplit("/", 1)[-1] for path in storage.children(data, "text_embed-*.json")]
    names = [f"vectors-{one.removeprefix('text_embed-').removesuffix('.json')}" for one in made]
    if len(names) != 1:
        cure = f"choose one: prior.vectors={' or '.join(names)}."
        if not names:
            cure = f"make one with python jobs/prepare.py out={data} verbs=text_embed."
        raise UserError(f"{data} has {len(names)} tables of vectors; {cure}")
    return names[0]


def source(config: PriorConfig, run: Run, split: str = "train") -> SampleSource:
    """Grids of one scale with the vectors beside them.

    Raises:
        UserError: a config that makes no sense, no telling which vectors, or as `Ingest`.
    """
    config.check()
    columns = {"examples": ("grid",), vectors_table(run.data, config.vectors): ("vector",)}
    return Ingest(run.data, columns, run.recipe, split, scales=(config.scale,))


def build(config: PriorConfig, run: Run, facts: DataFacts) -> PriorTask:
    """The task, its weights drawn from the training's seed, its units those of the data.

    Raises:
        UserError: grids of another size than the scale's, or a bundle for another encoder.
    """
    torch.manual_seed(run.recipe.seed)
    _refuse_other_encoder(run.out, facts)
    some, side = source(config, run).batch(range(STATISTICS)), config.side
    odd = (some["grid_rows"] != side) | (some["grid_columns"] != side)
    if odd.any():
        found = f"{some['grid_rows'][odd][0]}x{some['grid_columns'][odd][0]}"
        raise UserError(
            f"examples of prior.scale={config.scale} have grids of {found} embeddings, not "
            f"{side}x{side}; prepare the data with one embedding per base tile."
        )
    size = {"side": side, "width": config.width, "blocks": config.blocks}
    prior = GridPrior(facts.channels, facts.vector, **size)
    prior.standardise(grids_of(some, side), some["vector"])
    table = vectors_table(run.data, config.vectors)
    made = tables.manifest(run.data, table)["config"].get("text_embed", {})
    return PriorTask(prior, config.drop, run.recipe.seed, {"table": table, **made})


def _refuse_other_encoder(out: str, facts: DataFacts) -> None:
    """Refuse embeddings that the bundle's Summarizer would not understand.

    Raises:
        UserError: naming both encoders.
    """
    known = bundles.facts(out).get("encoder", {}).get("name")
    given = facts.encoder.get("name")
    if known and given and known != given:
        raise UserError(
            f"the bundle {out} was trained on embeddings of {known}, the data hold those of "
            f"{given}; prepare the data with embed.encoder={known}, or give another out=."
        )
