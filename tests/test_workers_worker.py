"""Answer independence in one process: who answers, and in which order, does not matter."""

import asyncio
import dataclasses
import random
import shutil

import numpy as np
import pytest

from raylarge import order, storage
from raylarge.errors import UserError
from raylarge.models import bundle
from raylarge.order import Condition
from raylarge.sampling import joint
from raylarge.sampling.bundle_facts import BundleFacts
from raylarge.sampling.plan import Plan, Request, arun, run
from raylarge.sampling.tasks import EncodeContext, Task
from raylarge.workers.worker import Worker

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def worker(tiny_bundle):
    return Worker(bundle.load(tiny_bundle))


@pytest.fixture
def plan(worker, law_order):
    return joint.plan(order.parse(law_order), worker.bundle.patch)


def test_law_4_run_is_repeatable(plan, worker, law_image):
    np.testing.assert_array_equal(run(plan, worker.answer).image, law_image)


def test_law_4_arun_gives_the_same_image(plan, worker, law_image):
    async def answer(task, **inputs):
        await asyncio.sleep(0)
        return worker.answer(task, **inputs)

    np.testing.assert_array_equal(asyncio.run(arun(plan, answer)).image, law_image)


@pytest.mark.parametrize("seed", [1, 2])
def test_law_4_replies_in_any_order_give_the_same_image(plan, worker, law_image, seed):
    shuffle, waiting = random.Random(seed), []
    while not plan.done:
        waiting += plan.ready()
        request = waiting.pop(shuffle.randrange(len(waiting)))
        reply = worker.answer(request.task, **plan.inputs(request))
        plan.feed(request.id, reply)
        plan.feed(request.id, "a second reply is ignored")
    np.testing.assert_array_equal(plan.result.image, law_image)


@pytest.mark.parametrize("finished", [4, 12, 20])
def test_law_4_a_plan_restored_from_a_snapshot_gives_the_same_image(
    plan, worker, law_order, law_image, finished
):
    class StoppedError(Exception):
        pass

    def stop(now):
        if len(now.snapshot().finished) == finished:
            raise StoppedError

    with pytest.raises(StoppedError):
        run(plan, worker.answer, stop)
    restored = joint.plan(order.parse(law_order), worker.bundle.patch).restore(plan.snapshot())
    asked = []

    def answer(task, **inputs):
        asked.append(task)
        return worker.answer(task, **inputs)

    np.testing.assert_array_equal(run(restored, answer).image, law_image)
    assert len(asked) == len(plan.requests) - finished


def test_separate_patches_do_not_depend_on_the_company_they_are_made_in(worker):
    values = {"count": 3, "scale": 1, "batch": 2, "sampler": {"steps": 2}}
    three = run(joint.plan(order.parse(values), worker.bundle.patch), worker.answer)
    assert three.shape == (3, 64, 64, 3)
    values["count"] = 2
    two = run(joint.plan(order.parse(values), worker.bundle.patch), worker.answer)
    np.testing.assert_array_equal(three[:2], two)


def test_a_request_failing_in_arun_stops_the_others():
    task, cancelled = Task(order.parse({"size": 64})), []
    plan = Plan([Request("bad", task), Request("slow", task)], ["bad", "slow"], list)

    async def answer(task, **inputs):
        if not cancelled and asyncio.current_task().get_name() == "first":
            raise UserError("no")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(task)
            raise

    async def main():
        calls = iter(["first", "second"])

        async def named(task, **inputs):
            asyncio.current_task().set_name(next(calls))
            return await answer(task, **inputs)

        with pytest.raises(UserError, match="no"):
            await arun(plan, named)
        await asyncio.sleep(0)

    asyncio.run(main())
    assert len(cancelled) == 1


def test_the_facts_of_a_folder_are_those_of_the_bundle_loaded_from_it(worker, tiny_bundle):
    assert BundleFacts.read(tiny_bundle) == BundleFacts.of(worker.bundle)


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("vae", "lacks vae; train it with .*model=vae"),
        ("unet", "lacks unet; train it with .*model=ldm"),
        ("", "there is no bundle at"),
    ],
)
def test_an_unfinished_bundle_says_what_to_train(tiny_bundle, tmp_path, missing, says):
    folder = tmp_path / "bundle"
    if missing:
        shutil.copytree(tiny_bundle, folder)
        shutil.rmtree(folder / missing)
        index = storage.read_json(str(folder / "model_index.json"))
        storage.write_json(
            str(folder / "model_index.json"), {k: v for k, v in index.items() if k != missing}
        )
    with pytest.raises(UserError, match=says):
        BundleFacts.read(str(folder))


def test_an_unknown_task_is_refused(worker):
    with pytest.raises(TypeError, match="no worker answers Task"):
        worker.answer(Task(order.parse({"size": 64})))


def test_a_bundle_without_a_cdm_says_how_to_get_one(worker, law_order):
    poor = Worker(dataclasses.replace(worker.bundle, cdm=None))
    draw = EncodeContext(order.parse(law_order), "cdm", 0, ((0, 0),))
    with pytest.raises(UserError, match="model=cdm"):
        poor.answer(draw)


def test_embeddings_of_another_encoder_are_refused(worker):
    values = {"size": 64, "condition": Condition.of(np.ones((1, 1, 5))).plain()}
    draw = EncodeContext(order.parse(values), "embeddings", 0, ((0, 0),))
    with pytest.raises(UserError, match="have 5 channels, the bundle's Summarizer takes 8"):
        worker.answer(draw)
