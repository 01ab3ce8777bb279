"""Count the evaluations of networks that a plan will take, before it runs.

    plan -> evaluations of U-Net, decoder, encoder  -models/cost-> FLOPs, seconds

Windows that pad a batch count, since they are computed. A derivative counts as one evaluation
beside that of the value; a step of an inversion as two (forward, backward). Summarizers do not
count. `tests/test_sampling_cost.py` runs every kind of order with counting networks and finds
the same numbers.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import astuple
from functools import cache, singledispatch
from typing import Any

from raylarge.diffusion.schedule import Schedule
from raylarge.geometry import Patch, batches, origins
from raylarge.models.cdm import RECIPE_STEPS as CDM_STEPS
from raylarge.models.cost import CallCounts
from raylarge.models.denoiser import in_interval
from raylarge.order import Order
from raylarge.sampling.bands import steps_of
from raylarge.sampling.canvas import touching
from raylarge.sampling.mosaic import MosaicLayout
from raylarge.sampling.plan import Plan
from raylarge.sampling.tasks import (
    DecodeBand,
    DecodePatches,
    DenoiseBand,
    DenoiseGuide,
    DenoiseMosaicRow,
    DenoiseWindows,
    EncodeContext,
    InvertImage,
    SamplePrior,
    Task,
)

SCHEDULE = Schedule()
"""Any schedule: only its timesteps count."""


def count_calls(plan: Plan, order: Order, patch: Patch) -> CallCounts:
    """Evaluations of the networks for one window each, over all requests of a plan.

    Args:
        order: the plan's, whole: requests carry it without its condition.
    """
    tasks = {_class_of(request.task): request.task for request in plan.requests.values()}
    sizes = Counter(_class_of(request.task) for request in plan.requests.values())
    total = CallCounts()
    for name, task in tasks.items():
        each = astuple(_counts(task, order, patch))
        total += CallCounts(*(sizes[name] * count for count in each))
    return total


def _class_of(task: Task) -> tuple[Any, ...]:
    """Return what a task's counts depend on: its settings, and of its windows their number."""
    fields = vars(task).items()
    settings = {name: value for name, value in fields if name not in ("order", "band", "row")}
    sizes = (len(value) if isinstance(value, tuple) else value for value in settings.values())
    return type(task), *sizes


def passes(order: Order, kind: str, t: int = 0) -> int:
    """Passes of the U-Net per estimate: 2 under guidance, which null tokens do not need.

    Args:
        t: the timestep of 1,000; guidance may be limited to an interval of them.
    """
    guided = kind != "null" and order.sampler.guidance != 1.0
    return 2 if guided and in_interval(order.sampler.interval, t / SCHEDULE.length) else 1


@cache
def _timesteps(steps: int) -> list[int]:
    return [step.t for step in SCHEDULE.steps(steps)]


@singledispatch
def _counts(task: Task, order: Order, patch: Patch) -> CallCounts:
    return CallCounts()


@_counts.register
def _(task: EncodeContext, order: Order, patch: Patch) -> CallCounts:
    if task.kind != "cdm":
        return CallCounts()
    return CallCounts(cdm=CDM_STEPS[order.condition.draw] * len(task.windows))


@_counts.register
def _(task: SamplePrior, order: Order, patch: Patch) -> CallCounts:
    cells = math.prod(-(-length // patch.side_px) << order.scale for length in order.size)
    both = 1 if order.condition.prior_guidance == 1.0 else 2
    return CallCounts(prior=both * order.condition.prior_steps * cells)


@_counts.register
def _(task: InvertImage, order: Order, patch: Patch) -> CallCounts:
    n = 1
    if order.algorithm == "superres":  # else the guide, one patch
        inside = math.prod(n // (patch.side_px << order.source.octaves) for n in order.size)
        n = sum(map(len, batches(inside, min(inside, order.batch))))
    return CallCounts(unet=2 * order.condition.iterations * n, encode=n)


@_counts.register
def _(task: DenoiseGuide, order: Order, patch: Patch) -> CallCounts:
    steps, kind = order.sampler.steps, order.condition.kind
    unet = sum(passes(order, kind, t) for t in _timesteps(steps))
    return CallCounts(unet=unet, decode=steps + 1)


@_counts.register
def _(task: DenoiseWindows, order: Order, patch: Patch) -> CallCounts:
    sampler, n = order.sampler, len(task.windows)
    guided, again = task.guided_by is not None, sampler.solver == "plms"
    kind = order.condition.fine_kind if guided and not task.follows_image else order.condition.kind
    steered = (
        task.follows_image and order.source.control
    )  # a ControlNet in place of the corrections
    corrections = sampler.corrections if guided and not steered else 0
    counts = CallCounts(decode=n * (task.last - task.first) if task.traced else 0)
    for i, t in enumerate(_timesteps(sampler.steps)[task.first : task.last], start=task.first):
        now = corrections if i % sampler.correct_every == 0 else 0
        unet = passes(order, kind, t) * n * (1 + 2 * now)
        if again and i == 0:  # plms begins with a step of Heun's
            unet += n * passes(order, kind, [*_timesteps(sampler.steps), 0][1])
        counts += CallCounts(unet=unet, control=unet if steered else 0)
        counts += _corrected(order, n * now)
    return counts


@_counts.register
def _(task: DenoiseMosaicRow, order: Order, patch: Patch) -> CallCounts:
    columns = MosaicLayout.of(order, patch, task.guided_by).columns
    n = sum(map(len, batches(columns, min(columns, order.batch))))
    kind = order.condition.kind if task.follows_image else order.condition.fine_kind
    corrections, steps = order.sampler.corrections, order.sampler.steps
    times = _timesteps(steps)
    counts = CallCounts()
    if task.correction_index:
        t = times[(task.correction_index - 1) // corrections]
        stepped = task.correction_index % corrections == 0
        counts += CallCounts(unet=passes(order, kind, t) * n * (2 + stepped))
        counts += _corrected(order, n)
    if task.correction_index < corrections * steps:
        counts += CallCounts(
            unet=passes(order, kind, times[task.correction_index // corrections]) * n
        )
    return counts


def _corrected(order: Order, n: int) -> CallCounts:
    """The autoencoder's share in n corrections: a decode, and the encoder's derivative."""
    if order.sampler.correction == "backprop":
        return (
            CallCounts(small_decode=2 * n)
            if order.sampler.small_autoencoder
            else CallCounts(decode=2 * n)
        )
    if order.sampler.small_autoencoder:
        return CallCounts(small_decode=n, small_encode=2 * n)
    return CallCounts(decode=n, encode=2 * n)


@_counts.register
def _(task: DenoiseBand, order: Order, patch: Patch) -> CallCounts:
    n = len(batches(len(task.windows), order.batch)) * order.batch
    steps = steps_of(order, SCHEDULE, task.refine)
    if task.step == len(steps):
        return CallCounts()
    return CallCounts(unet=passes(order, order.condition.kind, steps[task.step].t) * n)


@_counts.register
def _(task: DecodeBand, order: Order, patch: Patch) -> CallCounts:
    side = patch.side_px
    rows = touching(order.size[0], side, side // 4, task.top, task.bottom)
    count = len(rows) * len(origins(order.size[1], side, side // 4))
    return CallCounts(decode=len(batches(count, order.batch)) * order.batch)


@_counts.register
def _(task: DecodePatches, order: Order, patch: Patch) -> CallCounts:
    return CallCounts(decode=order.batch)
