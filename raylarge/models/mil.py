"""ABMIL: classify a bag of patch features by attention to the relevant patches.

    h_k = ReLU(W standardised(x_k) + b)
    a_k = softmax_k  w^T (tanh(V h_k) * sigmoid(U h_k))      gated (Ilse et al. 2018, Eq. 9)
    a_k = softmax_k  w^T  tanh(V h_k)                        plain                  (Eq. 8)
    z   = sum_k a_k h_k,   logits = C z + c                                         (Eq. 7)

The paper's binary score becomes one logit per class. Used by ZoomLDM, section 4.5.
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from jaxtyping import Bool, Float
from torch import Tensor, nn


class ABMIL(ModelMixin, ConfigMixin):
    """Attention-based multiple-instance learning on features of one width."""

    mean: Tensor
    deviation: Tensor

    @register_to_config
    def __init__(
        self,
        channels: int = 960,
        width: int = 256,
        attention: int = 128,
        classes: list[str] | tuple[str, ...] = ("no", "yes"),
        gated: bool = True,
    ) -> None:
        """Initialize with random weights.

        Args:
            channels: of one instance.
            width: of h.
            attention: rows of V and U.
            classes: names, in the order of the logits.
            gated: Eq. 9 instead of Eq. 8.
        """
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("deviation", torch.ones(channels))
        self.embed = nn.Linear(channels, width)
        self.V = nn.Linear(width, attention, bias=False)
        self.U = nn.Linear(width, attention, bias=False) if gated else None
        self.w = nn.Linear(attention, 1, bias=False)
        self.head = nn.Linear(width, len(classes))

    def standardise(self, mean: Float[Tensor, " F"], deviation: Float[Tensor, " F"]) -> None:
        """Set the instances' statistics; a channel that never varies is only centred."""
        self.mean.copy_(mean)
        self.deviation.copy_(torch.where(deviation > 0, deviation, torch.ones_like(deviation)))

    def forward(
        self, instances: Float[Tensor, "B n F"], mask: Bool[Tensor, "B n"]
    ) -> Float[Tensor, "B classes"]:
        """Return the logits of each bag.

        Args:
            instances: raw features; padding has any finite values.
            mask: false at padding; every bag has at least one instance.
        """
        return self.pooled(self.hidden(instances), mask)[0]

    def hidden(self, instances: Float[Tensor, "*batch F"]) -> Float[Tensor, "*batch D"]:
        """Return h of each instance; a bag may be processed in pieces."""
        x = (instances - self.mean) / self.deviation
        return self.embed(x.to(self.embed.weight.dtype)).relu()

    def pooled(
        self, hidden: Float[Tensor, "B n D"], mask: Bool[Tensor, "B n"]
    ) -> tuple[Float[Tensor, "B classes"], Float[Tensor, "B n"]]:
        """Return logits, and the attention of each instance, which sums to 1 over a bag."""
        inner = self.V(hidden).tanh()
        if self.U is not None:
            inner = inner * self.U(hidden).sigmoid()
        scores = self.w(inner).squeeze(-1).float().masked_fill(~mask, -torch.inf)
        attention = scores.softmax(dim=1)
        bag = (attention[:, None].to(hidden) @ hidden).squeeze(1)
        return self.head(bag).float(), attention
