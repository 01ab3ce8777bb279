"""Derive the noise schedule of a published checkpoint from its betas.

    betas [steps], as float32, float16 or bfloat16  ->  Schedule(name, steps, beta_start, beta_end)

Betas match a schedule if they differ by no more than the rounding of their type.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from raylarge.diffusion.schedule import Schedule
from raylarge.errors import UserError
from raylarge.models.state_dicts import preferred_tensors


def schedule_from_published(state: Mapping[Any, Any]) -> Schedule:
    """Return the schedule of a checkpoint's `betas`; the published one if it has none.

    Raises:
        UserError: betas that are neither `scaled_linear` nor `linear`.
    """
    betas = preferred_tensors(state).get("betas")
    if betas is None:
        return Schedule()
    if betas.ndim != 1 or len(betas) < 2:
        raise UserError(f"the checkpoint's betas have the shape {list(betas.shape)}, not [steps].")
    ends = (_shortest(betas[0]), _shortest(betas[-1]))
    limit = 1e-6 + rounding(betas) * betas.double()
    for name in ("scaled_linear", "linear") if min(ends) > 0 else ():
        schedule = Schedule(name, len(betas), *ends)
        if bool(((schedule.betas - betas.double()).abs() <= limit).all()):
            return schedule
    raise UserError(
        f"not supported: the checkpoint's betas ({ends[0]:.4g} to {ends[1]:.4g}) are neither "
        f"scaled_linear nor linear."
    )


def rounding(values: Tensor) -> float:
    """Return the relative rounding error of a floating-point type."""
    if not values.is_floating_point():
        raise UserError(f"its betas or scale_factor are {values.dtype}, not fractions.")
    return max(torch.finfo(values.dtype).eps / 2, 3e-7)


def _shortest(value: Tensor) -> float:
    """Return the decimal with the fewest digits that rounds to a stored value, such as 0.0195."""
    stored, error = float(value), rounding(value)
    for digits in range(2, 9):
        decimal = float(f"{stored:.{digits}g}")
        if abs(decimal - stored) <= error * abs(stored):
            return decimal
    return stored
