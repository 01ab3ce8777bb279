"""What a worker computes for a request: trajectories of latents, pure functions of addresses.

Noise stands at (scale, row, column, step); step 0 is x_T. A window's trajectory needs only
its tokens, its block of the guide's frames and its address, so windows never wait for each
other. Source: Algorithm S2; DDIM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from raylarge.diffusion.noise import normal
from raylarge.diffusion.schedule import Step
from raylarge.diffusion.solvers import solve
from raylarge.diffusion.steps import ddim
from raylarge.geometry import Patch
from raylarge.models.autoencoder import Codec
from raylarge.models.denoiser import Denoiser
from raylarge.order import Order, Sampler
from raylarge.sampling.canvas import gather
from raylarge.sampling.constraint import correct
from raylarge.sampling.plan import Guide, Traced, Windows

Cells = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Networks:
    """What trajectories run on: a (guided) denoiser, an autoencoder and their patch."""

    denoiser: Denoiser
    autoencoder: Codec
    patch: Patch


def guide(
    networks: Networks, task: Guide, tokens: Float[Tensor, "1 n D"]
) -> Float[Tensor, "S1 3 P P"]:
    """The guide's whole trajectory: its S estimates decoded, then its finished image."""
    order, walk = task.order, _Walk(networks, task.order, task.scale, ((0, 0),), tokens)
    frames, x_t = [], walk.start()
    for i, step in enumerate(networks.denoiser.schedule.steps(order.sampler.steps)):
        x_0 = networks.denoiser(x_t, step.t, tokens)
        frames.append(networks.autoencoder.decode(x_0))
        x_t = walk.down(i, step, x_t, x_0)
    return torch.cat([*frames, networks.autoencoder.decode(x_t)]).float()


def windows(
    networks: Networks,
    task: Windows,
    tokens: Float[Tensor, "B n D"],
    frames: Float[Tensor, "s 3 P P"] | None,
    x_t: Float[Tensor, "B c p p"] | None,
) -> Float[Tensor, "B c p p"] | Traced:
    """A batch of windows through steps first .. last - 1.

    Args:
        frames: those of the window above, from step `frames_from` on; None samples
            unconstrained.
        x_t: the latents where the last chunk left them; None starts from noise.
    """
    sampler, traced = task.order.sampler, []
    walk = _Walk(networks, task.order, task.scale, task.windows, tokens)
    x_t = walk.start() if x_t is None else x_t.to(tokens)
    if sampler.solver != "ddim":  # they remember earlier steps: all are one request
        return solve(
            lambda x, t: networks.denoiser(x, t, tokens),
            x_t,
            networks.denoiser.schedule,
            sampler.solver,
            sampler.steps,
        )
    steps = networks.denoiser.schedule.steps(sampler.steps)
    for i in range(task.first, task.last):

        def x_0(x: Tensor, t: int = steps[i].t) -> Tensor:
            return networks.denoiser(x, t, tokens)

        if frames is not None:
            y = blocks(frames[i - task.frames_from].to(tokens), task, sampler)
            for _ in range(sampler.inner):
                x_t = correct(x_t, x_0, networks.autoencoder, y, sampler)
        estimate = x_0(x_t)
        if task.traced:
            traced.append(networks.autoencoder.decode(estimate).float())
        x_t = walk.down(i, steps[i], x_t, estimate)
    return Traced(x_t, torch.stack(traced)) if task.traced else x_t


def blocks(
    frame: Float[Tensor, "3 P P"], task: Windows, sampler: Sampler
) -> Float[Tensor, "B 3 q q"]:
    """Each window's block of one frame of the window above, which is the same for all."""
    octaves = (task.guided_by or 0) - task.scale
    side, per = frame.shape[-1] >> octaves, 1 << octaves
    frame = frame.clamp(-1, 1) if sampler.clamp else frame
    places = [(row % per * side, column % per * side) for row, column in task.windows]
    return gather(frame, places, side)


@dataclass(frozen=True)
class _Walk:
    """Where a batch of windows stands in the noise, and how it takes a step."""

    networks: Networks
    order: Order
    scale: int
    cells: Cells
    like: Tensor

    def start(self) -> Tensor:
        return self._noise(0)

    def down(self, i: int, step: Step, x_t: Tensor, x_0: Tensor) -> Tensor:
        eta = self.order.sampler.eta
        return ddim(x_t, x_0, step, eta, self._noise(i + 1) if eta else None)

    def _noise(self, step: int) -> Tensor:
        addresses = [(self.scale, row, column, step) for row, column in self.cells]
        latent = self.networks.patch.latent
        return normal(latent, self.order.seed, "sampling", addresses).to(self.like)
