"""Activation checkpointing: blocks whose activations are computed again in the backward pass.

The networks of diffusers do it themselves where they are asked to; of ours it is the blocks in
their lists. Names of parameters do not change.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

LISTS = ("blocks", "encoder_layers", "body")
"""Names under which the CDM, the Summarizer and the grid prior hold their blocks."""


def recompute(network: nn.Module) -> None:
    """Have the blocks of a network keep their inputs alone."""
    for module in network.modules():
        if getattr(module, "_supports_gradient_checkpointing", False):
            module.enable_gradient_checkpointing()
            continue
        for name in LISTS:
            blocks = module._modules.get(name)  # getattr warns on networks of diffusers
            for block in blocks if isinstance(blocks, nn.ModuleList) else ():
                if not isinstance(block.forward, partial):
                    block.forward = partial(_again, block.forward)


def _again(forward: Any, *inputs: Any, **named: Any) -> Any:
    return checkpoint(forward, *inputs, use_reentrant=False, **named)
