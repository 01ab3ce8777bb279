"""The optimizer of both engines, and gradient clipping.

AdamW: fused on a GPU, or in 8 bit (bitsandbytes). The norm of
the gradient is clipped as in the published training code of latent diffusion.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from raylarge.errors import UserError
from raylarge.train.task import Recipe


def make(network: nn.Module, recipe: Recipe, device: torch.device) -> torch.optim.Optimizer:
    """Return the optimizer of a network's trainable parameters.

    Raises:
        UserError: 8 bit without a GPU, or without bitsandbytes.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    options: dict[str, Any] = {"betas": recipe.betas, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "adamw":
        fused = device.type == "cuda" and not recipe.offload
        return torch.optim.AdamW(parameters, recipe.lr, fused=fused, **options)
    if device.type != "cuda":
        raise UserError("optimizer=adamw8bit needs a GPU; give optimizer=adamw.")
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(
            "optimizer=adamw8bit needs bitsandbytes; pip install 'raylarge[adam8bit]', or give "
            "optimizer=adamw."
        ) from error
    adamw: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(parameters, recipe.lr, **options)
    return adamw


def set_lr(optimizer: Any, lr: float) -> None:
    """Set the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip(network: nn.Module, largest: float) -> float:
    """Clip the norm of the gradient to `largest` (0: no limit); return the norm before."""
    norm = nn.utils.clip_grad_norm_(network.parameters(), largest or float("inf"))
    return float(norm)
