"""The worker: a bundle that answers requests, one at a time, on one device.

It knows the models and nothing of plans, orders in flight or other workers. The same object
answers in a notebook (`plan.run`), in an actor pool and behind Ray Serve.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatchmethod
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from raylarge import images
from raylarge.errors import UserError
from raylarge.geometry import batches
from raylarge.images import to_uint8
from raylarge.models.bundle import Bundle
from raylarge.models.cells import SIDE
from raylarge.models.denoiser import Denoiser, NetworkDenoiser, guided
from raylarge.order import Order
from raylarge.sampling import bands, canvas, invert, strided, superres, trajectory
from raylarge.sampling.tasks import (
    Band,
    Decode,
    DecodeEach,
    Draw,
    Given,
    Guide,
    Invert,
    Task,
    Traced,
    Windows,
)


class Worker:
    """Answers the requests of any plan with one bundle.

    Args:
        bundle: the models.
        denoiser: in place of the bundle's own, for closed-form tests.
    """

    def __init__(self, bundle: Bundle, denoiser: Denoiser | None = None) -> None:
        self.bundle = bundle
        self._denoiser = denoiser or bundle.denoiser()
        # The released seam removal tells its network t + 1, and so does ours.
        self._told_late = denoiser or NetworkDenoiser(bundle.unet, bundle.schedule, late=1)

    @torch.no_grad()
    def answer(self, task: Task, *inputs: Any) -> Any:
        """The reply to a task, from the replies it takes; both on the CPU, wherever the models are.

        Raises:
            UserError: the bundle lacks what the task needs.
        """
        device = self.bundle.device
        moved = [i.to(device) if isinstance(i, Tensor) else i for i in inputs]
        reply = self._answer(task, *moved)
        if isinstance(reply, Traced):
            return Traced(*(part.cpu() for part in reply))
        return reply.cpu() if isinstance(reply, Tensor) else reply

    @singledispatchmethod
    def _answer(self, task: Task, *inputs: Any) -> Any:
        raise TypeError(f"no worker answers {type(task).__name__}")

    @_answer.register
    def _draw(self, task: Draw, *inputs: Tensor) -> Float[Tensor, "B ..."]:
        if task.kind == "inverted":
            return self._from_inverted(task, *inputs)
        how: dict[str, Callable[[Draw], Tensor]] = {
            "null": self._null,
            "cdm": self._from_cdm,
            "embeddings": self._from_embeddings,
            "between": self._between,
        }
        return how[task.kind](task)

    @_answer.register
    def _guide(self, task: Guide, tokens: Tensor) -> Float[Tensor, "S1 3 P P"]:
        return trajectory.guide(self._networks(task.order, tokens), task, tokens)

    @_answer.register
    def _windows(self, task: Windows, tokens: Tensor, *rest: Tensor) -> Tensor | Traced:
        replies, wanted = list(rest), None
        above = replies.pop(0) if task.guided_by is not None else None
        x_t = replies.pop(0) if task.first else None
        if task.given and task.order.source.control:
            denoiser: Denoiser = superres.controlled(self.bundle, task, above)
        else:
            denoiser = self._denoiser
            if task.given:
                wanted = superres.fixed(above, task, self.bundle.patch)
            elif above is not None:
                wanted = trajectory.below(above, task)
        networks = self._networks(task.order, tokens, denoiser)
        return trajectory.windows(networks, task, tokens, wanted, x_t)

    @_answer.register
    def _given(self, task: Given) -> Float[Tensor, "3 rows columns"]:
        image = images.from_bytes(task.order.source.png())
        wanted = tuple(length >> task.order.source.octaves for length in task.order.size)
        if image.shape[:2] != wanted:
            raise UserError(
                f"the source has {image.shape[0]}x{image.shape[1]} px, an order of "
                f"{task.order.size} takes {wanted[0]}x{wanted[1]}."
            )
        return images.to_float(image)

    @_answer.register
    def _invert(self, task: Invert, y: Tensor) -> Float[Tensor, "C rows columns"]:
        """Batch by batch, each patch of the image by itself."""
        bundle, side = self.bundle, self.bundle.patch.side_px
        grid_side = min(1 << task.scale, SIDE)
        rows, columns = y.shape[1] // side, y.shape[2] // side
        cells = [(r, c) for r in range(rows) for c in range(columns)]
        model = invert.Model(bundle.unet, bundle.summarizer, bundle.schedule)
        how = invert.Inversion(iterations=task.order.source.iterations)
        found: dict[tuple[int, int], Tensor] = {}
        for group in batches(len(cells), task.order.batch):
            here = tuple(cells[i] for i in group)
            cut = canvas.gather(y, [(r * side, c * side) for r, c in here], side)
            places = invert.Places(task.order.seed, task.scale, here)
            shape = (bundle.summarizer.config.channels, grid_side, grid_side)
            made = invert.invert(model, bundle.vae.encode(cut), shape, places, how)
            found.update(zip(here, made, strict=True))
        bands = [torch.cat([found[r, c] for c in range(columns)], dim=2) for r in range(rows)]
        return torch.cat(bands, dim=1)

    @_answer.register
    def _decode(self, task: Decode, *latents: Tensor) -> UInt8[np.ndarray, "rows W 3"]:
        patch, order = self.bundle.patch, task.order
        if task.bands:
            latent, first = torch.cat(latents, dim=1), task.bands[0]
        else:
            latent, first = canvas.arranged(latents, task.windows, order.size[1] // patch.factor)
        band = canvas.Band(task.top, task.bottom, order.size[0], first * patch.side_lat)
        image = canvas.decode_band(self.bundle.vae, latent, band, patch, order.batch)
        return to_uint8(image)

    @_answer.register
    def _band(self, task: Band, *inputs: Tensor) -> Float[Tensor, "d rows W"]:
        patch, replies = self.bundle.patch, list(inputs)
        vectors = replies.pop(0) if task.vectors else None
        here = bands.Canvas(task, patch.latent, patch.factor, self._denoiser.schedule)
        if task.step:
            x_t = here.down(list(zip(task.neighbours, replies, strict=True)))
        elif task.refine:
            latent, _ = canvas.arranged(replies, task.groups, here.width, here.rows)
            x_t = here.start(latent)
        else:
            x_t = here.start(None).to(self.bundle.device)
        if task.step == len(here.steps):
            return x_t[:, : patch.side_lat]
        return here.ask(x_t, self._estimates(task, vectors))

    def _estimates(self, task: Band, vectors: Tensor | None) -> bands.Estimate:
        """What asks the denoiser for a band's windows, each under its own embedding."""
        conditioner, plain = (
            self.bundle.summarizer,
            self._told_late if task.refine else self._denoiser,
        )

        def estimate(cut: Tensor, windows: list[int], t: int) -> Tensor:
            if vectors is None:
                return plain(cut, t, conditioner.null(len(cut)).to(cut))
            scale = torch.full((len(cut),), task.order.scale, device=cut.device)
            tokens = conditioner(vectors[windows][..., None, None], scale).to(cut)
            w, null = task.order.sampler.guidance, conditioner.null(1).to(cut)
            return guided(plain, w, null)(cut, t, tokens)

        return estimate

    @_answer.register
    def _decode_each(self, task: DecodeEach, latents: Tensor) -> UInt8[np.ndarray, "B P P 3"]:
        return to_uint8(self.bundle.vae.decode(latents))

    def _networks(
        self, order: Order, tokens: Tensor, denoiser: Denoiser | None = None
    ) -> trajectory.Networks:
        """Guided, unless the tokens are the null condition, which guidance would not change."""
        null = self.bundle.summarizer.null(1).to(tokens)
        w = 1.0 if torch.equal(tokens, null.expand_as(tokens)) else order.sampler.guidance
        denoiser = guided(denoiser or self._denoiser, w, null)
        return trajectory.Networks(denoiser, self.bundle.vae, self.bundle.patch)

    def _null(self, task: Draw) -> Tensor:
        tokens: Tensor = self.bundle.summarizer.null(len(task.windows))
        return tokens

    def _from_cdm(self, task: Draw) -> Tensor:
        if self.bundle.cdm is None:
            raise UserError("the bundle has no CDM; train one with python jobs/train.py model=cdm.")
        addresses = [(task.scale, row, column) for row, column in task.windows]
        order = task.order
        tokens: Tensor = self.bundle.cdm.draw(
            task.scale, order.seed, addresses, order.condition.draw
        )
        return tokens

    def _from_inverted(self, task: Draw, grid: Tensor) -> Float[Tensor, "B n D"]:
        """Each window's cells of the inferred grid, whose cells are base tiles or coarser."""
        rows = task.order.size[0] // self.bundle.patch.side_px
        per = max(1, grid.shape[1] // rows)  # cells along a window's side
        shrink = max(1, rows // grid.shape[1])  # windows along a cell's side
        at = [(r // shrink * per, c // shrink * per) for r, c in task.windows]
        scale = torch.full((len(at),), task.scale, device=grid.device)
        tokens: Tensor = self.bundle.summarizer(canvas.gather(grid, at, per), scale)
        return tokens

    def _between(self, task: Draw) -> Float[Tensor, "n C"]:
        """Raw embeddings at windows' places; of coarser scales the mean over what they cover."""
        grid = torch.from_numpy(task.order.condition.grid()).movedim(-1, 0)
        cells = task.order.strided.coarser << task.scale
        short = [-length % cells for length in grid.shape[1:]]
        grid = nn.functional.pad(grid, (0, short[1], 0, short[0]), mode="replicate")
        pooled = nn.functional.avg_pool2d(grid, cells)
        side = self.bundle.patch.side_lat * task.order.strided.coarser
        return strided.interpolated(pooled, task.windows, side)

    def _from_embeddings(self, task: Draw) -> Tensor:
        grid = task.order.condition.grid()
        side = 1 << task.scale
        if grid.ndim == 4:
            cut = np.stack([grid[column] for _, column in task.windows])
        else:  # where a coarser window reaches past the canvas, the edge is repeated
            short = [(0, -length % side) for length in grid.shape[:2]]
            grid = np.pad(grid, [*short, (0, 0)], mode="edge")
            cut = np.stack(
                [
                    grid[row * side : (row + 1) * side, column * side : (column + 1) * side]
                    for row, column in task.windows
                ]
            )
        grids = torch.from_numpy(cut).permute(0, 3, 1, 2).to(self.bundle.device)
        scale = torch.full((len(grids),), task.scale, device=grids.device)
        tokens: Tensor = self.bundle.summarizer(grids, scale)
        return tokens
