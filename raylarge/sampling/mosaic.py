"""Joint sampling with the constraint on the arranged mosaic, where A crosses windows' borders.

    look   x_0(x_t) -> images -> their share of A(mosaic), a few rows of small pixels
    move   y - the sum of the shares -> U -> e_img -> the correction of Algorithm S2

So says the paper's text; its code, and `constraint=window`, mirror at each window's borders.
A is linear: a row of windows needs of its neighbours only their shares, added from the top.
All rows of a look wait for their neighbours at the look before: S K barriers in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from jaxtyping import Float
from torch import Tensor

from raylarge.geometry import Patch, batches
from raylarge.models.denoiser import bind_context
from raylarge.order import Order
from raylarge.resample import bicubic_matrix
from raylarge.sampling.conditioning import draw
from raylarge.sampling.constraint import differentiated, encoded, scaled
from raylarge.sampling.plan import Request
from raylarge.sampling.tasks import DenoiseMosaicRow, Parts
from raylarge.sampling.trajectory import Networks, Stepper

REACH = 2
"""Small pixels beyond a row of windows that its pixels reach: bicubic taps, antialiased."""


@dataclass(frozen=True)
class MosaicLayout:
    """The canvas as rows of windows, at a scale, under an image that is 2^octaves smaller."""

    rows: int
    columns: int
    side: int
    factor: int

    @classmethod
    def of(cls, order: Order, patch: Patch, guided_by: int) -> MosaicLayout:
        """The layout of an order's canvas."""
        rows, columns = (length // patch.side_px for length in order.size)
        return cls(rows, columns, patch.side_px, 1 << (guided_by - order.scale))

    @property
    def small(self) -> int:
        """Side of a window made small, q."""
        return self.side // self.factor

    def windows(self, row: int) -> tuple[tuple[int, int], ...]:
        """The windows of a row."""
        return tuple((row, column) for column in range(self.columns))

    def span(self, row: int) -> tuple[int, int]:
        """The small pixel rows that a row's pixels reach."""
        q = self.small
        return max(0, row * q - REACH), min(self.rows * q, (row + 1) * q + REACH)

    def neighbours(self, row: int) -> tuple[int, ...]:
        """The rows whose spans meet this one's, itself among them, from the top."""
        low, high = self.span(row)
        spans = ((other, *self.span(other)) for other in range(self.rows))
        return tuple(other for other, first, last in spans if first < high and last > low)


def requests(
    order: Order, patch: Patch, guided_by: int, source: str
) -> tuple[list[Request], MosaicLayout]:
    """All rows through all steps; row r's finished latents are `final/r`.

    Args:
        guided_by: scale of the guide or the given image.
        source: the request that gives it.
    """
    found, layout, sampler = [], MosaicLayout.of(order, patch, guided_by), order.sampler
    looks, given = sampler.steps * sampler.corrections, source == "given"
    for r in range(layout.rows):
        near = layout.neighbours(r)
        found.append(draw(f"draw/{r}", order, order.scale, layout.windows(r), guided=not given))
        for look in range(looks + 1):
            task = DenoiseMosaicRow(
                order.without_payload(), order.scale, r, look, guided_by, near, given
            )
            needs: tuple[str, ...] = (f"draw/{r}", source)
            if look:
                before = f"look/{look - 1}"
                own = f"{before}/{r}"
                needs = (*needs, own, f"{own}#0", *(f"{before}/{b}#1" for b in near))
            id = f"look/{look}/{r}" if look < looks else f"final/{r}"
            found.append(Request(id, task, needs))
    return found, layout


def answer(
    networks: Networks, task: DenoiseMosaicRow, tokens: Float[Tensor, "n m D"], *replies: Tensor
) -> Float[Tensor, "n c p p"] | Parts:
    """From one look of a row of windows to the next.

    Args:
        replies: the guide's frames or the image; after the first look the row's latents, its
            images, and the neighbours' shares.
    """
    above, *rest = replies
    row = _Row(networks, task)
    before: tuple[Tensor, ...] = ()
    if task.look:
        x_t, images, *shares = rest
        y = above if task.given else above[row.corrected]
        y = y.clamp(-1, 1) if task.order.sampler.clamp else y
        before = (x_t, images, row.error(y, shares))
    made: list[Tensor] = []
    seen: list[Tensor] = []
    for group in batches(len(tokens), min(len(tokens), task.order.batch)):
        here = list(group)
        x_t = row.moved(here, tokens[here], [one[here] for one in before], seen)
        made.append(x_t)
    latents = torch.cat(made)[: len(tokens)]
    if not seen:
        return latents
    images = torch.cat(seen)[: len(tokens)]
    return Parts(latents, (images, row.share(images)))


class _Row:
    """A row of windows at a look, and what it computes."""

    def __init__(self, networks: Networks, task: DenoiseMosaicRow) -> None:
        self.networks, self.task, self.sampler = networks, task, task.order.sampler
        self.layout = MosaicLayout.of(task.order, networks.patch, task.guided_by)
        self.steps = networks.denoiser.schedule.steps(self.sampler.steps)

    @property
    def corrected(self) -> int:
        """The step whose correction this request ends, from the second look on."""
        return (self.task.look - 1) // self.sampler.corrections

    def moved(
        self,
        here: list[int],
        tokens: Float[Tensor, "b m D"],
        before: Sequence[Tensor],
        seen: list[Tensor],
    ) -> Float[Tensor, "b c p p"]:
        """Some windows from look to look: their latents; what they look like is added to `seen`.

        Args:
            before: their latents, images and e_img; nothing at the first look.
        """
        task, inner, codec = self.task, self.sampler.corrections, self.networks.correcting
        cells = [self.layout.windows(task.row)[i] for i in here]
        walk = Stepper(self.networks, task.order, task.scale, cells, tokens)
        estimate = bind_context(self.networks.denoiser, tokens)
        if not before:
            x_t = walk.start()
        else:
            x_t, images, e_img = before
            step = self.steps[self.corrected]
            e = encoded(codec, images, e_img.to(images), self.sampler)
            g = differentiated(partial(estimate, t=step.t), x_t, self.sampler)[1](e)
            x_t = x_t + self.sampler.correction_lr * scaled(g, self.sampler)
            if task.look % inner == 0:
                x_t = walk.down(self.corrected, step, x_t, estimate(x_t, step.t))
        if task.look < inner * len(self.steps):
            seen.append(codec.decode(estimate(x_t, self.steps[task.look // inner].t)))
        return x_t

    def share(self, images: Float[Tensor, "n 3 P P"]) -> Float[Tensor, "3 h w"]:
        """What the row's images add to A(mosaic), on the small pixels that they reach."""
        down, across = self._matrices(images)
        strip = torch.cat(list(images.float()), dim=2)
        return down @ strip @ across.mT

    def error(
        self, y: Float[Tensor, "3 rows columns"], shares: Sequence[Tensor]
    ) -> Float[Tensor, "n 3 P P"]:
        """e_img of the row's windows: U (y - A(mosaic))."""
        layout, (low, high) = self.layout, self.layout.span(self.task.row)
        total = y.new_zeros(3, high - low, layout.columns * layout.small, dtype=torch.float32)
        for row, share in zip(self.task.neighbours, shares, strict=True):
            first, last = layout.span(row)
            top, bottom = max(low, first), min(high, last)
            total[:, top - low : bottom - low] += share[:, top - first : bottom - first].to(total)
        error = y[:, low:high, : total.shape[2]].to(total) - total
        down, across = self._matrices(error)
        lifted = layout.factor**2 * (down.mT @ error @ across)
        return torch.stack(lifted.split(layout.side, dim=2))

    def _matrices(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """D's block of this row of windows, and D along the whole width."""
        down, across = _blocks(self.layout, self.task.row)
        return down.to(like.device), across.to(like.device)


@lru_cache(maxsize=8)
def _blocks(layout: MosaicLayout, row: int) -> tuple[Tensor, Tensor]:
    inside = slice(row * layout.side, (row + 1) * layout.side)
    down = bicubic_matrix(layout.rows * layout.side, layout.factor, layout.span(row))[:, inside]
    across = bicubic_matrix(layout.columns * layout.side, layout.factor)
    return torch.from_numpy(down).float(), torch.from_numpy(across).float()
