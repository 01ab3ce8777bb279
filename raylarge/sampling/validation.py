"""Validate an order against the patches of a bundle, before any work.

Every error names the field, its value and what would be right.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from raylarge import uploads
from raylarge.errors import UserError
from raylarge.geometry import Patch
from raylarge.order import LIMIT_PX, Order


def check(order: Order, patch: Patch) -> None:
    """Refuse an order that a bundle's patches cannot carry out.

    Raises:
        UserError: what is wrong and what would be right.
    """
    _check_unread(order)
    if order.count:
        _check_patches(order, patch)
    elif order.algorithm == "strided":
        _check_strided(order, patch)
    elif order.algorithm == "superres":
        _check_superres(order, patch)
    else:
        _check_canvas(order, patch)
    fine = order.condition.fine_kind if order.guided(patch) else ""
    if "prior" in (order.condition.kind, fine):
        _check_prior(order)
    if order.condition.kind == "inverted" and order.algorithm != "superres":
        raise UserError("condition.kind inverted needs algorithm=superres and its image.")
    _check_numbers(order)
    _check_sampler(order)
    _check_constraint(order, patch)


def _check_unread(order: Order) -> None:
    """Refuse settings that the order's algorithm would not read."""
    condition = order.condition
    joint, large = order.algorithm == "joint", not order.count
    reads = condition.kind in ("embeddings", "prior") or condition.fine == "prior"
    for key, is_set, fits, cure in (
        ("algorithm", not joint, large, "separate patches (order.count) have none"),
        ("refine", order.refine, joint and large, "it is for algorithm=joint without order.count"),
        ("levels", order.levels, joint and large, "it is for algorithm=joint without order.count"),
        (
            "source.image",
            order.source.image,
            order.algorithm == "superres",
            "set algorithm=superres",
        ),
        ("condition.data", condition.data, reads, "set condition.kind=embeddings or prior"),
    ):
        if is_set and not fits:
            raise UserError(
                f"order.{key} would not be used in this order; {cure}, or leave it out."
            )


def _check_sampler(order: Order) -> None:
    sampler = order.sampler
    if sampler.solver != "ddim" and (not order.count or sampler.eta):
        raise UserError(
            f"sampler.solver {sampler.solver} is for separate patches (order.count) with eta 0."
        )


def _check_patches(order: Order, patch: Patch) -> None:
    if order.scale >= patch.scales:
        raise UserError(
            f"order.scale {order.scale} must be one of the bundle's scales 0 to {patch.scales - 1}."
        )
    _check_condition(order, (order.count, 1 << order.scale, 1 << order.scale))


def _check_canvas(order: Order, patch: Patch) -> None:
    side = patch.side_px
    if any(length <= 0 or length % side or length > LIMIT_PX for length in order.size):
        raise UserError(
            f"order.size {order.size} must be positive multiples of the patch side {side}, "
            f"at most {LIMIT_PX}."
        )
    top = order.guide(patch).k
    if top >= patch.scales:
        largest = side << max(0, patch.scales - 1 - order.scale)
        raise UserError(
            f"order.size {order.size} at scale {order.scale} needs a guide at scale {top}, but "
            f"the bundle knows scales 0 to {patch.scales - 1}; the largest side is {largest}, and "
            f"any under order.algorithm=strided, which has no guide."
        )
    levels = order.levels_of(patch)
    if levels[0] != top or levels[-1] != order.scale or list(levels) != sorted({*levels})[::-1]:
        raise UserError(
            f"order.levels {levels} must fall from the guide's scale {top} to {order.scale}."
        )
    for above, below in pairwise(levels):
        if side >> (above - below) == 0:
            raise UserError(
                f"order.levels {levels}: a window at scale {below} has no pixel of its own at "
                f"scale {above}; put a level between them, such as {(above + below) // 2}."
            )
    cells = 1 << order.scale
    _check_condition(order, tuple(length // side * cells for length in order.size))


def _check_strided(order: Order, patch: Patch) -> None:
    side, how = patch.side_px, order.strided
    if any(n < side or n % patch.factor or n > LIMIT_PX for n in order.size):
        raise UserError(
            f"order.size {order.size} must be multiples of {patch.factor} from the patch side "
            f"{side} to {LIMIT_PX}."
        )
    if patch.side_lat % how.share:
        raise UserError(
            f"strided.share {how.share} must divide the {patch.side_lat} latent cells of a patch."
        )
    if order.scale >= patch.scales:
        raise UserError(f"order.scale {order.scale} is not one of 0 to {patch.scales - 1}.")
    if order.condition.kind == "cdm":
        raise UserError("the CDM draws no embeddings to interpolate: use algorithm=joint.")
    cells = tuple(-(-n // side) << order.scale for n in order.size)
    _check_condition(order, cells)


def _check_superres(order: Order, patch: Patch) -> None:
    side, octaves = patch.side_px, order.source.octaves
    if not order.source.image:
        raise UserError("algorithm superres needs an image: image=small.png or source.image.")
    if octaves >= side.bit_length() or order.scale >= patch.scales - octaves:
        raise UserError(
            f"source.octaves {octaves} must lie between 1 and the {patch.scales - 1} octaves of "
            f"the bundle, above order.scale {order.scale}."
        )
    whole = side << octaves if order.condition.kind == "inverted" else side
    if any(n <= 0 or n % whole or n > LIMIT_PX for n in order.size):
        raise UserError(
            f"order.size {order.size} must be multiples of {whole}: the image's sides of "
            f"{whole >> octaves}."
        )
    if order.condition.kind == "cdm":
        raise UserError("superres takes a condition that is null, embeddings or inverted.")
    uploads.source_of(order)
    cells = 1 << order.scale
    _check_condition(order, tuple(length // side * cells for length in order.size))


def _check_constraint(order: Order, patch: Patch) -> None:
    sampler = order.sampler
    if not sampler.mosaic or order.count or order.algorithm == "strided":
        return
    levels = 2 if order.algorithm == "superres" else len(order.levels_of(patch))
    more = sampler.correct_every > 1 or order.source.control or order.refine
    if sampler.correction != "encoder" or more or levels > 2:
        raise UserError(
            "sampler.constraint mosaic is for two scales under sampler.correction encoder: leave "
            "out levels, refine, source.control, sampler.correct_every and correction=backprop, or "
            "choose window."
        )


def _check_numbers(order: Order) -> None:
    """Refuse conditions that hold NaN or infinity, or do not fill their shape."""
    condition = order.condition
    needed = condition.kind in ("embeddings", "prior") or condition.data
    arrays = [condition.grid() if needed else None, condition.against()]
    if not all(np.isfinite(values).all() for values in arrays if values is not None):
        raise UserError(
            "condition.data or condition.negative holds NaN or infinity; look at the embeddings."
        )


def _check_prior(order: Order) -> None:
    condition = order.condition
    if order.count or order.scale or order.algorithm == "superres":
        raise UserError("condition.kind or fine prior is for one large image at order.scale 0.")
    free = condition.kind == "cdm" and not condition.shape and not condition.negative
    if not free and len(condition.shape) != 1:
        raise UserError(
            f"condition.kind prior takes one vector, no condition.shape {condition.shape}."
        )


def _check_condition(order: Order, expected: tuple[int, ...]) -> None:
    shape = order.condition.shape
    if order.condition.kind == "embeddings" and shape[:-1] != expected:
        raise UserError(
            f"condition.shape {shape} does not fit: this order takes {expected} embeddings."
        )
