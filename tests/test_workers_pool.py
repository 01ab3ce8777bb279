"""Answer independence over actors: one, four, a killed one; large replies; errors."""

import asyncio
import contextlib
import gc

import numpy as np
import psutil
import pytest
import torch
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

from raylarge import order
from raylarge.errors import UserError
from raylarge.order import Condition
from raylarge.sampling import joint
from raylarge.sampling.bundle_facts import BundleFacts
from raylarge.sampling.plan import arun
from raylarge.sampling.tasks import EncodeContext, Task
from raylarge.workers import pool as pools
from raylarge.workers.pool import TRIES, ActorPool, ObjectRefTensor, ObjectStoreCache, persist

TASK = Task(order.parse({"size": 64}))


@contextlib.asynccontextmanager
async def hired(bundle, workers):
    pool = ActorPool(bundle, workers)
    try:
        await pool.start()
        yield pool
    finally:
        pool.close()


def busy_workers():
    """Processes of actors of this test that compute an answer right now."""
    named = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "PooledWorker.answer" in " ".join(process.cmdline()):
                named.append(process)
    return named


async def kill_workers(count, killed):
    """Kill processes in the middle of an answer, one after the other."""
    while len(killed) < count:
        for process in busy_workers()[:1]:
            process.kill()
            killed.append(process.pid)
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.005)


async def rough(pool, plan, count):
    """Carry out a plan while workers are killed; the image and how many were."""
    killed = []
    killer = asyncio.create_task(kill_workers(count, killed))
    made = await arun(plan, pool.answer)
    killer.cancel()
    return made.image, len(killed)


@pytest.mark.ray
def test_law_4_one_actor_even_if_it_is_killed(ray_session, tiny_bundle, law_order, law_image):
    async def main():
        async with hired(tiny_bundle, 1) as pool:
            plan = joint.plan(order.parse(law_order), BundleFacts.read(tiny_bundle).patch)
            return await rough(pool, plan, 1)

    image, killed = asyncio.run(main())
    np.testing.assert_array_equal(image, law_image)
    assert killed == 1


@pytest.mark.ray
def test_law_4_four_actors_with_and_without_losses(
    ray_session, tiny_bundle, law_order, law_image, monkeypatch
):
    monkeypatch.setattr(pools, "LARGE_BYTES", 10_000)  # so that the small guide is held, too
    patch = BundleFacts.read(tiny_bundle).patch

    async def main():
        async with hired(tiny_bundle, 4) as pool:
            plan = joint.plan(order.parse(law_order), patch)
            calm = (await arun(plan, pool.answer)).image
            assert len(pool._cache) > 0
            del plan
            gc.collect()
            assert len(pool._cache) == 0
            return calm, await rough(pool, joint.plan(order.parse(law_order), patch), 2)

    calm, (image, killed) = asyncio.run(main())
    np.testing.assert_array_equal(calm, law_image)
    np.testing.assert_array_equal(image, law_image)
    assert killed >= 1


@pytest.mark.ray
def test_what_a_user_can_mend_arrives_as_it_was_raised(ray_session, tiny_bundle, tmp_path):
    async def wrong_embeddings():
        async with hired(tiny_bundle, 1) as pool:
            grid = Condition.of(np.ones((1, 1, 5)))
            values = {"size": 64, "condition": vars(grid)}
            with pytest.raises(UserError, match="have 5 channels") as caught:
                await pool.answer(EncodeContext(order.parse(values), "embeddings", 0, ((0, 0),)))
            assert type(caught.value) is UserError
            reply = await pool.answer(EncodeContext(TASK.order, "null", 0, ((0, 0),)))
            assert reply.shape == (1, 65, 64)  # the actor goes on

    async def no_bundle():
        async with hired(str(tmp_path), 2):
            pass

    asyncio.run(wrong_embeddings())
    with pytest.raises(UserError, match="there is no bundle at"):
        asyncio.run(no_bundle())


@pytest.mark.ray
def test_a_large_reply_is_put_once_and_goes_with_its_tensor(ray_session):
    cache, frames = ObjectStoreCache(), torch.randn(3, 512, 512).to(torch.bfloat16)
    stored = cache.put(frames)
    assert isinstance(stored, ObjectRefTensor)
    assert cache.put(frames) is stored
    assert torch.equal(stored.open(ray_session.get(stored.ref)), frames)
    assert cache.put(small := torch.zeros(3)) is small
    assert len(cache) == 1
    del frames
    gc.collect()
    assert len(cache) == 0


def test_lost_workers_are_borne_with_a_few_times(monkeypatch):
    losses = iter([ActorDiedError(), ActorUnavailableError("restarting", b"0" * 16)])

    async def ask():
        for loss in losses:
            raise loss
        return "answer"

    assert asyncio.run(persist(ask, "one Draw")) == "answer"


def test_then_it_says_what_to_do(monkeypatch):
    asked, no_wait = [], asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda seconds: no_wait(0))

    async def ask():
        asked.append(1)
        raise ActorDiedError()

    with pytest.raises(UserError, match=r"5 workers in a row .* one Draw; .* lower order\.batch"):
        asyncio.run(persist(ask, "one Draw"))
    assert len(asked) == TRIES


def test_a_fault_of_ours_is_not_tried_again():
    asked = []

    async def ask():
        asked.append(1)
        raise RayTaskError("answer", "traceback", ValueError("a fault"))

    with pytest.raises(RayTaskError, match="traceback"):
        asyncio.run(persist(ask, "one Draw"))
    assert len(asked) == 1
