"""Single steps of samplers: arithmetic on x_t and x_0, without networks.

Source: DDIM (Song et al. 2021), Eq. 12 and 16; eta = 1 is the ancestral variance between the
sampler's own steps. `ancestral` is the step of the papers' released large-image code.
"""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

from raylarge.diffusion.schedule import SamplerStep


def eps_of(x_t: Tensor, x_0: Tensor, abar: float) -> Tensor:
    """Return the noise that an estimate of x_0 implies."""
    return (x_t - math.sqrt(abar) * x_0) / math.sqrt(1 - abar)


def x_0_of(x_t: Tensor, eps: Tensor, abar: float) -> Tensor:
    """Return the clean sample that an estimate of the noise implies."""
    return (x_t - math.sqrt(1 - abar) * eps) / math.sqrt(abar)


def ddim(
    x_t: Float[Tensor, "B ..."],
    x_0: Float[Tensor, "B ..."],
    step: SamplerStep,
    eta: float = 0.0,
    noise: Float[Tensor, "B ..."] | None = None,
) -> Float[Tensor, "B ..."]:
    """Return x_{t-1} of x_t and the current estimate of x_0.

    Raises:
        ValueError: eta > 0 without noise.
    """
    abar, abar_prev = step.abar, step.abar_prev
    sigma = eta * math.sqrt((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev))
    return _down(x_t, x_0, step, sigma, noise)


def ancestral(
    x_t: Float[Tensor, "B ..."],
    x_0: Float[Tensor, "B ..."],
    step: SamplerStep,
    noise: Float[Tensor, "B ..."],
) -> Float[Tensor, "B ..."]:
    """Return x_{t-s} with the posterior variance of a *single* training step, as released.

        x = sqrt(abar') x_0 + sqrt(1 - abar' - b) eps + sqrt(b) noise,
        b = beta_t (1 - abar') / (1 - abar)

    The last step adds noise too.
    """
    sigma = math.sqrt(step.beta * (1 - step.abar_prev) / (1 - step.abar))
    return _down(x_t, x_0, step, sigma, noise)


def _down(
    x_t: Tensor, x_0: Tensor, step: SamplerStep, sigma: float, noise: Tensor | None
) -> Tensor:
    eps = eps_of(x_t, x_0, step.abar)
    x_prev = math.sqrt(step.abar_prev) * x_0 + math.sqrt(1 - step.abar_prev - sigma**2) * eps
    if sigma == 0.0:
        return x_prev
    if noise is None:
        raise ValueError("eta > 0 needs noise")
    return x_prev + sigma * noise
