"""Seam removal: a finished latent canvas noised a little and denoised with overlapping windows.

    x_0 -noise to t0-> x_t -[average of overlapping windows' x_0, ancestral step] x 6-> x_0'

t0 = 300 by steps of 50, windows a quarter side apart, as released. Source: ZoomLDM's released
code (`postprocess`); its guidance 2 is 3 in our form, and its networks are told t + 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from raylarge.diffusion.steps import ancestral
from raylarge.models.denoiser import Denoiser
from raylarge.sampling.canvas import Windows
from raylarge.sampling.strided import averaged


@dataclass(frozen=True)
class Refine:
    """How far back seam removal goes, and in which steps.

    Attributes:
        first: timestep that the latent is noised to (abar's index; released: 300 - 1).
        stride: timesteps per step.
        batch: windows per call of the denoiser.
    """

    first: int = 299
    stride: int = 50
    batch: int = 16


def remove_seams(
    denoiser: Denoiser,
    latent: Float[Tensor, "c H W"],
    windows: Windows,
    contexts: Float[Tensor, "n t D"],
    noise: Callable[[int], Tensor],
    how: Refine,
) -> Float[Tensor, "c H W"]:
    """The canvas without the seams between its patches.

    Args:
        denoiser: guided.
        windows: origins of windows of the denoiser's side, all over the canvas.
        contexts: each window's tokens.
        noise: the k-th draw in the canvas' shape; 0 noises the latent, k the k-th step.
    """
    side = latent.shape[-1] - max(column for _, column in windows)
    schedule, weight = denoiser.schedule, latent.new_ones(side, side)
    x_t = schedule.noised(latent[None], noise(0)[None], how.first)[0]
    for k, step in enumerate(schedule.strided(how.first, how.stride), start=1):

        def estimate(cut: Tensor, indices: list[int], t: int = step.t) -> Tensor:
            return denoiser(cut, t, contexts[indices])

        x_0 = averaged(estimate, x_t, windows, weight, how.batch)
        x_t = ancestral(x_t, x_0, step, noise(k))
    return x_t
