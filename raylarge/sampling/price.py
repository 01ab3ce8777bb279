"""What the requests of a plan ask of the networks, before any of them is answered.

    plan -counts-> evaluations of U-Net, decoder, encoder  -models/cost-> FLOPs, seconds

Padded windows count: they are computed. A forward-mode derivative counts as two evaluations
(value and tangent), and its base point once more; a finite difference shares it. What conditions
the image (CDM, grid prior, inversion, ControlNet) is not counted.
"""

from __future__ import annotations

from functools import singledispatch

from raylarge.geometry import Patch, batches, origins
from raylarge.models.cost import Counts
from raylarge.order import Order
from raylarge.sampling.bands import REFINE_STEPS
from raylarge.sampling.canvas import touching
from raylarge.sampling.plan import Plan
from raylarge.sampling.mosaic import Layout
from raylarge.sampling.tasks import Band, Decode, DecodeEach, Guide, Mosaic, Task, Windows


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
    return Counts(
        unet=passes(order, kind) * n * (1 + again * inner),
        decode=n * (inner + task.traced),
        encode=2 * n * inner,
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
