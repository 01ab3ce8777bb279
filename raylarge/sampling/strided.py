"""Overlapping windows over one canvas as a plan: strided sampling, and seam removal after it.

Every window asks the denoiser under the embedding interpolated at its place; the estimates of
x_0 are averaged where windows overlap, uniformly (released code) or under a Gaussian window
(paper). All bands of a step wait for their neighbours at the step before. Source: Graikos et
al., section 3.3 and supplement section 14; ZoomLDM's released seam removal.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from raylarge.diffusion.slerp import slerp
from raylarge.geometry import Patch, origins
from raylarge.order import Order
from raylarge.sampling.bands import REFINE_STEPS, starts
from raylarge.sampling.canvas import Origins
from raylarge.sampling.conditioning import with_payload
from raylarge.sampling.plan import Request
from raylarge.sampling.tasks import DenoiseBand, EncodeContext

Start = Callable[[int, int], tuple[tuple[str, ...], tuple[Origins, ...]]]
"""Patch rows [first, last) -> names of the batches that cover them, and where they stand."""


def interpolated(grid: Float[Tensor, "C h w"], windows: Origins, side: int) -> Float[Tensor, "n C"]:
    """The embedding at each window's place: slerp of the four nearest, columns first, then rows.

    Args:
        grid: raw embeddings, one per patch; beyond its edges the last one is repeated.
        windows: (row, column) origins in the canvas' own cells.
        side: cells of the canvas per patch.
    """
    places = torch.tensor(windows, device=grid.device)
    low = places // side
    share = (places % side).to(grid) / side
    rows, columns = grid.shape[1:]
    r, c = low[:, 0].clamp(max=rows - 1), low[:, 1].clamp(max=columns - 1)
    r1, c1 = (r + 1).clamp(max=rows - 1), (c + 1).clamp(max=columns - 1)
    cells = grid.permute(1, 2, 0)
    above = slerp(share[:, 1], cells[r, c], cells[r, c1])
    below = slerp(share[:, 1], cells[r1, c], cells[r1, c1])
    return slerp(share[:, 0], above, below)


def canvas(order: Order, patch: Patch, start: Start | None = None) -> tuple[list[Request], int]:
    """The requests of a canvas, and how many bands it has; band j ends as `final/j`.

    Args:
        start: where the finished latents are that seam removal begins with; None samples from
            noise.
    """
    side, refine = patch.side_lat, start is not None
    height, width = (length // patch.factor for length in order.size)
    stride = side // (4 if refine else order.strided.share)
    count, steps = -(-height // side), REFINE_STEPS if refine else order.sampler.steps
    columns, brief = origins(width, side, stride), order.without_payload()
    kind = order.condition.kind
    grid = {"grid": "imagined"} if kind == "prior" else {}
    requests = []
    for j in range(count):
        windows = tuple((r, c) for r in starts(height, side, stride, j) for c in columns)
        vectors: dict[str, str] = {}
        if windows and kind in ("embeddings", "prior"):
            vectors = {"vectors": f"between/{j}"}
            place = (with_payload(order), kind, order.scale, windows)
            context = EncodeContext(*place, interpolated=True)
            requests.append(Request(vectors["vectors"], context, grid))
        near = tuple(b for b in (j - 1, j, j + 1) if 0 <= b < count)
        latents, groups = start(j, min(j + 2, count)) if start else ((), ())
        placed = tuple(map(tuple, groups))
        first = DenoiseBand(brief, j, 0, windows, groups=placed, refine=refine)
        more = {"latents": latents} if latents else {}
        requests.append(Request(f"band/0/{j}", first, {**vectors, **more}))
        for i in range(1, steps + 1):
            last = i == steps
            task = DenoiseBand(brief, j, i, () if last else windows, near, refine=refine)
            before: dict[str, str | tuple[str, ...]] = {
                "neighbours": tuple(f"band/{i - 1}/{b}" for b in near)
            }
            needs = before if last else {**vectors, **before}
            requests.append(Request(f"final/{j}" if last else f"band/{i}/{j}", task, needs))
    return requests, count
