"""Noise schedules: alpha-bar over training timesteps, and the spacing that samplers walk.

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps                       (DDPM, Eq. 4)

Published (Latent Diffusion, ZoomLDM): `scaled_linear`, 1000 steps from .0015 to .0195, and
networks that predict eps. The CDM (DiT) uses `squaredcos` and predicts x_0. v is that of
Salimans & Ho (2022): v = sqrt(abar) eps - sqrt(1 - abar) x_0. Timesteps are 0 .. T - 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

PREDICTIONS = ("epsilon", "v_prediction", "sample")
"""What a network may give; `sample` is x_0."""


class SamplerStep(NamedTuple):
    """One step of a sampler: from timestep t, at `abar`, down to `abar_prev`.

    `beta` is the variance of training step t, which only `steps.ancestral` reads.
    """

    t: int
    abar: float
    abar_prev: float
    beta: float = 0.0


@dataclass(frozen=True)
class Schedule:
    """A named schedule; everything about it follows from its name and length.

    `prediction` is what a network gives: one of `PREDICTIONS`.
    """

    name: str = "scaled_linear"
    length: int = 1000
    beta_start: float = 0.0015
    beta_end: float = 0.0195
    prediction: str = "epsilon"

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            known = ", ".join(PREDICTIONS)
            raise ValueError(f"prediction '{self.prediction}' is not {known}")

    @cached_property
    def betas(self) -> Float[Tensor, "T"]:
        """Per-step noise variances, float64."""
        if self.name == "scaled_linear":
            roots = torch.linspace(
                self.beta_start**0.5, self.beta_end**0.5, self.length, dtype=torch.float64
            )
            return roots**2
        if self.name == "linear":
            return torch.linspace(self.beta_start, self.beta_end, self.length, dtype=torch.float64)
        if self.name == "squaredcos":  # Improved DDPM, Eq. 17; betas clipped at .999
            edges = torch.arange(self.length + 1, dtype=torch.float64) / self.length
            abar = torch.cos((edges + 0.008) / 1.008 * math.pi / 2) ** 2
            return (1 - abar[1:] / abar[:-1]).clamp(max=0.999)
        raise ValueError(f"unknown schedule '{self.name}'; scaled_linear, linear or squaredcos")

    @cached_property
    def abar(self) -> Float[Tensor, "T"]:
        """Cumulative products of 1 - beta, float64."""
        return torch.cumprod(1 - self.betas, dim=0)

    @cached_property
    def posterior_log(self) -> Float[Tensor, "T"]:
        """Logarithm of the posterior's variance, its first entry that of the second, float64."""
        before = torch.cat([torch.ones_like(self.abar[:1]), self.abar[:-1]])
        variance = self.betas * (1 - before) / (1 - self.abar)
        return torch.cat([variance[1:2], variance[1:]]).log()

    def at(self, t: Int[Tensor, "B"] | int, like: Float[Tensor, "B ..."]) -> Float[Tensor, "..."]:
        """alpha-bar at each sample's timestep, shaped to broadcast over `like`."""
        values = self.abar[torch.as_tensor(t, device="cpu")].to(like)
        return values.reshape(-1, *[1] * (like.ndim - 1))

    def noised(
        self, x_0: Float[Tensor, "B ..."], eps: Float[Tensor, "B ..."], t: Int[Tensor, "B"] | int
    ) -> Float[Tensor, "B ..."]:
        """x_t of a clean x_0 and noise eps."""
        abar = self.at(t, x_0)
        return abar.sqrt() * x_0 + (1 - abar).sqrt() * eps

    def x_0(
        self, x_t: Float[Tensor, "B ..."], output: Float[Tensor, "B ..."], t: Int[Tensor, "B"] | int
    ) -> Float[Tensor, "B ..."]:
        """The clean sample that a network's output implies."""
        abar = self.at(t, x_t)
        if self.prediction == "epsilon":
            return (x_t - (1 - abar).sqrt() * output) / abar.sqrt()
        if self.prediction == "v_prediction":
            return abar.sqrt() * x_t - (1 - abar).sqrt() * output
        return output

    def target(
        self, x_0: Float[Tensor, "B ..."], eps: Float[Tensor, "B ..."], t: Int[Tensor, "B"] | int
    ) -> Float[Tensor, "B ..."]:
        """What a network should give for a clean sample and its noise."""
        abar = self.at(t, x_0)
        if self.prediction == "epsilon":
            return eps
        if self.prediction == "v_prediction":
            return abar.sqrt() * eps - (1 - abar).sqrt() * x_0
        return x_0

    def steps(self, count: int) -> list[SamplerStep]:
        """The published uniform spacing, noisiest first: t = 1 + i (T // count); 50 -> 981 … 1.

        The last step leads to alpha-bar of timestep 0, not to 1, as published.

        Raises:
            ValueError: more steps than the schedule has.
        """
        if not 1 <= count < self.length:
            raise ValueError(f"{count} steps do not fit a schedule of {self.length}")
        stride = self.length // count
        ts = [1 + i * stride for i in range(count)]
        before = [0, *ts[:-1]]
        pairs = [
            SamplerStep(t, float(self.abar[t]), float(self.abar[s]))
            for t, s in zip(ts, before, strict=True)
        ]
        return pairs[::-1]

    def respaced(self, count: int) -> list[SamplerStep]:
        """Improved DDPM's spacing from timestep 0 to T - 1, noisiest first; it ends at abar = 1.

        Source: `space_timesteps` of the CDM's released code: round(i (T - 1) / (count - 1)).
        Like that code it rounds the abar it steps to to float32: near abar = 1 that moves
        1 - abar by a part in a thousand.

        Raises:
            ValueError: fewer steps than 2, or more than the schedule has.
        """
        if not 2 <= count <= self.length:
            raise ValueError(f"{count} respaced steps do not fit a schedule of {self.length}")
        ts = [round(i * (self.length - 1) / (count - 1)) for i in range(count)]
        before = [1.0, *(float(self.abar[t].float()) for t in ts[:-1])]
        return [SamplerStep(t, float(self.abar[t]), b) for t, b in zip(ts, before, strict=True)][
            ::-1
        ]

    def strided(self, first: int, stride: int) -> list[SamplerStep]:
        """The released large-image walk: timesteps first, first - stride, … down to 0.

        Where the released loops say t they read abar[t - 1]; this is abar's own index, so their
        t0 = 300 with stride 50 is `strided(299, 50)`, whose last step leads to abar[0].

        Raises:
            ValueError: a timestep outside the schedule, or no stride.
        """
        if not (0 < first < self.length and stride > 0):
            raise ValueError(f"timestep {first} by {stride} does not fit {self.length} steps")
        ts = range(first, 0, -stride)
        return [
            SamplerStep(
                t, float(self.abar[t]), float(self.abar[max(t - stride, 0)]), float(self.betas[t])
            )
            for t in ts
        ]
