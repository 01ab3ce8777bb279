"""What the requests of a plan ask of the networks, before any of them is answered.

    plan -counts-> evaluations of U-Net, decoder, encoder  -models/cost-> FLOPs, seconds

Padded windows count: they are computed. A forward-mode derivative counts as two evaluations
(value and tangent), and its base point once more; a finite difference shares it. A step of an
inversion counts as two: forward and back. Summarizers are left out.
"""

from __future__ import annotations

import math
from functools import singledispatch

from raylarge.geometry import Patch, batches, origins
from raylarge.models.cdm import STEPS as CDM_STEPS
from raylarge.models.cost import Counts
from raylarge.order import Order
from raylarge.sampling.bands import REFINE_STEPS
from raylarge.sampling.canvas import touching
from raylarge.sampling.plan import Plan
from raylarge.sampling.mosaic import Layout
from raylarge.sampling.tasks import (
    Band,
    Decode,
    DecodeEach,
    Draw,
    Guide,
    Imagine,
    Invert,
    Mosaic,
    Task,
    Windows,
)


def counts(plan: Plan, order: Order, patch: Patch) -> Counts:
    """Evaluations of the networks for one window each, over all requests of a plan.

    Args:
        order: the plan's, whole: requests carry it without its condition.
    """
    total = Counts()
    for request in plan.requests.values():
        total += _counts(request.task, order, patch)
    return total


def passes(order: Order, kind: str) -> int:
    """Passes of the U-Net per estimate: 2 under guidance, which null tokens do not need."""
    return 1 if kind == "null" or order.sampler.guidance == 1.0 else 2


@singledispatch
def _counts(task: Task, order: Order, patch: Patch) -> Counts:
    return Counts()


@_counts.register
def _(task: Draw, order: Order, patch: Patch) -> Counts:
    if task.kind != "cdm":
        return Counts()
    return Counts(cdm=CDM_STEPS[order.condition.draw] * len(task.windows))


@_counts.register
def _(task: Imagine, order: Order, patch: Patch) -> Counts:
    cells = math.prod(-(-length // patch.side_px) << order.scale for length in order.size)
    both = 1 if order.condition.prior_guidance == 1.0 else 2
    return Counts(prior=both * order.condition.prior_steps * cells)


@_counts.register
def _(task: Invert, order: Order, patch: Patch) -> Counts:
    n = 1
    if order.algorithm == "superres":  # else the guide, one patch
        inside = math.prod(n // (patch.side_px << order.source.octaves) for n in order.size)
        n = sum(map(len, batches(inside, min(inside, order.batch))))
    return Counts(unet=2 * order.condition.iterations * n, encode=n)


@_counts.register
def _(task: Guide, order: Order, patch: Patch) -> Counts:
    steps = order.sampler.steps
    return Counts(unet=passes(order, order.condition.kind) * steps, decode=steps + 1)


@_counts.register
def _(task: Windows, order: Order, patch: Patch) -> Counts:
    guided = task.guided_by is not None
    kind = order.condition.fine_kind if guided else order.condition.kind
    n = len(task.windows) * (task.last - task.first + (order.sampler.solver == "plms"))
    steered = task.given and order.source.control  # a ControlNet in place of the corrections
    inner = order.sampler.inner if guided and not steered else 0
    again = 2 if order.sampler.derivative == "difference" else 3
    unet = passes(order, kind) * n * (1 + again * inner)
    return Counts(
        unet=unet,
        decode=n * (inner + task.traced),
        encode=2 * n * inner,
        control=unet if steered else 0,
    )


@_counts.register
def _(task: Mosaic, order: Order, patch: Patch) -> Counts:
    columns = Layout.of(order, patch, task.guided_by).columns
    n = len(batches(columns, order.batch)) * order.batch
    kind = order.condition.kind if task.given else order.condition.fine_kind
    inner, steps = order.sampler.inner, order.sampler.steps
    looks, moved = task.look < inner * steps, task.look > 0
    stepped = moved and task.look % inner == 0
    return Counts(
        unet=passes(order, kind) * n * (looks + 2 * moved + stepped),
        decode=n * looks,
        encode=2 * n * moved,
    )


@_counts.register
def _(task: Band, order: Order, patch: Patch) -> Counts:
    windows = len(batches(len(task.windows), order.batch)) * order.batch
    last = task.step == (REFINE_STEPS if task.refine else order.sampler.steps)
    return Counts() if last else Counts(unet=passes(order, order.condition.kind) * windows)


@_counts.register
def _(task: Decode, order: Order, patch: Patch) -> Counts:
    side = patch.side_px
    rows = touching(order.size[0], side, side // 4, task.top, task.bottom)
    count = len(rows) * len(origins(order.size[1], side, side // 4))
    return Counts(decode=len(batches(count, order.batch)) * order.batch)


@_counts.register
def _(task: DecodeEach, order: Order, patch: Patch) -> Counts:
    return Counts(decode=order.batch)
