"""Answer independence in one process: the same pixels for any worker and any order."""

import asyncio
import pickle
import random

import numpy as np
import oracle
import pytest

from raylarge import order as orders
from raylarge.models.denoiser import GaussianDenoiser
from raylarge.sampling import joint
from raylarge.sampling.plan import Plan, Request, arun, run
from raylarge.sampling.tasks import DecodeBand, DecodePatches
from raylarge.workers.worker import Worker

ORDER = orders.parse({"size": 128, "batch": 4, "chunk": 2, "sampler": {"steps": 6}})


@pytest.fixture(scope="module")
def worker():
    return Worker(oracle.bundle(), GaussianDenoiser(0.0, 0.25))


@pytest.fixture(scope="module")
def pixels(worker):
    return run(joint.plan(ORDER, oracle.PATCH), worker.answer).image


def test_asynchronous_is_the_same(worker, pixels):
    async def answer(task, **inputs):
        await asyncio.sleep(random.Random(hash(task)).random() / 100)
        return worker.answer(task, **inputs)

    image = asyncio.run(arun(joint.plan(ORDER, oracle.PATCH), answer)).image
    assert np.array_equal(image, pixels)


@pytest.mark.parametrize("seed", range(3))
def test_replies_in_any_order_and_twice_are_the_same(worker, pixels, seed):
    plan, waiting, shuffle = joint.plan(ORDER, oracle.PATCH), [], random.Random(seed)
    while not plan.done:
        waiting += plan.ready()
        shuffle.shuffle(waiting)
        request = waiting.pop()
        reply = worker.answer(request.task, **plan.inputs(request))
        plan.feed(request.id, reply)
        plan.feed(request.id, "a late duplicate is ignored")
    assert np.array_equal(plan.result.image, pixels)


@pytest.mark.parametrize("stop", [0, 1, 7, 12])
def test_a_restored_plan_goes_on(worker, pixels, stop):
    plan = joint.plan(ORDER, oracle.PATCH)
    answered = 0
    while answered < stop:
        for request in plan.ready():
            plan.feed(request.id, worker.answer(request.task, **plan.inputs(request)))
            answered += 1
    snapshot = pickle.loads(pickle.dumps(plan.snapshot()))
    later, asked = joint.plan(ORDER, oracle.PATCH).restore(snapshot), []

    def answer(task, **inputs):
        asked.append(task)
        return worker.answer(task, **inputs)

    assert np.array_equal(run(later, answer).image, pixels)
    assert len(asked) == len(plan.requests) - answered


def test_replies_are_dropped_when_nobody_needs_them(worker):
    plan = joint.plan(ORDER, oracle.PATCH)
    most = 0

    def watch(plan):
        nonlocal most
        most = max(most, len(plan.snapshot().replies))

    run(plan, worker.answer, watch)
    assert set(plan.snapshot().replies) == set(plan.results)
    assert most < len(plan.requests) / 2


def test_a_failing_request_surfaces_and_cancels_the_others():
    bad, good, cancelled = DecodePatches(ORDER), DecodeBand(ORDER, (), 0, 1), []

    async def answer(task, **inputs):
        try:
            await asyncio.sleep(0.01 if task is bad else 10)
        except asyncio.CancelledError:
            cancelled.append(task)
            raise
        raise ValueError("no such window")

    plan = Plan([Request("a", bad), Request("b", good)], ["a", "b"], lambda kept, open_: kept)
    with pytest.raises(ValueError, match="no such window"):
        asyncio.run(arun(plan, answer))
    assert cancelled == [good]


def test_a_plan_names_what_no_request_gives():
    with pytest.raises(ValueError, match="nobody"):
        Plan(
            [Request("a", DecodePatches(ORDER), {"latents": "nobody"})],
            ["a"],
            lambda kept, open_: kept,
        )
    with pytest.raises(RuntimeError, match="not done"):
        _ = Plan([Request("a", DecodePatches(ORDER))], ["a"], lambda kept, open_: kept).result
