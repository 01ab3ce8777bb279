"""Does the model follow its condition? The denoising loss with true, shuffled and no grids.

A model that ignores its condition has equal losses; one that follows it does worse when each
image gets another image's embeddings. That alone does not say that the condition helps: the loss
without any condition must be higher than with the true one, too. All use the same noise and
timesteps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from raylarge import tables
from raylarge.diffusion.loss import mse_per_sample, training_draws
from raylarge.models.bundle import Bundle

ROWS = 64
TOLERANCE = 0.005
"""A loss with another image's condition that is higher by less than this share counts as equal."""


@torch.no_grad()
def shuffled_loss(
    bundle: Bundle, data: str, latents: str, split: str = "val", repeats: int = 8, seed: int = 0
) -> dict[int, Mapping[str, float | int]]:
    """Mean denoising loss per scale with true, shuffled and null conditions.

    Args:
        data: the data folder.
        latents: its table `latents-<digest>` of the bundle's own autoencoder.
        split: rows of this split are used, at most 64 per scale, spread over it.
        repeats: noise draws per row.

    Raises:
        UserError: no such table, or no row of the split.
    """
    table = tables.rows(data, latents, split)
    found: dict[int, Mapping[str, float | int]] = {}
    for k in sorted(set(table["scale"].to_pylist())):
        rows = table.filter(pc.equal(table["scale"], k))
        rows = rows.take(np.unique(np.linspace(0, len(rows) - 1, ROWS).round().astype(int)))
        x_0, grid = _tensors(rows, bundle)
        true = bundle.summarizer(grid, torch.full((len(x_0),), k))
        contexts = {
            "true": true,
            "shuffled": true.roll(max(1, len(true) // 2), dims=0),
            "null": bundle.summarizer.null(len(true)),
        }
        found[int(k)] = {"rows": len(x_0)} | {
            name: _loss(bundle, x_0, context, repeats, seed) for name, context in contexts.items()
        }
    return found


def loss_rows(losses: Mapping[Any, Mapping[str, float | int]]) -> list[list[str]]:
    """Return rows (scale, true, shuffled, none) of a table, the last two with their changes.

    Args:
        losses: by scale, as `shuffled_loss` returns them.
    """
    return [
        [str(k), f"{loss['true']:.4f}", *(_against(loss, name) for name in ("shuffled", "null"))]
        for k, loss in losses.items()
    ]


def summarize_losses(losses: Mapping[Any, Mapping[str, float | int]]) -> str:
    """Return one line that says at which scales the condition helps.

    Args:
        losses: by scale, as `shuffled_loss` returns them.
    """
    lines = {
        "helps": "the true condition gives the lowest loss, so it helps",
        "hurts": "no condition at all does better than the true one, so it does not help yet",
        "ignored": "another image's condition does as well as the true one, so it is ignored",
    }
    groups: dict[str, list[str]] = {}
    for k, loss in losses.items():
        groups.setdefault(_verdict(loss), []).append(str(k))
    ordered = [(name, groups[name]) for name in lines if name in groups]
    return "; ".join(
        f"scale{'s' if len(scales) > 1 else ''} {', '.join(scales)}: {lines[name]}"
        for name, scales in ordered
    )


def _verdict(loss: Mapping[str, float | int]) -> str:
    if loss["null"] <= loss["true"]:
        return "hurts"
    return "ignored" if loss["shuffled"] <= (1 + TOLERANCE) * loss["true"] else "helps"


def _against(loss: Mapping[str, float | int], name: str) -> str:
    return f"{loss[name]:.4f} ({loss[name] / loss['true'] - 1:+.1%})"


def _loss(
    bundle: Bundle, x_0: torch.Tensor, context: torch.Tensor, repeats: int, seed: int
) -> float:
    losses = []
    for repeat in range(repeats):
        samples = torch.arange(len(x_0)) + repeat * len(x_0)
        drawn = training_draws(samples, x_0.shape[1:], seed, "evaluate", bundle.schedule.length)
        x_t = bundle.schedule.noised(x_0, drawn.eps, drawn.t)
        output = bundle.unet(x_t, drawn.t, context)
        losses.append(mse_per_sample(output, bundle.schedule.target(x_0, drawn.eps, drawn.t)))
    return float(torch.cat(losses).mean())


def _tensors(rows: pa.Table, bundle: Bundle) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and grids of rows of one scale, whose grids have one shape."""
    x_0 = np.array(rows["latent"].to_pylist(), dtype=np.float32)
    grid = np.array(rows["grid"].to_pylist(), dtype=np.float32)
    shape = (rows["grid_rows"][0].as_py(), rows["grid_columns"][0].as_py(), -1)
    grids = torch.from_numpy(grid.reshape(len(grid), *shape)).permute(0, 3, 1, 2)
    return torch.from_numpy(x_0.reshape(-1, *bundle.patch.latent)), grids
