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
    vectors, grid = kind in ("embeddings", "prior"), ("imagined",) if kind == "prior" else ()
    requests = []
    for j in range(count):
        windows = tuple((r, c) for r in starts(height, side, stride, j) for c in columns)
        draw = (f"between/{j}",) if vectors and windows else ()
        if draw:
            bulky = order if kind == "embeddings" else brief
            task = EncodeContext(bulky, kind, order.scale, windows, between=True)
            requests.append(Request(draw[0], task, grid))
        near = tuple(b for b in (j - 1, j, j + 1) if 0 <= b < count)
        needs, groups = start(j, min(j + 2, count)) if start else ((), ())
        first = DenoiseBand(
            brief, j, 0, windows, refine, bool(draw), groups=tuple(map(tuple, groups))
        )
        requests.append(Request(f"band/0/{j}", first, (*draw, *needs)))
        for i in range(1, steps):
            step = DenoiseBand(brief, j, i, windows, refine, bool(draw), near)
            before = tuple(f"band/{i - 1}/{b}" for b in near)
            requests.append(Request(f"band/{i}/{j}", step, (*draw, *before)))
        before = tuple(f"band/{steps - 1}/{b}" for b in near)
        last = DenoiseBand(brief, j, steps, (), refine, False, near)
        requests.append(Request(f"final/{j}", last, before))
    return requests, count
