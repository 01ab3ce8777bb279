"""More than two scales: every level is guided by the frames of the one above."""

import random

import numpy as np
import oracle
import pytest
import torch

from raylarge import order as orders
from raylarge.diffusion.noise import normal
from raylarge.diffusion.schedule import Schedule
from raylarge.diffusion.steps import ddim
from raylarge.errors import UserError
from raylarge.execution.reply_store import ReplyStore
from raylarge.models.denoiser import GaussianDenoiser
from raylarge.resample import downsample, upsample
from raylarge.sampling import joint
from raylarge.sampling.plan import run
from raylarge.sampling.tasks import DenoiseWindows
from raylarge.workers.worker import Worker

PATCH, SIDE = oracle.PATCH, oracle.PATCH.side_px


def an_order(size="96x128", **values):
    sampler = {"steps": 6, "eta": 1.0, **values.pop("sampler", {})}
    return orders.parse(
        {"size": size, "levels": "2,1,0", "batch": 3, "chunk": 2, "sampler": sampler, **values}
    )


@pytest.fixture
def worker():
    return Worker(oracle.bundle(), GaussianDenoiser(0.1, 0.25))


def latents_of(order, worker):
    """Finished latents by (scale, row, column)."""
    kept = {}

    def watched(task, **inputs):
        reply = worker.answer(task, **inputs)
        if isinstance(task, DenoiseWindows) and task.last == order.sampler.steps:
            found = reply.whole if task.traced else reply
            for part in reply.parts if task.traced else ():  # no views of one large storage
                assert part.untyped_storage().nbytes() == part.nbytes
            kept.update(
                {(task.scale, *cell): x for cell, x in zip(task.windows, found, strict=True)}
            )
        return reply

    return run(joint.plan(order, PATCH), watched), kept


def test_three_levels_equal_the_loop_that_advances_them_together(worker):
    """All scales step by step, coarse to fine; each window reads its block of the one above."""
    order = an_order()
    made, found = latents_of(order, worker)
    sampler, denoise = order.sampler, worker._denoiser
    enc, dec = oracle.Unshuffle().encode, oracle.Unshuffle().decode
    cells = {2: [(0, 0)], 1: [(r, c) for r in range(2) for c in range(2)]}
    cells[0] = [(r, c) for r in range(3) for c in range(4)]

    def noise(k, cell, step):
        return normal(PATCH.latent, order.seed, "sampling", [(k, *cell, step)])

    x = {(k, *cell): noise(k, cell, 0) for k in cells for cell in cells[k]}
    for i, step in enumerate(Schedule().steps(sampler.steps)):
        f = lambda z, t=step.t: denoise(z, t, torch.zeros(1, 1, 4))  # noqa: E731
        frames = {}
        for k in (2, 1, 0):
            for r, c in cells[k]:
                z = x[k, r, c]
                if k < 2:
                    half = SIDE // 2
                    above = frames[k + 1, r // 2, c // 2]
                    row, column = r % 2 * half, c % 2 * half
                    y = above[..., row : row + half, column : column + half]
                    image = dec(f(z))
                    e = enc(upsample(y - downsample(image, 2), 2))
                    z = z + sampler.correction_lr * torch.func.jvp(f, (z,), (e,))[1]
                frames[k, r, c] = dec(f(z))
                x[k, r, c] = ddim(z, f(z), step, 1.0, noise(k, (r, c), i + 1))
    assert {name[0] for name in found} == {1, 0}
    for name, latent in found.items():
        assert (latent - x[name][0]).abs().max() <= 1e-5
    assert made.image.shape == (96, 128, 3)


def test_every_level_follows_the_one_above():
    """The relative error of A(window) against its block falls at least 4 times (`paper`)."""
    worker, error = Worker(oracle.bundle(), GaussianDenoiser(0.0, 0.25)), []
    for inner in (1, 0):
        sampler = {"eta": 0.0, "steps": 50, "corrections": inner}
        _, found = latents_of(an_order(size=128, sampler=sampler), worker)
        images = {name: oracle.Unshuffle().decode(x[None])[0] for name, x in found.items()}
        assert len(images) == 4 + 16
        apart, half = [], SIDE // 2
        for r in range(4):
            for c in range(4):
                row, column = r % 2 * half, c % 2 * half
                y = images[1, r // 2, c // 2][:, row : row + half, column : column + half]
                away = (downsample(images[0, r, c], 2) - y).norm() / (y - y.mean()).norm()
                apart.append(away)
        error.append(float(torch.stack(apart).mean()))
    assert error[1] > 4 * error[0]


def test_without_corrections_levels_change_nothing(worker):
    settings = {"sampler": {"corrections": 0}}
    through = run(joint.plan(an_order(**settings), PATCH), worker.answer).image
    straight = run(joint.plan(an_order(levels=(), **settings), PATCH), worker.answer).image
    assert np.abs(through.astype(int) - straight).max() <= 1


@pytest.mark.parametrize("seed", [0, 1])
def test_law_4_for_levels(worker, tmp_path, seed):
    """Any order of replies, a ledger as store, a run cut short: the same pixels."""
    order = an_order()
    pixels = run(joint.plan(order, PATCH), worker.answer).image
    shuffle, plan, waiting = random.Random(seed), joint.plan(order, PATCH), []
    assert ReplyStore(str(tmp_path), order, "b").resume(plan) == 0
    for _ in range(25):
        waiting += plan.ready()
        shuffle.shuffle(waiting)
        request = waiting.pop()
        plan.feed(request.id, worker.answer(request.task, **plan.inputs(request)))
    again, ledger = joint.plan(order, PATCH), ReplyStore(str(tmp_path), order, "b")
    assert ledger.resume(again) == 25
    asked = []

    def answer(task, **inputs):
        asked.append(task)
        return worker.answer(task, **inputs)

    assert np.array_equal(run(again, answer).image, pixels)
    assert len(asked) == len(plan.requests) - 25


@pytest.mark.parametrize(
    ("levels", "told"),
    [
        ("2,1", "must fall from the guide's scale 2 to 0"),
        ("1,0", "must fall from the guide's scale 2 to 0"),
        ("2,0,1,0", "must fall"),
        ("a,b", "does not fit; give a list of scales"),
    ],
)
def test_levels_that_lead_nowhere_are_refused(levels, told):
    with pytest.raises(UserError, match=told):
        joint.plan(an_order(levels=levels), PATCH)


def test_a_jump_too_far_is_refused_with_a_level_to_put_between():
    import dataclasses

    patch = dataclasses.replace(PATCH, side_px=4, scales=9)
    with pytest.raises(UserError, match=r"no pixel of its own at scale 3; put a level between"):
        joint.plan(orders.parse({"size": 32}), patch)
