"""Overlapping windows over one canvas: what strided sampling and seam removal share.

Every window asks the denoiser under the embedding interpolated at its place; the estimates of
x_0 are averaged where windows overlap, uniformly (released code) or under a Gaussian window
(paper), always summed in the windows' order. Source: Graikos et al., section 3.3 and
supplement section 14; ZoomLDM's released seam removal.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from raylarge.diffusion.slerp import slerp
from raylarge.geometry import batches
from raylarge.sampling.canvas import Windows, gather

Estimate = Callable[[Tensor, list[int]], Tensor]
"""(windows of x_t [B, c, s, s], their indices) -> estimates of x_0."""


def interpolated(grid: Float[Tensor, "C h w"], windows: Windows, side: int) -> Float[Tensor, "n C"]:
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


def averaged(
    estimate: Estimate,
    x_t: Float[Tensor, "c H W"],
    windows: Windows,
    weight: Float[Tensor, "s s"],
    batch: int,
) -> Float[Tensor, "c H W"]:
    """x_0 of the canvas: the windows' estimates under their normalised weights.

    Args:
        windows: origins; together they cover the canvas.
        batch: windows per call, fixed; the last call repeats its last window.
    """
    side = weight.shape[-1]
    total, mass = torch.zeros_like(x_t), x_t.new_zeros(1, *x_t.shape[1:])
    for group in batches(len(windows), batch):
        found = estimate(gather(x_t, [windows[i] for i in group], side), list(group))
        for i, x_0 in zip(dict.fromkeys(group), found, strict=False):
            r, k = windows[i]
            total[:, r : r + side, k : k + side] += weight * x_0
            mass[:, r : r + side, k : k + side] += weight
    return total / mass
