"""The constraint on the arranged mosaic: against its text, against the other one, in any order."""

import base64
import dataclasses

import numpy as np
import oracle
import pytest
import torch

from raylarge import images
from raylarge import order as orders
from raylarge.diffusion.noise import normal
from raylarge.diffusion.schedule import Schedule
from raylarge.errors import UserError
from raylarge.metrics.consistency import cross_scale_error, window_error
from raylarge.models.bundle import load
from raylarge.models.denoiser import GaussianDenoiser
from raylarge.order import Source
from raylarge.resample import bicubic_matrix, downsample, upsample
from raylarge.sampling import joint, mosaic
from raylarge.sampling.canvas import scatter
from raylarge.sampling.plan import MemoryStore, run
from raylarge.sampling.tasks import DenoiseMosaicRow, DenoiseWindows, Parts
from raylarge.workers.worker import Worker

PATCH = oracle.PATCH
PLAIN = {"normalize": False, "clamp": False}


def an_order(**values):
    values.setdefault("size", 4 * PATCH.side_px)
    sampler = {"constraint": "mosaic", **values.pop("sampler", {})}
    return orders.parse({"seed": 5, "batch": 3, "sampler": sampler, **values})


def latent_of(order, worker):
    """The finished latents of all windows as one [c, h, w], and the result."""
    found = {}

    def answer(task, **inputs):
        reply = worker.answer(task, **inputs)
        if isinstance(task, DenoiseWindows) and task.last == order.sampler.steps:
            found.update(zip(task.windows, reply, strict=True))
        if isinstance(task, DenoiseMosaicRow) and not isinstance(reply, Parts):
            found.update({(task.row, column): z for column, z in enumerate(reply)})
        return reply

    made, patch = run(joint.plan(order, worker.bundle.patch), answer), worker.bundle.patch
    places = [(row * patch.side_lat, column * patch.side_lat) for row, column in found]
    size = tuple(length // patch.factor for length in order.size)
    return scatter(torch.stack(list(found.values())), places, size), made


@pytest.mark.parametrize("recipe", ["paper", "released"])
@pytest.mark.parametrize("size", ["128x128", "96x128"])
def test_it_equals_its_text_on_the_whole_canvas(recipe, size):
    """A of one image in float64, no windows, no rows, no shares."""
    mean, variance = 0.2, 0.7
    order = an_order(recipe=recipe, size=size, sampler={**PLAIN, "steps": 6, "corrections": 2})
    latent, made = latent_of(order, Worker(oracle.bundle(), GaussianDenoiser(mean, variance)))
    got = oracle.Unshuffle().decode(latent[None])[0]

    sampler, (height, width) = order.sampler, order.size
    down, across = (torch.from_numpy(bicubic_matrix(side, 4)) for side in order.size)

    def pixels(scale, step, rows, columns):
        places = [(scale, r, c, step) for r in range(rows) for c in range(columns)]
        latents = normal(PATCH.latent, order.seed, "sampling", places)
        images = oracle.Unshuffle().decode(latents).double()
        return images.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)

    windows = (height // 32, width // 32)
    x, guide = pixels(0, 0, *windows), pixels(2, 0, 1, 1)
    for i, step in enumerate(Schedule().steps(sampler.steps)):
        root = step.abar**0.5
        gain = root * variance / (step.abar * variance + 1 - step.abar)

        def x_0(z, root=root, gain=gain):
            return mean + gain * (z - root * mean)

        left = (1 - step.abar_prev) / (1 - step.abar) * (1 - step.abar / step.abar_prev)
        sigma = sampler.eta * left**0.5

        def stepped(z, noise, step=step, root=root, sigma=sigma, x_0=x_0):
            eps = (z - root * x_0(z)) / (1 - step.abar) ** 0.5
            rest = (1 - step.abar_prev - sigma**2) ** 0.5
            return step.abar_prev**0.5 * x_0(z) + rest * eps + sigma * noise

        y = x_0(guide)[:, : height // 4, : width // 4]
        for _ in range(sampler.corrections):
            error = y - down @ x_0(x) @ across.mT
            x = x + sampler.correction_lr * gain * 16 * (down.mT @ error @ across)
        x, guide = (
            stepped(x, pixels(0, i + 1, *windows)),
            stepped(guide, pixels(2, i + 1, 1, 1)),
        )
    assert (got.double() - x).abs().max() < 2e-5
    assert made.image.shape == (height, width, 3)


def test_with_a_network_it_equals_algorithm_s2_with_one_mosaic(tiny_bundle):
    """The literal loop: every window advances together, A acts on all of them arranged."""
    bundle = load(tiny_bundle)
    order = an_order(size=128, batch=2, sampler={"steps": 3, "corrections": 2})
    got, made = latent_of(order, Worker(bundle))
    side, cells, sampler = bundle.patch.side_px, [(0, 0), (0, 1), (1, 0), (1, 1)], order.sampler
    enc, dec, null = bundle.vae.encode, bundle.vae.decode, bundle.summarizer.null(4)

    def along(f, at, v):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return torch.func.jvp(f, (at,), (v,))[1]

    def arranged(images):
        return torch.cat([torch.cat(list(images[:2]), 2), torch.cat(list(images[2:]), 2)], 1)

    def cut(canvas):
        return torch.stack([canvas[:, r * side :, c * side :][:, :side, :side] for r, c in cells])

    with torch.no_grad():
        places = [(0, r, c, 0) for r, c in cells]
        z = normal(bundle.patch.latent, order.seed, "sampling", places)
        denoise = bundle.denoiser()
        for i, step in enumerate(bundle.schedule.steps(sampler.steps)):
            f = lambda v, t=step.t: denoise(v, t, null)  # noqa: E731
            for _ in range(sampler.corrections):
                image = dec(f(z))
                e_img = cut(upsample(made.frames[i] - downsample(arranged(image), 2), 2))
                z = z + sampler.correction_lr * along(f, z, along(enc, image, e_img))
            x_0 = f(z)
            eps = (z - step.abar**0.5 * x_0) / (1 - step.abar) ** 0.5
            z = step.abar_prev**0.5 * x_0 + (1 - step.abar_prev) ** 0.5 * eps
    assert (got - arranged(z)).abs().max() < 1e-5 * z.abs().max()


@pytest.mark.parametrize(("recipe", "variance"), [("paper", 0.25), ("released", 25.0)])
def test_each_constraint_lowers_its_own_error_further(recipe, variance):
    """A of the whole mosaic under `mosaic`, A inside each window under `window`."""
    patch, error = dataclasses.replace(PATCH, side_px=64), {}
    for constraint in ("window", "mosaic"):
        sampler = {"constraint": constraint, "clamp": False, "derivative": "difference"}
        order = an_order(size=4 * patch.side_px, recipe=recipe, sampler=sampler)
        worker = Worker(oracle.bundle(patch), GaussianDenoiser(0.0, variance))
        latent, made = latent_of(order, worker)
        image = oracle.Unshuffle().decode(latent[None])[0]
        error[constraint] = [
            metric(image, made.frames[-1]) for metric in (cross_scale_error, window_error)
        ]
    (across, inside), (across_mosaic, inside_mosaic) = error["window"], error["mosaic"]
    assert across_mosaic < 0.96 * across
    assert inside < 0.98 * inside_mosaic


def test_a_super_resolved_image_may_follow_the_mosaic_too():
    """The mosaic made small comes close to the given image, borders included."""
    small = np.random.default_rng(0).integers(60, 190, (24, 32, 3)).astype(np.uint8)
    source = Source(image=base64.b64encode(images.png_bytes(small)).decode(), octaves=2)
    sampler = {"steps": 20, "corrections": 4}
    order = an_order(size="96x128", algorithm="superres", sampler=sampler, source=source)
    latent, _ = latent_of(order, Worker(oracle.bundle(), GaussianDenoiser(0.0, 1.0)))
    left = downsample(oracle.Unshuffle().decode(latent[None])[0], 4) - images.to_float(small)
    assert left.abs().mean() < 0.05


@pytest.mark.parametrize("small", [1, 2, 3, 8])
def test_shares_add_up_to_the_downsampled_mosaic(small):
    """Round trip, row by row, however few small pixels a window has."""
    layout = mosaic.MosaicLayout(rows=6, columns=2, side=8 * small, factor=8)
    image = torch.randn(3, 6 * layout.side, 2 * layout.side)
    whole, total = downsample(image, 8), torch.zeros(3, 6 * small, 2 * small)
    for r in range(6):
        down, across = mosaic._blocks(layout, r)
        low, high = layout.span(r)
        strip = image[:, r * layout.side : (r + 1) * layout.side]
        total[:, low:high] += down @ strip @ across.mT
        near = layout.neighbours(r)
        assert r in near
        assert near == tuple(sorted(near))
    assert torch.allclose(total, whole, atol=1e-5)


def test_rows_in_any_order_and_after_a_kill_give_the_same_bytes(tiny_bundle):
    """Answer independence: replies in random order, and a plan restored half-way."""
    worker = Worker(load(tiny_bundle))
    order = an_order(size="192x128", batch=2, sampler={"steps": 2, "corrections": 2})
    first = run(joint.plan(order, worker.bundle.patch), worker.answer).image
    plan, random = joint.plan(order, worker.bundle.patch), np.random.default_rng(3)
    waiting = list(plan.ready())
    while not plan.done:
        request = waiting.pop(int(random.integers(len(waiting))))
        plan.feed(request.id, worker.answer(request.task, **plan.inputs(request)))
        waiting += plan.ready()
        if plan.progress > 0.5 and isinstance(plan.store, MemoryStore):
            plan = joint.plan(order, worker.bundle.patch).restore(plan.snapshot())
            waiting, plan.store = list(plan.ready()), _Other()
    assert np.array_equal(plan.result.image, first)


class _Other(MemoryStore):
    """A store by another name, so that the plan is restored once."""


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"sampler": {"constraint": "tile"}}, "constraint=tile"),
        ({"sampler": {"correction": "backprop"}}, "correction encoder"),
        ({"levels": "2,1,0"}, "leave out levels"),
        ({"refine": True}, "refine"),
    ],
)
def test_what_a_mosaic_cannot_do_is_refused(values, told):
    with pytest.raises(UserError, match=told):
        joint.plan(an_order(**values), PATCH)
