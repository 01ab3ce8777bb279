"""Losses per sample, with every draw at the sample's own address.

eps-prediction:  mean (eps(x_t, t, c) - eps)^2          (DDPM, Eq. 14)
x_0-prediction:  mean (x_0(x_t, t, c) - x_0)^2
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from raylarge.diffusion.noise import generator


class Draws(NamedTuple):
    """What is random about a batch of training samples.

    Attributes:
        t: timesteps, uniform over the schedule.
        coin: uniform in [0, 1), for condition dropout.
        eps: standard normal noise.
    """

    t: Int[Tensor, "B"]
    coin: Float[Tensor, "B"]
    eps: Float[Tensor, "B ..."]


def draws(
    samples: Int[Tensor, "B"], shape: Sequence[int], seed: int, stream: str, length: int
) -> Draws:
    """The draws of global sample indices; the same for every batch split and world size.

    Args:
        length: timesteps of the schedule.
    """
    ts, coins, noises = [], [], []
    for sample in samples.tolist():
        source = generator(seed, stream, sample >> 32, sample & 0xFFFFFFFF)
        ts.append(int(source.integers(length)))
        coins.append(source.random())
        noises.append(source.standard_normal(tuple(shape), dtype=np.float32))
    device = samples.device
    return Draws(
        torch.tensor(ts, device=device),
        torch.tensor(coins, dtype=torch.float32, device=device),
        torch.from_numpy(np.stack(noises)).to(device),
    )


def per_sample(
    predicted: Float[Tensor, "B ..."], wanted: Float[Tensor, "B ..."]
) -> Float[Tensor, "B"]:
    """Mean squared error of each sample, in float32."""
    return (predicted.float() - wanted.float()).square().flatten(1).mean(dim=1)
