"""Spherical interpolation of embeddings.

    slerp(u; a, b) = sin((1 - u) o) / sin o  a + sin(u o) / sin o  b,   cos o = a.b / |a||b|

The angle is that between the directions; a and b themselves are interpolated, not normalised.
Vectors that are nearly parallel (|cos| > .9995) or zero are interpolated linearly. Source:
Shoemake 1985; Graikos et al., supplement section 14 and released code.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

PARALLEL = 0.9995


def slerp(
    u: Float[Tensor, "..."] | float, a: Float[Tensor, "... C"], b: Float[Tensor, "... C"]
) -> Float[Tensor, "... C"]:
    """Interpolate from a (u = 0) to b (u = 1) along the last axis; u broadcasts over the others."""
    share = torch.as_tensor(u).to(a)[..., None]
    norms = a.norm(dim=-1, keepdim=True) * b.norm(dim=-1, keepdim=True)
    cosine = (a * b).sum(dim=-1, keepdim=True) / norms.clamp_min(1e-30)
    straight = (cosine.abs() > PARALLEL) | (norms == 0)
    angle = cosine.clamp(-PARALLEL, PARALLEL).acos()
    curved = (((1 - share) * angle).sin() * a + (share * angle).sin() * b) / angle.sin()
    return torch.where(straight, (1 - share) * a + share * b, curved)
