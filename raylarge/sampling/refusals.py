"""Which orders a bundle's patches can carry out, and what is wrong with the others.

Every refusal names the field, its value and the cure, before any work.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from raylarge import uploads
from raylarge.errors import UserError
from raylarge.geometry import Patch
from raylarge.order import Order

LIMIT_PX = 1 << 17
LIMIT_BATCH = 1024
MOST_STEPS = 999
"""Steps that a schedule of 1,000 timesteps has room for."""
SOLVERS = ("ddim", "plms", "dpm++", "unipc")


def check(order: Order, patch: Patch) -> None:
    """Refuse an order that a bundle's patches cannot carry out.

    Raises:
        UserError: what is wrong and what would be right.
    """
    if order.algorithm not in ("joint", "strided", "superres"):
        raise UserError(f"order.algorithm '{order.algorithm}' is not joint, strided or superres.")
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
    if order.condition.iterations < 1:
        raise UserError(f"condition.iterations {order.condition.iterations} starts at 1.")
    _check_numbers(order)
    _check_sampler(order)
    _check_constraint(order, patch)
    if min(order.batch, order.chunk) < 1 or order.batch > LIMIT_BATCH:
        raise UserError(
            f"batch {order.batch} and chunk {order.chunk} start at 1, and batch ends at "
            f"{LIMIT_BATCH}; short batches are padded."
        )
    if not 0 <= order.seed < 1 << 64:
        raise UserError(f"seed {order.seed} does not fit 64 bits; choose one from 0 below 2**64.")


def _check_sampler(order: Order) -> None:
    sampler = order.sampler
    if sampler.solver not in SOLVERS:
        raise UserError(f"sampler.solver '{sampler.solver}' is not {', '.join(SOLVERS)}.")
    if sampler.solver != "ddim" and (not order.count or sampler.eta):
        raise UserError(
            f"sampler.solver {sampler.solver} is for separate patches (order.count) with eta 0."
        )
    if sampler.correction not in ("encoder", "backprop"):
        raise UserError(f"sampler.correction '{sampler.correction}' is not encoder or backprop.")
    if sampler.derivative not in ("jvp", "difference"):
        raise UserError(f"sampler.derivative '{sampler.derivative}' is not jvp or difference.")
    for name in ("guidance", "eta", "rate", "step"):
        value = getattr(sampler, name)
        if not 0 <= value < math.inf:
            raise UserError(f"sampler.{name} {value} is no number from 0; 0 is the least.")
    if sampler.eta > 1 or sampler.step == 0:
        raise UserError(f"sampler.eta {sampler.eta} ends at 1; sampler.step is more than 0.")
    if min(sampler.steps, sampler.every) < 1 or sampler.inner < 0:
        raise UserError("sampler.steps and sampler.every start at 1, sampler.inner at 0.")
    if sampler.steps > MOST_STEPS:
        raise UserError(f"sampler.steps {sampler.steps} is more than {MOST_STEPS}.")


def _check_patches(order: Order, patch: Patch) -> None:
    if order.count < 0 or not 0 <= order.scale < patch.scales:
        raise UserError(
            f"order.count {order.count} must be positive and order.scale {order.scale} one of the "
            f"bundle's scales 0 to {patch.scales - 1}."
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
    if order.scale < 0 or top >= patch.scales:
        largest = side << max(0, patch.scales - 1 - order.scale)
        raise UserError(
            f"order.size {order.size} at scale {order.scale} needs a guide at scale {top}, but "
            f"the bundle knows scales 0 to {patch.scales - 1}; the largest side is {largest}."
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
    if how.average not in ("gaussian", "uniform") or how.coarser < 1:
        raise UserError(
            f"strided.average '{how.average}' is gaussian or uniform, and strided.coarser "
            f"{how.coarser} starts at 1."
        )
    if how.share < 1 or patch.side_lat % how.share:
        raise UserError(
            f"strided.share {how.share} must divide the {patch.side_lat} latent cells of a patch."
        )
    if not 0 <= order.scale < patch.scales:
        raise UserError(f"order.scale {order.scale} is not one of 0 to {patch.scales - 1}.")
    if order.condition.kind == "cdm":
        raise UserError("the CDM draws no embeddings to interpolate: use algorithm=joint.")
    cells = tuple(-(-n // side) << order.scale for n in order.size)
    _check_condition(order, cells)


def _check_superres(order: Order, patch: Patch) -> None:
    side, octaves = patch.side_px, order.source.octaves
    if not order.source.image:
        raise UserError("algorithm superres needs an image: image=small.png or source.image.")
    if not 1 <= octaves < side.bit_length() or not 0 <= order.scale < patch.scales - octaves:
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
    if order.refine or order.condition.kind == "cdm":
        raise UserError(
            "superres takes no refine, and a condition that is null, embeddings or inverted."
        )
    uploads.source_of(order)
    cells = 1 << order.scale
    _check_condition(order, tuple(length // side * cells for length in order.size))


def _check_constraint(order: Order, patch: Patch) -> None:
    sampler = order.sampler
    if sampler.constraint not in ("window", "mosaic"):
        raise UserError(f"sampler.constraint '{sampler.constraint}' is not window or mosaic.")
    if not sampler.mosaic or order.count or order.algorithm == "strided":
        return
    levels = 2 if order.algorithm == "superres" else len(order.levels_of(patch))
    more = sampler.every > 1 or order.source.control or order.refine
    if sampler.correction != "encoder" or more or levels > 2:
        raise UserError(
            "sampler.constraint mosaic is for two scales under sampler.correction encoder: leave "
            "out levels, refine, source.control, sampler.every and correction=backprop, or choose "
            "window."
        )


def _check_numbers(order: Order) -> None:
    """Refuse conditions that hold NaN or infinity, or do not fill their shape."""
    condition = order.condition
    needed = condition.kind in ("embeddings", "prior") or condition.data
    given = [condition.grid() if needed else None, condition.against()]
    if not all(np.isfinite(values).all() for values in given if values is not None):
        raise UserError(
            "condition.data or condition.negative holds NaN or infinity; look at the embeddings."
        )


def _check_prior(order: Order) -> None:
    condition = order.condition
    if order.count or order.scale or order.algorithm == "superres":
        raise UserError("condition.kind or fine prior is for one large image at order.scale 0.")
    free = condition.kind == "cdm" and not condition.shape and not condition.negative
    steps, guidance = condition.prior_steps, condition.prior_guidance
    if not 1 <= steps <= MOST_STEPS or not 0 <= guidance < math.inf:
        raise UserError(
            f"condition.prior_steps {steps} lies from 1 to {MOST_STEPS}, condition.prior_guidance "
            f"{guidance} from 0."
        )
    if not free and len(condition.shape) != 1:
        raise UserError(
            f"condition.kind prior takes one vector, no condition.shape {condition.shape}."
        )


def _check_condition(order: Order, wanted: tuple[int, ...]) -> None:
    shape = order.condition.shape
    if order.condition.kind == "embeddings" and shape[:-1] != wanted:
        raise UserError(
            f"condition.shape {shape} does not fit: this order takes {wanted} embeddings."
        )
