"""Denoisers: x_t, a timestep and a context in, the estimate of x_0 out.

Everything that sampling asks of a model is this one signature, so guidance is a wrapper and a
closed-form Gaussian is a model too: with it every sampler is tested without weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from raylarge.diffusion.linearize import linearizing
from raylarge.diffusion.schedule import Schedule
from raylarge.order import ALWAYS


@runtime_checkable
class BoundDenoiser(Protocol):
    """The estimate of x_0 under a context that is fixed."""

    def __call__(self, x_t: Tensor, t: int) -> Tensor:
        """The estimate of x_0."""
        ...


@runtime_checkable
class Denoiser(Protocol):
    """E[x_0 | x_t], for a batch at one timestep."""

    schedule: Schedule

    def __call__(
        self, x_t: Float[Tensor, "B c h w"], t: int, context: Float[Tensor, "B n D"]
    ) -> Float[Tensor, "B c h w"]:
        """The estimate of x_0."""
        ...


class NetworkDenoiser:
    """A U-Net as a denoiser, whatever the schedule says that it predicts.

    Args:
        unet: called as (x_t, t, context).
        schedule: says what the network predicts.
        timestep_offset: added to the timestep that the network receives. 0 as in training; the
            released large-image loops pass t + 1.
        compiled: the same U-Net, compiled; used wherever no derivative is needed.
    """

    def __init__(
        self,
        unet: Callable[..., Tensor],
        schedule: Schedule,
        timestep_offset: int = 0,
        compiled: Callable[..., Tensor] | None = None,
    ) -> None:
        self.unet, self.schedule, self.timestep_offset = unet, schedule, timestep_offset
        self.compiled = compiled

    def __call__(
        self, x_t: Float[Tensor, "B c h w"], t: int, context: Float[Tensor, "B n D"]
    ) -> Float[Tensor, "B c h w"]:
        """x_0 of the prediction, in x_t's precision; the U-Net sees its own."""
        return self._x_0(context, x_t, t)

    def bind(self, context: Float[Tensor, "B n D"]) -> BoundDenoiser:
        """As `bind_context` says; tokens' keys and values stay."""
        prepare = getattr(self.unet, "context", None)
        prepared = prepare(context) if prepare else context
        return lambda x_t, t: self._x_0(prepared, x_t, t)

    def _x_0(self, context: Any, x_t: Tensor, t: int) -> Tensor:
        told, z = t + self.timestep_offset, x_t.to(getattr(self.unet, "dtype", x_t.dtype))
        if self.compiled is None or linearizing():
            return self.schedule.x_0(x_t, self.unet(z, told, context).to(x_t), t)
        timestep = torch.tensor(told, device=x_t.device)  # a number would be compiled in
        return self.schedule.x_0(x_t, self.compiled(z, timestep, context).to(x_t), t)


class Guided:
    """Classifier-free guidance in its standard form: u + w (c - u), both in one batch.

    u is the estimate under `null`, the tokens of no condition [1, n, D]; zeros, as in ZoomLDM,
    if left out. x_0 is affine in eps: guiding either is the same. Timesteps outside of
    `interval`, shares of the schedule, are not guided (Kynkaanniemi et al. 2024).
    """

    def __init__(
        self,
        denoiser: Denoiser,
        w: float,
        null: Tensor | None = None,
        interval: tuple[float, float] = ALWAYS,
    ) -> None:
        self.denoiser, self.w, self.null, self.interval = denoiser, w, null, interval
        self.schedule = denoiser.schedule

    def __call__(
        self, x_t: Float[Tensor, "B c h w"], t: int, context: Float[Tensor, "B n D"]
    ) -> Float[Tensor, "B c h w"]:
        """The guided estimate of x_0."""
        return self.bind(context)(x_t, t)

    def bind(self, context: Float[Tensor, "B n D"]) -> BoundDenoiser:
        """As `bind_context` says."""
        null = torch.zeros_like(context) if self.null is None else self.null.expand_as(context)
        both = bind_context(self.denoiser, torch.cat([context, null.to(context)]))
        alone = both if self.interval == ALWAYS else bind_context(self.denoiser, context)

        def estimate(x_t: Tensor, t: int) -> Tensor:
            if not in_interval(self.interval, t / self.schedule.length):
                return alone(x_t, t)
            c, u = both(torch.cat([x_t, x_t]), t).chunk(2)
            return u + self.w * (c - u)

        return estimate


def in_interval(interval: tuple[float, float], share: float) -> bool:
    """Whether a share of the schedule lies in an interval, its ends included."""
    return interval[0] <= share <= interval[1]


def bind_context(denoiser: Denoiser, context: Float[Tensor, "B n D"]) -> BoundDenoiser:
    """The estimate under a context that stays: what depends on it alone is computed once."""
    bind = getattr(denoiser, "bind", None)
    return bind(context) if bind else lambda x_t, t: denoiser(x_t, t, context)


def guided(
    denoiser: Denoiser,
    w: float,
    null: Tensor | None = None,
    interval: tuple[float, float] = ALWAYS,
) -> Denoiser:
    """A denoiser under guidance w; w = 1 is the denoiser itself."""
    return denoiser if w == 1.0 else Guided(denoiser, w, null, interval)


def standard_guidance(published: float) -> float:
    """Our w for the papers' large-image code, which writes (1 + w) c - w u: its 2 is our 3."""
    return 1.0 + published


class GaussianDenoiser:
    """The exact denoiser of the prior N(mean, variance), per element.

        E[x_0 | x_t] = m + sqrt(abar) v (x_t - sqrt(abar) m) / (abar v + 1 - abar)

    `mean` and `variance` broadcast over [c, h, w]; the context is ignored.
    """

    def __init__(
        self, mean: Tensor | float, variance: Tensor | float, schedule: Schedule | None = None
    ) -> None:
        self.mean, self.variance = torch.as_tensor(mean), torch.as_tensor(variance)
        self.schedule = schedule or Schedule()

    def __call__(
        self, x_t: Float[Tensor, "B c h w"], t: int, context: Float[Tensor, "B n D"]
    ) -> Float[Tensor, "B c h w"]:
        """The posterior mean."""
        abar = self.schedule.at(t, x_t)
        mean, variance = self.mean.to(x_t), self.variance.to(x_t)
        gain = abar.sqrt() * variance / (abar * variance + 1 - abar)
        return mean + gain * (x_t - abar.sqrt() * mean)
