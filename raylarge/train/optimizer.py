"""The optimiser of both engines, and what is done to gradients before it.

AdamW everywhere: fused on a GPU, in 8 bit (bitsandbytes) where that is asked for. The norm of
the gradient is clipped as in the published training code of latent diffusion.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from raylarge.errors import UserError
from raylarge.train.task import Recipe


def make(network: nn.Module, recipe: Recipe, device: torch.device) -> torch.optim.Optimizer:
    """The optimiser of what can be trained in a network.

    Raises:
        UserError: 8 bit without a GPU, or without bitsandbytes.
    """
    parameters = [one for one in network.parameters() if one.requires_grad]
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
    made: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(parameters, recipe.lr, **options)
    return made


def set_lr(optimizer: Any, lr: float) -> None:
    """The learning rate of the step to come."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip(network: nn.Module, largest: float) -> float:
    """Clip the norm of the gradient to `largest` (0: leave it); what it was."""
    norm = nn.utils.clip_grad_norm_(network.parameters(), largest or float("inf"))
    return float(norm)
