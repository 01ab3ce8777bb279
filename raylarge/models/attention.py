"""Cross-attention to a context that stays the same during sampling: keys and values are cached.

    tokens -> keys and values of every layer, a `CachedContext`   (once per batch of windows)
    layer: q of x_t -> softmax(q k^T) v -> output

Zero tokens (the null condition) have zero keys and values. Attention to them gives the bias of the
output layer, so nothing is computed for them.
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
    """Tokens of a batch, whose last samples may be zero, with their keys and values.

    Attributes:
        tokens: [B, n, D].
        keys_values: of each layer, [b, heads, n, d]; b excludes the zero samples at the end.
    """

    tokens: Tensor
    keys_values: tuple[tuple[Tensor, Tensor], ...]


class CrossAttention(AttnProcessor2_0):
    """Attention of one layer to a `CachedContext`, or to plain tokens."""

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
        """Return the output of the layer."""
        context = encoder_hidden_states
        if not isinstance(context, CachedContext):
            output: Tensor = super().__call__(attn, hidden_states, context, attention_mask, temb)
            return output
        k, v = context.keys_values[self.layer]
        linear, dropout = attn.to_out
        zeros = len(hidden_states) - len(k)
        q = _split_heads(attn, attn.to_q(hidden_states[: len(k)]))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        output = dropout(linear(mixed))
        if zeros:
            output = torch.cat([output, linear.bias.expand(zeros, *output.shape[1:])])
        return output


def cross_attention_layers(network: nn.Module) -> list[Attention]:
    """Return the layers that attend to the context, in order."""
    return [m for name, m in network.named_modules() if name.endswith(".attn2")]


def enable_cached_context(network: nn.Module) -> None:
    """Make the cross-attention layers of a network accept a `CachedContext`."""
    for layer, attn in enumerate(cross_attention_layers(network)):
        attn.set_processor(CrossAttention(layer))


def cached_context(network: nn.Module, tokens: Float[Tensor, "B n D"]) -> CachedContext:
    """Compute the keys and values of tokens for all layers of a network."""
    is_zero = (~tokens.flatten(1).any(dim=1)).tolist()
    zeros = next((i for i, zero in enumerate(reversed(is_zero)) if not zero), len(is_zero))
    nonzero = tokens[: len(tokens) - zeros]
    keys_values = tuple(
        (_split_heads(attn, attn.to_k(nonzero)), _split_heads(attn, attn.to_v(nonzero)))
        for attn in cross_attention_layers(network)
    )
    return CachedContext(tokens, keys_values)


def _split_heads(attn: Attention, x: Float[Tensor, "B n C"]) -> Float[Tensor, "B h n d"]:
    return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
