"""Noise schedules: alpha-bar over training timesteps, and the timesteps of samplers.

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
"""What a network may predict; `sample` is x_0."""


class SamplerStep(NamedTuple):
    """One step of a sampler: from timestep t, at `abar`, down to `abar_prev`.

    `beta` is the variance of training step t; only `steps.ancestral` uses it.
    """

    t: int
    abar: float
    abar_prev: float
    beta: float = 0.0


@dataclass(frozen=True)
class Schedule:
    """A noise schedule of `length` training timesteps; `prediction` is one of `PREDICTIONS`."""

    name: str = "scaled_linear"
    length: int = 1000
    beta_start: float = 0.0015
    beta_end: float = 0.0195
    prediction: str = "epsilon"

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction '{self.prediction}' is not {', '.join(PREDICTIONS)}")

    @cached_property
    def betas(self) -> Float[Tensor, " T"]:
        """Noise variance of each timestep, float64."""
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
    def abar(self) -> Float[Tensor, " T"]:
        """Cumulative products of 1 - beta, float64."""
        return torch.cumprod(1 - self.betas, dim=0)

    @cached_property
    def posterior_log(self) -> Float[Tensor, " T"]:
        """Logarithm of the posterior's variance, float64; entry 0, log 0, repeats entry 1."""
        before = torch.cat([torch.ones_like(self.abar[:1]), self.abar[:-1]])
        variance = self.betas * (1 - before) / (1 - self.abar)
        return torch.cat([variance[1:2], variance[1:]]).log()

    def at(self, t: Int[Tensor, " B"] | int, like: Float[Tensor, "B ..."]) -> Float[Tensor, "..."]:
        """Return alpha-bar at each sample's timestep, shaped to broadcast over `like`."""
        values = self.abar[torch.as_tensor(t, device="cpu")].to(like)
        return values.reshape(-1, *[1] * (like.ndim - 1))

    def noised(
        self, x_0: Float[Tensor, "B ..."], eps: Float[Tensor, "B ..."], t: Int[Tensor, " B"] | int
    ) -> Float[Tensor, "B ..."]:
        """Return x_t of a clean x_0 and noise eps."""
        abar = self.at(t, x_0)
        return abar.sqrt() * x_0 + (1 - abar).sqrt() * eps

    def x_0(
        self,
        x_t: Float[Tensor, "B ..."],
        output: Float[Tensor, "B ..."],
        t: Int[Tensor, " B"] | int,
    ) -> Float[Tensor, "B ..."]:
        """Return the clean sample x_0 that a network's output implies."""
        abar = self.at(t, x_t)
        if self.prediction == "epsilon":
            return (x_t - (1 - abar).sqrt() * output) / abar.sqrt()
        if self.prediction == "v_prediction":
            return abar.sqrt() * x_t - (1 - abar).sqrt() * output
        return output

    def target(
        self, x_0: Float[Tensor, "B ..."], eps: Float[Tensor, "B ..."], t: Int[Tensor, " B"] | int
    ) -> Float[Tensor, "B ..."]:
        """Return what a network should predict for a clean sample and its noise."""
        abar = self.at(t, x_0)
        if self.prediction == "epsilon":
            return eps
        if self.prediction == "v_prediction":
            return abar.sqrt() * eps - (1 - abar).sqrt() * x_0
        return x_0

    def steps(self, count: int) -> list[SamplerStep]:
        """Return the published uniform steps, noisiest first: t = 1 + i (T // count).

        50 steps are 981 … 1. The last step ends at alpha-bar of timestep 0, not at 1.

        Raises:
            ValueError: more steps than the schedule has.
        """
        if not 1 <= count < self.length:
            raise ValueError(f"{count} steps do not fit a schedule of {self.length}")
        stride = self.length // count
        ts = [1 + i * stride for i in range(count)]
        before = [0, *ts[:-1]]
        return [
            SamplerStep(t, float(self.abar[t]), float(self.abar[s]))
            for t, s in zip(ts[::-1], before[::-1], strict=True)
        ]

    def respaced(self, count: int) -> list[SamplerStep]:
        """Return Improved DDPM's steps from timestep T - 1 to 0, noisiest first, ending at abar 1.

        Source: `space_timesteps` of the CDM's released code: round(i (T - 1) / (count - 1)).
        Like that code, `abar_prev` is rounded to float32, which near 1 changes 1 - abar by a part
        in a thousand.

        Raises:
            ValueError: fewer steps than 2, or more than the schedule has.
        """
        if not 2 <= count <= self.length:
            raise ValueError(f"{count} respaced steps do not fit a schedule of {self.length}")
        ts = [round(i * (self.length - 1) / (count - 1)) for i in range(count)]
        before = [1.0, *(float(self.abar[t].float()) for t in ts[:-1])]
        pairs = zip(ts[::-1], before[::-1], strict=True)
        return [SamplerStep(t, float(self.abar[t]), previous) for t, previous in pairs]

    def strided(self, first: int, stride: int) -> list[SamplerStep]:
        """Return the steps of the released large-image code: first, first - stride, … down to 0.

        At its timestep t that code reads abar[t - 1]. Here t is the index of abar, so its t0 = 300
        with stride 50 is `strided(299, 50)`, whose last step ends at abar[0].

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
