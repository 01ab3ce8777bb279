"""Cross-attention to a context that stays the same: its keys and values are computed once.

    Context of tokens -> every layer's keys and values   (once per batch of windows)
    layer: q of x_t -> softmax(q k^T) v -> output

Tokens that are zero, as those of no condition are, have zero keys and values: what they give is
the output's bias, and nothing is computed for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class CachedContext:
    """What every layer attends to, for a batch whose last samples may have zero tokens.

    Attributes:
        tokens: [B, n, D].
        kept: keys and values of each layer, [b, heads, n, d]; b leaves out the zero tokens.
    """

    tokens: Tensor
    kept: tuple[tuple[Tensor, Tensor], ...]


class CrossAttention(AttnProcessor2_0):
    """A layer's attention to a `CachedContext`, or to tokens as they are."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer

    def __call__(
        self,
        attn: Attention,
        hidden_states: Float[Tensor, "B N C"],
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Float[Tensor, "B N C"]:
        """The layer's output."""
        cached_context = encoder_hidden_states
        if not isinstance(cached_context, CachedContext):
            made: Tensor = super().__call__(
                attn, hidden_states, cached_context, attention_mask, temb
            )
            return made
        k, v = cached_context.kept[self.layer]
        out, dropout = attn.to_out
        x, silent = hidden_states[: len(k)], len(hidden_states) - len(k)
        q = _heads(attn, attn.to_q(x))
        given = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        given = dropout(out(given))
        if silent:
            given = torch.cat([given, out.bias.expand(silent, *given.shape[1:])])
        return given


def cross_attention_layers(network: nn.Module) -> list[Attention]:
    """The layers that attend to the context, in their order."""
    return [m for name, m in network.named_modules() if name.endswith(".attn2")]


def enable_cached_context(network: nn.Module) -> None:
    """Let a network's cross-attention take a `CachedContext`."""
    for layer, attn in enumerate(cross_attention_layers(network)):
        attn.set_processor(CrossAttention(layer))


def cached_context(network: nn.Module, tokens: Float[Tensor, "B n D"]) -> CachedContext:
    """A context for a network whose cross-attention was made to take it."""
    zero = (~tokens.flatten(1).any(dim=1)).tolist()
    silent = next((i for i, is_zero in enumerate(reversed(zero)) if not is_zero), len(zero))
    spoken = tokens[: len(tokens) - silent]
    kept = tuple(
        (_heads(attn, attn.to_k(spoken)), _heads(attn, attn.to_v(spoken)))
        for attn in cross_attention_layers(network)
    )
    return CachedContext(tokens, kept)


def _heads(attn: Attention, x: Float[Tensor, "B n C"]) -> Float[Tensor, "B h n d"]:
    return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
