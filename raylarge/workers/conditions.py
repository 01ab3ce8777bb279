"""What conditions a sample: embeddings given, drawn, inferred or imagined, as tokens of windows.

    order's embeddings | CDM | inversion of an image | grid prior of a vector  ->  tokens [B, n, D]

The part of a worker that reads an order's condition; the sampler sees tokens alone.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from raylarge import images, uploads
from raylarge.errors import UserError
from raylarge.geometry import batches
from raylarge.models.bundle import Bundle
from raylarge.models.conditioner import SIDE
from raylarge.models.prior import GridSampling
from raylarge.sampling import canvas, invert, strided
from raylarge.sampling.tasks import EncodeContext, InvertImage, LoadSource, SamplePrior


class Conditions:
    """Answers the requests that come before sampling, with one bundle."""

    def __init__(self, bundle: Bundle) -> None:
        """Nothing is computed yet."""
        self.bundle = bundle

    def encode(self, task: EncodeContext, grid: Tensor | None) -> Float[Tensor, "n ..."]:
        """Return tokens of windows; if `interpolated`, the raw embedding of each.

        Raises:
            UserError: the bundle lacks what the condition needs.
        """
        if task.interpolated:
            return self._interpolated(task, grid)
        encoders: dict[str, Callable[..., Tensor]] = {
            "null": self._null,
            "cdm": self._from_cdm,
            "embeddings": self._from_embeddings,
            "inverted": self._from_grid,
            "prior": self._from_grid,
        }
        encode = encoders[task.kind]
        return encode(task) if grid is None else encode(task, grid)

    def load_source(self, task: LoadSource) -> Float[Tensor, "3 rows columns"]:
        """The order's image.

        Raises:
            UserError: it cannot be read, or has another size than the order says.
        """
        return images.to_float(uploads.source_of(task.order))

    def invert(self, task: InvertImage, y: Tensor) -> Float[Tensor, "C rows columns"]:
        """Embeddings inferred batch by batch, each patch of the image by itself.

        Args:
            y: the image [3, rows, columns], or the guide's frames, whose last one is meant.
        """
        bundle, side = self.bundle, self.bundle.patch.side_px
        y = y[-1].clamp(-1, 1) if y.ndim == 4 else y
        grid_side = min(1 << task.scale, SIDE)
        rows, columns = y.shape[1] // side, y.shape[2] // side
        cells = [(r, c) for r in range(rows) for c in range(columns)]
        model = invert.Model(bundle.unet, bundle.summarizer, bundle.schedule, bundle.unet.dtype)
        how = invert.Inversion(iterations=task.order.condition.iterations)
        grids: dict[tuple[int, int], Tensor] = {}
        for group in batches(len(cells), min(len(cells), task.order.batch)):
            here = tuple(cells[i] for i in group)
            cut = canvas.gather(y, [(r * side, c * side) for r, c in here], side)
            places = invert.Places(task.order.seed, task.scale, here)
            shape = (bundle.summarizer.config.channels, grid_side, grid_side)
            inverted = invert.invert(model, bundle.vae.encode(cut), shape, places, how)
            grids.update(zip(here, inverted, strict=True))
        bands = [torch.cat([grids[r, c] for c in range(columns)], dim=2) for r in range(rows)]
        return torch.cat(bands, dim=1)

    def sample_prior(self, task: SamplePrior) -> Float[Tensor, "C rows columns"]:
        """The grid prior's draw for the whole canvas, one raw embedding per base tile.

        Raises:
            UserError: the bundle has no grid prior, or the vector another width.
        """
        order, prior = task.order, self.bundle.prior
        if prior is None:
            raise UserError("the bundle has no grid prior; train one, or choose another condition.")
        condition, side = order.condition, self.bundle.patch.side_px
        vector = torch.zeros(1, prior.config.vector, device=self.bundle.device)
        if condition.shape:
            vector = torch.from_numpy(condition.grid())[None].to(vector)
        negative = condition.against()
        u = None if negative is None else torch.from_numpy(negative)[None].to(self.bundle.device)
        rows, columns = (-(-length // side) << order.scale for length in order.size)
        walk = GridSampling(condition.prior_steps, condition.prior_guidance, shape=(rows, columns))
        grid: Tensor = prior.sample(vector, order.seed, [(order.scale, 0, 0)], walk, u)[0]
        return grid

    def _null(self, task: EncodeContext) -> Tensor:
        tokens: Tensor = self.bundle.summarizer.null(len(task.windows))
        return tokens

    def _from_cdm(self, task: EncodeContext) -> Tensor:
        if self.bundle.cdm is None:
            raise UserError("the bundle has no CDM; train one with python jobs/train.py model=cdm.")
        addresses = [(task.scale, row, column) for row, column in task.windows]
        order = task.order
        tokens: Tensor = self.bundle.cdm.draw(
            task.scale, order.seed, addresses, order.condition.draw
        )
        return tokens

    def _from_grid(self, task: EncodeContext, grid: Tensor) -> Float[Tensor, "B n D"]:
        """Each window's cells of a grid, whose cells are base tiles or coarser.

        The grid covers the canvas; inferred from a guide it covers the guide's square.
        """
        order, patch = task.order, self.bundle.patch
        rows = -(-order.size[0] // patch.side_px)  # windows at the order's own scale
        if task.kind == "inverted" and order.algorithm != "superres":
            rows = 1 << (order.guide(patch).k - order.scale)
        octave = 1 << (task.scale - order.scale)
        per = max(1, grid.shape[1] * octave // rows)  # cells along a window's side
        shrink = max(1, rows // (grid.shape[1] * octave))  # windows along a cell's side
        short = [-length % per for length in grid.shape[1:]]
        grid = nn.functional.pad(grid[None], (0, short[1], 0, short[0]), mode="replicate")[0]
        at = [(r // shrink * per, c // shrink * per) for r, c in task.windows]
        scale = torch.full((len(at),), task.scale, device=grid.device)
        tokens: Tensor = self.bundle.summarizer(canvas.gather(grid, at, per), scale)
        return tokens

    def _interpolated(self, task: EncodeContext, grid: Tensor | None) -> Float[Tensor, "n C"]:
        """Raw embeddings at windows' places; of coarser scales the mean over what they cover."""
        if grid is None:
            grid = torch.from_numpy(task.order.condition.grid()).movedim(-1, 0)
        cells = task.order.strided.coarser << task.scale
        short = [-length % cells for length in grid.shape[1:]]
        grid = nn.functional.pad(grid, (0, short[1], 0, short[0]), mode="replicate")
        pooled = nn.functional.avg_pool2d(grid, cells)
        side = self.bundle.patch.side_lat * task.order.strided.coarser
        return strided.interpolated(pooled, task.windows, side)

    def _from_embeddings(self, task: EncodeContext) -> Tensor:
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
