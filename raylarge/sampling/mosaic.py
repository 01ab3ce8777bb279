"""Joint sampling with the constraint on the arranged mosaic, where A crosses windows' borders.

    decode    x_0(x_t) -> images -> their share of A(mosaic), a few rows of small pixels
    correct   y - the sum of the shares -> U -> e_img -> the correction of Algorithm S2

This is what the paper's text says; its code, and `constraint=window`, mirror at the borders of
each window. A is linear, so a row of windows needs only the shares of its neighbours, which are
added from the top. A row's correction waits for its neighbours' previous one: S K barriers in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from raylarge.geometry import Patch, batches
from raylarge.models.denoiser import bind_context
from raylarge.order import Order
from raylarge.resample import bicubic_matrix
from raylarge.sampling.conditioning import encode_context
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
    layout, sampler, brief = (
        MosaicLayout.of(order, patch, guided_by),
        order.sampler,
        order.without_payload(),
    )
    corrections, image = sampler.steps * sampler.corrections, source == "given"
    requests = []
    for row in range(layout.rows):
        near = layout.neighbours(row)
        draw = encode_context(
            f"draw/{row}", order, order.scale, layout.windows(row), guided=not image
        )
        requests.append(draw)
        for k in range(corrections + 1):
            task = DenoiseMosaicRow(
                brief, order.scale, row, k, guided_by, near, follows_image=image
            )
            needs: dict[str, str | tuple[str, ...]] = {"tokens": draw.id, "target": source}
            if k:
                before = f"correction/{k - 1}"
                needs["latents"] = f"{before}/{row}"
                needs["images"] = f"{before}/{row}#0"
                needs["shares"] = tuple(f"{before}/{neighbour}#1" for neighbour in near)
            id = f"correction/{k}/{row}" if k < corrections else f"final/{row}"
            requests.append(Request(id, task, needs))
    return requests, layout


def answer(
    networks: Networks,
    task: DenoiseMosaicRow,
    tokens: Float[Tensor, "n m D"],
    target: Tensor,
    **before: Any,
) -> Float[Tensor, "n c p p"] | Parts:
    """Take a row of windows from one correction to the next.

    Args:
        target: the guide's frames [S + 1, 3, P, P], or the order's image.
        before: `latents`, `images` and `shares` as in `DenoiseMosaicRow`.
    """
    row = _Row(networks, task)
    batched: tuple[Tensor, ...] = ()
    if before:
        y = target if task.follows_image else target[row.step_index]
        y = y.clamp(-1, 1) if task.order.sampler.clamp else y
        batched = (before["latents"], before["images"], row.error(y, before["shares"]))
    moved: list[Tensor] = []
    decoded: list[Tensor] = []
    for group in batches(len(tokens), min(len(tokens), task.order.batch)):
        windows = list(group)
        x_t = row.moved(windows, tokens[windows], [values[windows] for values in batched], decoded)
        moved.append(x_t)
    latents = torch.cat(moved)[: len(tokens)]
    if not decoded:
        return latents
    images = torch.cat(decoded)[: len(tokens)]
    return Parts(latents, (images, row.share(images)))


class _Row:
    """One request of a row of windows, and what it computes."""

    def __init__(self, networks: Networks, task: DenoiseMosaicRow) -> None:
        self.networks, self.task, self.sampler = networks, task, task.order.sampler
        self.layout = MosaicLayout.of(task.order, networks.patch, task.guided_by)
        self.steps = networks.denoiser.schedule.steps(self.sampler.steps)

    @property
    def step_index(self) -> int:
        """The step of the correction that this request carries out."""
        return (self.task.correction_index - 1) // self.sampler.corrections

    def moved(
        self,
        windows: list[int],
        tokens: Float[Tensor, "b m D"],
        before: Sequence[Tensor],
        decoded: list[Tensor],
    ) -> Float[Tensor, "b c p p"]:
        """Return some windows' latents after the next correction; add their images to `decoded`.

        Args:
            before: their latents, images and e_img; nothing in the first request.
        """
        task, inner, codec = self.task, self.sampler.corrections, self.networks.correcting
        cells = [self.layout.windows(task.row)[i] for i in windows]
        stepper = Stepper(self.networks, task.order, task.scale, cells, tokens)
        estimate = bind_context(self.networks.denoiser, tokens)
        if not before:
            x_t = stepper.start()
        else:
            x_t, images, e_img = before
            step = self.steps[self.step_index]
            e = encoded(codec, images, e_img.to(images), self.sampler)
            g = differentiated(partial(estimate, t=step.t), x_t, self.sampler)[1](e)
            x_t = x_t + self.sampler.correction_lr * scaled(g, self.sampler)
            if task.correction_index % inner == 0:
                x_t = stepper.step(self.step_index, step, x_t, estimate(x_t, step.t))
        if task.correction_index < inner * len(self.steps):
            decoded.append(
                codec.decode(estimate(x_t, self.steps[task.correction_index // inner].t))
            )
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
