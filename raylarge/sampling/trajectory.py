"""Denoise the guide and batches of windows: the trajectories of latents.

Noise is a function of its address (scale, row, column, step); step 0 is x_T. A window's trajectory
needs only its tokens, its block of the guide's frames and its address, so windows are independent.
Source: Algorithm S2; DDIM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from raylarge.diffusion.noise import normal
from raylarge.diffusion.schedule import SamplerStep
from raylarge.diffusion.solvers import solve
from raylarge.diffusion.steps import ddim
from raylarge.geometry import Patch
from raylarge.models.autoencoder import Codec
from raylarge.models.denoiser import Denoiser, bind_context
from raylarge.order import Order
from raylarge.sampling.backprop import correct_by_backprop
from raylarge.sampling.canvas import gather
from raylarge.sampling.constraint import correct
from raylarge.sampling.tasks import DenoiseGuide, DenoiseWindows, Parts

Cells = Sequence[tuple[int, int]]
Target = Callable[[int], Tensor]
"""Step index -> what each window should be when made small, [B, 3, q, q]."""
CORRECTIONS = {"encoder": correct, "backprop": correct_by_backprop}


@dataclass(frozen=True)
class Networks:
    """What trajectories run on: a (guided) denoiser, an autoencoder and their patch.

    Attributes:
        corrector: the autoencoder of the correction, where it is another one.
    """

    denoiser: Denoiser
    autoencoder: Codec
    patch: Patch
    corrector: Codec | None = None

    @property
    def correcting(self) -> Codec:
        """What the correction decodes and encodes with."""
        return self.corrector or self.autoencoder


def guide(
    networks: Networks, task: DenoiseGuide, tokens: Float[Tensor, "1 n D"]
) -> Float[Tensor, "S1 3 P P"]:
    """The guide's whole trajectory: its S estimates decoded, then its finished image."""
    order, stepper = task.order, Stepper(networks, task.order, task.scale, ((0, 0),), tokens)
    frames, x_t, estimate = [], stepper.start(), bind_context(networks.denoiser, tokens)
    for i, step in enumerate(networks.denoiser.schedule.steps(order.sampler.steps)):
        x_0 = estimate(x_t, step.t)
        frames.append(networks.autoencoder.decode(x_0))
        x_t = stepper.step(i, step, x_t, x_0)
    return torch.cat([*frames, networks.autoencoder.decode(x_t)]).float()


def windows(
    networks: Networks,
    task: DenoiseWindows,
    tokens: Float[Tensor, "B n D"],
    target: Target | None,
    x_t: Float[Tensor, "B c p p"] | None,
) -> Float[Tensor, "B c p p"] | Parts:
    """A batch of windows through steps first .. last - 1.

    Args:
        target: what each window should look like when made small, by step; None samples
            unconstrained.
        x_t: the latents where the last chunk left them; None starts from noise.
    """
    sampler, traced = task.order.sampler, []
    correction = CORRECTIONS[sampler.correction]
    stepper = Stepper(networks, task.order, task.scale, task.windows, tokens)
    x_t = stepper.start() if x_t is None else x_t.to(stepper.dtype)
    schedule, estimate = networks.denoiser.schedule, bind_context(networks.denoiser, tokens)
    if sampler.solver != "ddim":  # they remember earlier steps: all are one request
        return solve(estimate, x_t, schedule, sampler.solver, sampler.steps)
    steps = schedule.steps(sampler.steps)
    for i in range(task.first, task.last):
        x_0 = partial(estimate, t=steps[i].t)
        if target is not None and i % sampler.correct_every == 0:
            y = target(i).to(x_t)
            for _ in range(sampler.corrections):
                x_t = correction(x_t, x_0, networks.correcting, y, sampler)
        clean = x_0(x_t)
        if task.traced:
            traced.append(networks.autoencoder.decode(clean).float())
        x_t = stepper.step(i, steps[i], x_t, clean)
    if not task.traced:
        return x_t
    # Each window's frames in memory of their own: they travel one by one.
    return Parts(x_t, tuple(frames.clone() for frames in torch.stack(traced, dim=1)))


def below(frames: Float[Tensor, "s 3 P P"], task: DenoiseWindows) -> Target:
    """What windows under one coarser window should look like: their blocks of its frames.

    Args:
        frames: of the window above, which is the same for all, from step `frames_from` on.
    """
    octaves = (task.guided_by or 0) - task.scale
    side, per = frames.shape[-1] >> octaves, 1 << octaves
    places = [(row % per * side, column % per * side) for row, column in task.windows]

    def target(step: int) -> Float[Tensor, "B 3 q q"]:
        frame = frames[step - task.frames_from]
        frame = frame.clamp(-1, 1) if task.order.sampler.clamp else frame
        return gather(frame, places, side)

    return target


@dataclass(frozen=True)
class Stepper:
    """Steps of a batch of windows, with noise at their addresses.

    Latents are float32 or better, whatever the networks see: a step changes their last digits.
    """

    networks: Networks
    order: Order
    scale: int
    cells: Cells
    like: Tensor

    def start(self) -> Tensor:
        """x_T."""
        return self._noise(0)

    def step(self, i: int, down: SamplerStep, x_t: Tensor, x_0: Tensor) -> Tensor:
        """The latents after step i."""
        eta = self.order.sampler.eta
        return ddim(x_t, x_0, down, eta, self._noise(i + 1) if eta else None)

    def _noise(self, step: int) -> Tensor:
        addresses = [(self.scale, row, column, step) for row, column in self.cells]
        latent = self.networks.patch.latent
        noise = normal(latent, self.order.seed, "sampling", addresses)
        return noise.to(self.like.device, self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Of the latents."""
        return torch.promote_types(self.like.dtype, torch.float32)
