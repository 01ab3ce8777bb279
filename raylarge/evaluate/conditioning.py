"""Does the model follow its condition? Denoising losses with true, shuffled and no embeddings.

A model that ignores its condition has equal losses; one that follows it has a higher loss with
the embeddings of another image. The condition helps if the loss without any condition is higher
than with the true one, too. All losses use the same noise and timesteps.
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
"""Relative difference below which two losses count as equal."""


@torch.no_grad()
def shuffled_loss(
    bundle: Bundle, data: str, latents: str, split: str = "val", repeats: int = 8, seed: int = 0
) -> dict[int, Mapping[str, float | int]]:
    """Return the mean denoising loss per scale with true, shuffled and null conditions.

    Args:
        data: data folder.
        latents: its table `latents-<digest>` of the bundle's own autoencoder.
        split: rows to use, at most `ROWS` per scale, evenly spaced.
        repeats: noise draws per row.

    Raises:
        UserError: no such table, or no row of the split.
    """
    table = tables.rows(data, latents, split)
    losses: dict[int, Mapping[str, float | int]] = {}
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
        losses[int(k)] = {"rows": len(x_0)} | {
            name: _loss(bundle, x_0, context, repeats, seed) for name, context in contexts.items()
        }
    return losses


def loss_rows(losses: Mapping[Any, Mapping[str, float | int]]) -> list[list[str]]:
    """Return table rows (scale, true, shuffled, null) of the losses of `shuffled_loss`.

    The last two with their change against the first.
    """
    return [
        [
            str(k),
            f"{loss['true']:.4f}",
            *(_with_change(loss, name) for name in ("shuffled", "null")),
        ]
        for k, loss in losses.items()
    ]


def summarize_losses(losses: Mapping[Any, Mapping[str, float | int]]) -> str:
    """Return one line that says at which scales the condition of `shuffled_loss` helps."""
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


def _with_change(loss: Mapping[str, float | int], name: str) -> str:
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
    """Return latents and grids of the rows of one scale, whose grids have one shape."""
    x_0 = np.array(rows["latent"].to_pylist(), dtype=np.float32)
    grid = np.array(rows["grid"].to_pylist(), dtype=np.float32)
    shape = (rows["grid_rows"][0].as_py(), rows["grid_columns"][0].as_py(), -1)
    grids = torch.from_numpy(grid.reshape(len(grid), *shape)).permute(0, 3, 1, 2)
    return torch.from_numpy(x_0.reshape(-1, *bundle.patch.latent)), grids
