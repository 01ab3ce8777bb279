"""One step of a sampler: arithmetic on x_t and x_0, without networks.

Source: DDIM (Song et al. 2021), Eq. 12 and 16; eta = 1 is the ancestral variance.
"""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

from raylarge.diffusion.schedule import Step


def ddim(
    x_t: Float[Tensor, "B ..."],
    x_0: Float[Tensor, "B ..."],
    step: Step,
    eta: float = 0.0,
    noise: Float[Tensor, "B ..."] | None = None,
) -> Float[Tensor, "B ..."]:
    """x_{t-1} of x_t and the current estimate of x_0.

    Raises:
        ValueError: eta > 0 without noise.
    """
    abar, abar_prev = step.abar, step.abar_prev
    eps = (x_t - math.sqrt(abar) * x_0) / math.sqrt(1 - abar)
    sigma = eta * math.sqrt((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev))
    x_prev = math.sqrt(abar_prev) * x_0 + math.sqrt(1 - abar_prev - sigma**2) * eps
    if sigma == 0.0:
        return x_prev
    if noise is None:
        raise ValueError(f"eta = {eta} needs noise")
    return x_prev + sigma * noise
