"""One canvas of overlapping windows, step by step, in bands: strided sampling, seam removal.

    band j of step i  <-  bands j - 1, j, j + 1 of step i - 1
    reply [2 c + 1, rows, W]: x_t, the sum of the band's windows' weighted x_0, their weights

A band is one patch high and owns the windows that begin in it; they reach into the band below
at most. So each reply covers two bands, and three replies give the next x_t of both, summed
from the top: the bytes depend on the canvas, never on who computes a band. Noise stands at
(scale, row, column, step) of patches, as everywhere. Source: Graikos et al., section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from raylarge.diffusion.noise import normal
from raylarge.diffusion.schedule import SamplerStep, Schedule
from raylarge.diffusion.steps import ancestral, ddim
from raylarge.geometry import batches, origins
from raylarge.order import Order
from raylarge.sampling.canvas import gather, kernel
from raylarge.sampling.tasks import DenoiseBand

Estimate = Callable[[Tensor, list[int], int], Tensor]
"""(windows of x_t [B, c, s, s], their indices, t) -> estimates of x_0."""


def starts(length: int, side: int, stride: int, band: int) -> list[int]:
    """Window origins along the rows of a canvas that begin in a band."""
    return [o for o in origins(length, side, stride) if o // side == band]


def rows_of(length: int, side: int, band: int) -> tuple[int, int]:
    """The rows that a band's windows reach: its own and those of the band below."""
    return band * side, min(length, (band + 2) * side)


REFINE_STEPS = 6


def steps_of(order: Order, schedule: Schedule, refine: bool) -> list[SamplerStep]:
    """The steps of strided sampling, or of seam removal (released: t0 = 300 by 50)."""
    return schedule.strided(299, 50) if refine else schedule.steps(order.sampler.steps)


class BandCanvas:
    """What a band's request computes with.

    Args:
        task: whose band, step and windows.
        latent: shape of a patch's latent, (c, s, s).
        factor: pixels per latent cell.
        schedule: the denoiser's.
    """

    def __init__(
        self, task: DenoiseBand, latent: tuple[int, int, int], factor: int, schedule: Schedule
    ) -> None:
        self.task, self.schedule = task, schedule
        self.channels, self.side = latent[0], latent[1]
        self.height, self.width = (length // factor for length in task.order.size)
        self.top, self.bottom = rows_of(self.height, self.side, task.band)
        self.rows = (self.top, self.bottom)
        self.steps = steps_of(task.order, schedule, task.refine)

    def start(self, latent: Tensor | None) -> Float[Tensor, "c rows W"]:
        """x_T: noise, or a finished latent noised to where seam removal begins."""
        noise = self._noise(0, self.top, self.bottom)
        if latent is None:
            return noise
        clean = latent.float()  # canvases are float32, whatever the networks are
        return self.schedule.noised(clean[None], noise.to(clean)[None], self.steps[0].t)[0]

    def next_x_t(self, replies: Sequence[tuple[int, Tensor]]) -> Float[Tensor, "c rows W"]:
        """x_t of this step from the replies of the last, as (band, reply) from the top."""
        i = self.task.step - 1
        shape = (2 * self.channels + 1, self.bottom - self.top, self.width)
        total = replies[0][1].new_zeros(shape)
        c = self.channels
        for band, reply in replies:
            first = band * self.side
            low, high = max(first, self.top), min(first + reply.shape[1], self.bottom)
            if low >= high:
                continue
            here, there = slice(low - self.top, high - self.top), slice(low - first, high - first)
            total[c:, here] += reply[c:, there]
            if band >= self.task.band:  # the rows of x_t: each from its own band
                total[:c, here] = reply[:c, there]
        x_t, x_0 = total[:c], total[c : 2 * c] / total[2 * c :]
        return self._step(x_t, x_0, i)

    def reply(
        self, x_t: Float[Tensor, "c rows W"], estimate: Estimate
    ) -> Float[Tensor, "d rows W"]:
        """The reply: x_t, and the weighted estimates of the band's windows."""
        c, side, task = self.channels, self.side, self.task
        gaussian = task.order.strided.average == "gaussian" and not task.refine
        weight = (kernel(side) if gaussian else torch.ones(side, side)).to(x_t)
        reply = torch.cat([x_t, torch.zeros_like(x_t), torch.zeros_like(x_t[:1])])
        places = [(r - self.top, k) for r, k in task.windows]
        t = self.steps[task.step].t
        for group in batches(len(places), task.order.batch):
            cut = gather(x_t, [places[n] for n in group], side)
            estimates = estimate(cut, list(group), t)
            for n, x_0 in zip(dict.fromkeys(group), estimates, strict=False):
                r, k = places[n]
                reply[c : 2 * c, r : r + side, k : k + side] += weight * x_0
                reply[2 * c :, r : r + side, k : k + side] += weight
        return reply

    def _step(self, x_t: Tensor, x_0: Tensor, i: int) -> Tensor:
        eta = 0.0 if self.task.refine else self.task.order.sampler.eta
        if not (eta or self.task.refine):
            return ddim(x_t, x_0, self.steps[i])
        noise = self._noise(i + 1, self.top, self.bottom).to(x_t)
        if self.task.refine:
            return ancestral(x_t, x_0, self.steps[i], noise)
        return ddim(x_t, x_0, self.steps[i], eta, noise)

    def _noise(self, step: int, top: int, bottom: int) -> Float[Tensor, "c rows W"]:
        """Noise of the rows, cut from whole patches at their addresses."""
        side, order = self.side, self.task.order
        stream = "refine" if self.task.refine else "sampling"
        bands = []
        for row in range(top // side, -(-bottom // side)):
            columns = range(-(-self.width // side))
            at = [(order.scale, row, column, step) for column in columns]
            patches = normal((self.channels, side, side), order.seed, stream, at)
            bands.append(torch.cat(list(patches), dim=2)[:, :, : self.width])
        return torch.cat(bands, dim=1)[:, : bottom - top]
