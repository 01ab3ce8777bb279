"""Training losses per sample, with random numbers drawn at the address of each sample.

eps-prediction:  mean (eps(x_t, t, c) - eps)^2          (DDPM, Eq. 14)
x_0-prediction:  mean (x_0(x_t, t, c) - x_0)^2
min-SNR:         times min(SNR_t, gamma) / SNR_t for eps          (Hang et al. 2023, Eq. 8)
learned range:   that + the variational bound of a learned variance   (Improved DDPM, Eq. 15, 16)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from raylarge.diffusion.noise import generator, split_64
from raylarge.diffusion.schedule import Schedule

_GOLDEN = 0x9E3779B97F4A7C15
"""2^64 / golden ratio, rounded to odd."""


class TrainingDraws(NamedTuple):
    """Random numbers of a batch of training samples.

    Attributes:
        t: timesteps, uniform over the schedule.
        coin: uniform in [0, 1), for condition dropout.
        eps: standard normal noise.
    """

    t: Int[Tensor, " B"]
    coin: Float[Tensor, " B"]
    eps: Float[Tensor, "B ..."]


def training_draws(
    samples: Int[Tensor, " B"],
    shape: Sequence[int],
    seed: int,
    stream: str,
    length: int,
    stratified: bool = False,
) -> TrainingDraws:
    """Draw the random numbers of global sample indices, whatever the batch and the world size.

    Args:
        length: timesteps of the schedule.
        stratified: spread the timesteps of neighbouring samples evenly over the schedule: that of
            sample n is frac(u + n / golden ratio) of its length; u is drawn once per training.
    """
    ts, coins, noises = [], [], []
    offset = generator(seed, f"{stream} strata").random()
    for sample in samples.tolist():
        source = generator(seed, stream, *split_64(sample))
        t = int(source.integers(length))
        ts.append(int(length * _golden(offset, sample)) if stratified else t)
        coins.append(source.random())
        noises.append(source.standard_normal(tuple(shape), dtype=np.float32))
    device = samples.device
    return TrainingDraws(
        torch.tensor(ts, device=device),
        torch.tensor(coins, dtype=torch.float32, device=device),
        torch.from_numpy(np.stack(noises)).to(device),
    )


def _golden(offset: float, sample: int) -> float:
    """Return frac(offset + sample / golden ratio), exact for large indices.

    The ratio is a 64-bit fraction, so the sum wraps like integers (Weyl sequence).
    """
    return ((int(offset * 2.0**64) + sample * _GOLDEN) % (1 << 64)) / 2.0**64


def min_snr_weights(schedule: Schedule, t: Int[Tensor, " B"], gamma: float) -> Float[Tensor, " B"]:
    """Return the min-SNR weight of each sample's loss.

    min(SNR, gamma) weighs the error of x_0; for the error of eps it is divided by SNR, for that
    of v by SNR + 1. Source: Hang et al. 2023 (2303.09556), section 3.4.

    Args:
        gamma: 5 in the paper.
    """
    abar = schedule.abar[t.cpu()]
    snr = abar / (1 - abar)
    unit = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}
    return (snr.clamp(max=gamma) / unit[schedule.prediction]).float().to(t.device)


def mse_per_sample(
    predicted: Float[Tensor, "B ..."], target: Float[Tensor, "B ..."]
) -> Float[Tensor, " B"]:
    """Return the mean squared error of each sample, in float32."""
    return (predicted.float() - target.float()).square().flatten(1).mean(dim=1)


def learned_variance_losses(
    output: Float[Tensor, "B C2 ..."],
    x_0: Float[Tensor, "B C ..."],
    x_t: Float[Tensor, "B C ..."],
    t: Int[Tensor, " B"],
    schedule: Schedule,
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """Return mean squared error and variational bound (bits per dimension) of a learned variance.

    The first half of the output channels predicts x_0; the second interpolates log sigma^2 between
    the posterior's (-1) and beta's (+1). The bound has no gradient to the prediction. Their sum is
    the CDM's loss; the term of t = 0 is the likelihood of a discretised image, as released.
    Source: Nichol & Dhariwal 2021, sections 3.1 and 3.3; DiT.
    """
    predicted, share = output.float().chunk(2, dim=1)
    x_0, x_t = x_0.float(), x_t.float()
    mean = _posterior_mean(x_0, x_t, t, schedule)
    guess = _posterior_mean(predicted.detach(), x_t, t, schedule)
    true_log, upper = (_at(v, t, x_t) for v in (schedule.posterior_log, schedule.betas.log()))
    log_sigma2 = true_log + (share + 1) / 2 * (upper - true_log)
    kl = 0.5 * (
        log_sigma2
        - true_log
        - 1
        + (true_log - log_sigma2).exp()
        + (mean - guess).square() * (-log_sigma2).exp()
    )
    nll = -_discretised(x_0, guess, 0.5 * log_sigma2)
    first = (t == 0).reshape(-1, *[1] * (x_0.ndim - 1))
    bound = torch.where(first, nll, kl).flatten(1).mean(dim=1) / math.log(2)
    return mse_per_sample(predicted, x_0), bound


def _posterior_mean(x_0: Tensor, x_t: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """Return the mean of q(x_{t-1} | x_t, x_0) (DDPM, Eq. 7)."""
    abar, betas = schedule.abar, schedule.betas
    before = torch.cat([torch.ones_like(abar[:1]), abar[:-1]])
    to_x_0 = betas * before.sqrt() / (1 - abar)
    to_x_t = (1 - before) * (1 - betas).sqrt() / (1 - abar)
    return _at(to_x_0, t, x_t) * x_0 + _at(to_x_t, t, x_t) * x_t


def _at(values: Tensor, t: Tensor, like: Tensor) -> Tensor:
    return values[t.cpu()].to(like).reshape(-1, *[1] * (like.ndim - 1))


def _discretised(x: Tensor, mean: Tensor, log_sigma: Tensor) -> Tensor:
    """Return the log likelihood of values on 256 levels in [-1, 1] under a Gaussian."""

    def below(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    plus = below((x - mean + 1 / 255) * (-log_sigma).exp())
    minus = below((x - mean - 1 / 255) * (-log_sigma).exp())
    inside = (plus - minus).clamp_min(1e-12)
    ends = torch.where(x > 0.999, (1 - minus).clamp_min(1e-12), inside)
    return torch.where(x < -0.999, plus.clamp_min(1e-12), ends).log()
