"""The published sampling loops as printed, as a baseline: slow, plain, one process.

Algorithm S2 of ZoomLDM walks all scales step by step and its windows one by one; conditional and
unconditional predictions are separate calls; each call copies the averaged weights into the
network and the trained ones back (`ema_scope`); the canvas is decoded window by window.
A, the noise and the networks are ours, so that both compute the same image.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from raylarge.diffusion.noise import normal
from raylarge.diffusion.schedule import SamplerStep
from raylarge.diffusion.steps import ddim
from raylarge.geometry import windows
from raylarge.models.bundle import Bundle
from raylarge.order import Order
from raylarge.resample import downsample, upsample
from raylarge.sampling.canvas import kernel


class Average:
    """Moving average of a network's parameters (here equal to them)."""

    def __init__(self, network: nn.Module) -> None:
        self.parameters = list(network.parameters())
        self.average = [p.detach().clone() for p in self.parameters]

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Give the network the averaged parameters inside the context."""
        trained = [p.detach().clone() for p in self.parameters]
        for p, average in zip(self.parameters, self.average, strict=True):
            p.data.copy_(average)
        yield
        for p, before in zip(self.parameters, trained, strict=True):
            p.data.copy_(before)


@dataclass(frozen=True)
class Published:
    """The loops on a bundle.

    Attributes:
        average: of the U-Net's parameters.
        together: windows per call; 1 is the loop over windows as printed.
    """

    bundle: Bundle
    order: Order
    average: Average
    together: int = 1

    @torch.no_grad()
    def latents(self, grid: Float[Tensor, "C h w"]) -> Float[Tensor, "n c p p"]:
        """Run Algorithm S2: return latents of all windows, row by row, for one embedding each."""
        rows, columns = grid.shape[1:]
        places, k = windows((rows, columns), 1, 1), self.order.guide(self.bundle.patch).k
        tokens = torch.cat([self._tokens(grid[:, r : r + 1, c : c + 1], 0) for r, c in places])
        above, q = self._tokens(grid, k), self.bundle.patch.side_px >> k
        z = torch.cat([self._noise(0, r, c) for r, c in places]).to(tokens)
        z_above = self._noise(k, 0, 0).to(tokens)
        for step in self.bundle.schedule.steps(self.order.sampler.steps):
            x_0 = self.x_0(z_above, step.t, above)
            y = cut(self.bundle.vae.decode(x_0)[0], [(r * q, c * q) for r, c in places], q)
            z_above = ddim(z_above, x_0, step)
            for i in range(0, len(places), self.together):
                here = slice(i, i + self.together)
                z[here] = self._walk(z[here], step, tokens[here], y[here])
        return z

    def _walk(self, z: Tensor, step: SamplerStep, tokens: Tensor, y: Tensor) -> Tensor:
        """Apply K corrections and a DDIM step, in the letters of Algorithm S2 (descending)."""
        sampler, vae = self.order.sampler, self.bundle.vae
        delta = zeta = sampler.fd_epsilon
        for _ in range(sampler.corrections):
            z_0 = self.x_0(z, step.t, tokens)
            image = vae.decode(z_0)
            factor = image.shape[-1] // y.shape[-1]
            e_img = upsample(y - downsample(image, factor), factor)
            e = (vae.encode(image + zeta * e_img) - vae.encode(image)) / zeta
            g = (self.x_0(z + delta * e, step.t, tokens) - z_0) / delta
            z = z + sampler.correction_lr * g
        return ddim(z, self.x_0(z, step.t, tokens), step)

    def x_0(self, z: Tensor, t: int, tokens: Tensor) -> Tensor:
        """Return the guided estimate from two calls, each with averaged parameters."""
        null = self.bundle.summarizer.null(len(z)).to(z)
        with self.average.scope():
            c = self.bundle.unet(z, t, tokens)
        with self.average.scope():
            u = self.bundle.unet(z, t, null)
        eps = u + self.order.sampler.guidance * (c - u)
        return self.bundle.schedule.x_0(z, eps, t)

    @torch.no_grad()
    def image(self, z: Float[Tensor, "n c p p"], rows: int) -> Float[Tensor, "3 H W"]:
        """Decode window by window at strides of a quarter, and blend."""
        patch, side = self.bundle.patch, self.bundle.patch.side_px
        canvas = z.unflatten(0, (rows, -1)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
        size = (canvas.shape[1] * patch.factor, canvas.shape[2] * patch.factor)
        total, mass, weight = z.new_zeros(3, *size), z.new_zeros(1, *size), kernel(side).to(z)
        for r, c in windows(size, side, side // 4):
            at = (r // patch.factor, c // patch.factor)
            image = self.bundle.vae.decode(cut(canvas, [at], patch.side_lat))[0]
            total[:, r : r + side, c : c + side] += weight * image
            mass[:, r : r + side, c : c + side] += weight
        return total / mass

    def _tokens(self, grid: Float[Tensor, "C h w"], scale: int) -> Float[Tensor, "1 n D"]:
        tokens: Tensor = self.bundle.summarizer(grid[None], torch.tensor([scale]))
        return tokens

    def _noise(self, scale: int, row: int, column: int) -> Float[Tensor, "1 c p p"]:
        address = (scale, row, column, 0)
        return normal(self.bundle.patch.latent, self.order.seed, "sampling", [address])


def cut(canvas: Float[Tensor, "c H W"], places: list[tuple[int, int]], side: int) -> Tensor:
    """Cut windows out of a canvas."""
    return torch.stack([canvas[:, r : r + side, c : c + side] for r, c in places])
