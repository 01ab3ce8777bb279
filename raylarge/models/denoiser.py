"""Denoisers: functions from x_t, a timestep and a context to the estimate of x_0.

This signature is all that sampling needs of a model. Guidance is a denoiser that wraps another,
and a Gaussian in closed form is one too, with which samplers are tested without weights.
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
    """A denoiser whose context is fixed."""

    def __call__(self, x_t: Tensor, t: int) -> Tensor:
        """Return the estimate of x_0."""
        ...


@runtime_checkable
class Denoiser(Protocol):
    """E[x_0 | x_t] for a batch at one timestep."""

    schedule: Schedule

    def __call__(
        self, x_t: Float[Tensor, "B c h w"], t: int, context: Float[Tensor, "B n D"]
    ) -> Float[Tensor, "B c h w"]:
        """Return the estimate of x_0."""
        ...


class NetworkDenoiser:
    """A denoiser from a U-Net that predicts noise, v or x_0.

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
        """Return the estimate of x_0 in the precision of x_t; the U-Net computes in its own."""
        return self._x_0(context, x_t, t)

    def bind(self, context: Float[Tensor, "B n D"]) -> BoundDenoiser:
        """See `bind_context`; keys and values of the tokens are computed once."""
        prepare = getattr(self.unet, "context", None)
        prepared = prepare(context) if prepare else context
        return lambda x_t, t: self._x_0(prepared, x_t, t)

    def _x_0(self, context: Any, x_t: Tensor, t: int) -> Tensor:
        z, shifted = x_t.to(getattr(self.unet, "dtype", x_t.dtype)), t + self.timestep_offset
        if self.compiled is None or linearizing():
            return self.schedule.x_0(x_t, self.unet(z, shifted, context).to(x_t), t)
        timestep = torch.tensor(shifted, device=x_t.device)  # an int would be compiled in
        return self.schedule.x_0(x_t, self.compiled(z, timestep, context).to(x_t), t)


class Guided:
    """Classifier-free guidance in its standard form, u + w (c - u), with both in one batch.

    Guiding x_0 or eps is the same, since x_0 is affine in eps.

    Args:
        denoiser: the one to guide.
        w: guidance scale.
        null: tokens of the null condition [1, n, D], under which u is computed; zeros, as in
            ZoomLDM, by default.
        interval: shares of the schedule outside of which timesteps are not guided (Kynkaanniemi
            et al. 2024).
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
        """Return the guided estimate of x_0."""
        return self.bind(context)(x_t, t)

    def bind(self, context: Float[Tensor, "B n D"]) -> BoundDenoiser:
        """See `bind_context`."""
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
    """Return whether a share of the schedule lies in a closed interval."""
    return interval[0] <= share <= interval[1]


def bind_context(denoiser: Denoiser, context: Float[Tensor, "B n D"]) -> BoundDenoiser:
    """Fix the context of a denoiser; what depends only on the context is computed once."""
    bind = getattr(denoiser, "bind", None)
    return bind(context) if bind else lambda x_t, t: denoiser(x_t, t, context)


def guided(
    denoiser: Denoiser,
    w: float,
    null: Tensor | None = None,
    interval: tuple[float, float] = ALWAYS,
) -> Denoiser:
    """Return a denoiser with guidance w; for w = 1 the denoiser itself."""
    return denoiser if w == 1.0 else Guided(denoiser, w, null, interval)


def standard_guidance(published: float) -> float:
    """Return our w for that of the papers' large-image code, (1 + w) c - w u: its 2 is our 3."""
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
        """Return the posterior mean."""
        abar = self.schedule.at(t, x_t)
        mean, variance = self.mean.to(x_t), self.variance.to(x_t)
        gain = abar.sqrt() * variance / (abar * variance + 1 - abar)
        return mean + gain * (x_t - abar.sqrt() * mean)
