"""Joint sampling against its closed form, and against Algorithm S2 transcribed literally."""

import dataclasses

import numpy as np
import oracle
import pytest
import torch

from raylarge import order as orders
from raylarge.diffusion.linearize import linearize
from raylarge.diffusion.noise import normal
from raylarge.diffusion.schedule import Schedule
from raylarge.metrics.consistency import cross_scale_error
from raylarge.models.denoiser import GaussianDenoiser
from raylarge.resample import bicubic_matrix
from raylarge.sampling import joint
from raylarge.sampling.canvas import scatter
from raylarge.sampling.plan import run
from raylarge.sampling.tasks import DecodeBand, DenoiseWindows
from raylarge.workers.worker import Worker

PATCH = oracle.PATCH


def finished_latents(plan, answer):
    """Run a plan and keep the latents of the last chunk of every window."""
    kept = {}

    def watched(task, **inputs):
        reply = answer(task, **inputs)
        if isinstance(task, DenoiseWindows) and task.last == task.order.sampler.steps:
            kept.update(zip(task.windows, reply, strict=True))
        return reply

    return run(plan, watched), kept


def an_order(**values):
    return orders.parse({"size": 4 * PATCH.side_px, "seed": 5, "batch": 8, **values})


@pytest.mark.parametrize("recipe", ["paper", "released"])
def test_the_sampler_equals_its_closed_form_recursion(recipe):
    """Oracle. Dense matrices, float64, one window: no autograd, no windows, no plan."""
    mean, variance, cell = 0.2, 0.7, (1, 2)
    order = an_order(
        recipe=recipe, sampler={"normalize": False, "clamp": False, "steps": 10, "corrections": 2}
    )
    worker = Worker(oracle.bundle(), GaussianDenoiser(mean, variance))
    made, latents = finished_latents(joint.plan(order, PATCH), worker.answer)
    image, frames = made.image, made.frames

    sampler, side, s = order.sampler, PATCH.side_px, 4
    d = torch.from_numpy(bicubic_matrix(side, s))
    a, u = torch.kron(d, d), s * s * torch.kron(d, d).T

    def pixels(scale, place, step):
        latent = normal(PATCH.latent, order.seed, "sampling", [(scale, *place, step)])
        return oracle.Unshuffle().decode(latent).double()[0].flatten(1)

    x, guide = pixels(0, cell, 0), pixels(2, (0, 0), 0)
    for i, step in enumerate(Schedule().steps(sampler.steps)):
        root = step.abar**0.5
        gain = root * variance / (step.abar * variance + 1 - step.abar)

        def x_0(z, root=root, gain=gain):
            return mean + gain * (z - root * mean)

        sigma = (
            sampler.eta
            * ((1 - step.abar_prev) / (1 - step.abar) * (1 - step.abar / step.abar_prev)) ** 0.5
        )

        def down(z, scale, place, i=i, step=step, root=root, sigma=sigma):
            eps = (z - root * x_0(z)) / (1 - step.abar) ** 0.5
            fresh = pixels(scale, place, i + 1) if sigma else 0.0
            rest = (1 - step.abar_prev - sigma**2) ** 0.5
            return step.abar_prev**0.5 * x_0(z) + rest * eps + sigma * fresh

        frame = x_0(guide).view(3, side, side)
        assert torch.allclose(frame.float(), frames[i], atol=1e-5)
        rows = slice(cell[0] * side // s, (cell[0] + 1) * side // s)
        columns = slice(cell[1] * side // s, (cell[1] + 1) * side // s)
        y = frame[:, rows, columns].flatten(1)
        for _ in range(sampler.corrections):
            x = x + sampler.correction_lr * gain * ((y - x_0(x) @ a.T) @ u.T)
        x, guide = down(x, 0, cell), down(guide, 2, (0, 0))
    got = oracle.Unshuffle().decode(latents[cell]).double().flatten(1)
    assert (got - x).abs().max() < 1e-5
    assert image.shape == (4 * side, 4 * side, 3)


@pytest.mark.parametrize(
    ("recipe", "variance", "falls"),
    # The released steps have a fixed size in latent units, made for VQ-f4's raw latents, whose
    # standard deviation is several; the guide is not clamped, since such values are no pixels.
    [("paper", 0.25, 4), ("released", 25.0, 10)],
)
def test_the_constraint_lowers_the_cross_scale_error(recipe, variance, falls):
    """Oracle: at least 4 times under `paper`, 10 times under `released`."""
    patch = dataclasses.replace(PATCH, side_px=64)
    error = {}
    for inner in (0, orders.RECIPES[recipe].get("corrections", 1)):
        settings = {"corrections": inner, "clamp": False, "derivative": "difference"}
        order = an_order(recipe=recipe, size=4 * patch.side_px, sampler=settings)
        worker = Worker(oracle.bundle(patch), GaussianDenoiser(0.0, variance))
        made, latents = finished_latents(joint.plan(order, patch), worker.answer)
        frames = made.frames
        places = [(row * 32, column * 32) for row, column in latents]
        canvas = scatter(torch.stack(list(latents.values())), places, (128, 128))
        image = oracle.Unshuffle().decode(canvas[None])[0]
        error[bool(inner)] = cross_scale_error(image, frames[-1])
    assert error[False] > 0.9
    assert error[False] / error[True] >= falls, error


def test_unconstrained_joint_sampling_equals_independent_windows():
    """Oracle: without corrections a window does not know that there is a guide."""
    order = an_order(sampler={"corrections": 0, "steps": 5})
    worker = Worker(oracle.bundle(), GaussianDenoiser(0.0, 1.0))
    _, latents = finished_latents(joint.plan(order, PATCH), worker.answer)
    task = DenoiseWindows(order, 0, ((0, 3),) * 8, 0, 5, None)
    alone = worker.answer(task, tokens=torch.zeros(8, 65, 4))
    assert torch.equal(alone[0], latents[(0, 3)])


def test_samples_converge_to_the_prior_as_steps_grow():
    """Oracle: the marginal of DDIM's result approaches N(m, v)."""
    away = []
    for steps in (5, 20, 200):
        order = orders.parse({"count": 64, "seed": 1, "batch": 64, "sampler": {"steps": steps}})
        worker = Worker(oracle.bundle(), GaussianDenoiser(0.1, 0.04))
        _, latents = finished_latents(joint.plan(order, PATCH), worker.answer)
        values = torch.stack(list(latents.values()))
        away.append(abs(float(values.std()) - 0.2) + abs(float(values.mean()) - 0.1))
    assert away[0] > away[1] > away[2]
    assert away[2] < 0.01


@pytest.mark.parametrize("derivative", ["jvp", "difference"])
@pytest.mark.parametrize("recipe", ["paper", "released"])
def test_guide_first_equals_algorithm_s2_step_by_step(tiny_bundle, recipe, derivative):
    """The literal loop of Algorithm S2: guide and windows advance together in every step."""
    from raylarge.models.bundle import load
    from raylarge.models.denoiser import guided
    from raylarge.resample import downsample, upsample

    bundle = load(tiny_bundle)
    settings = {"steps": 4, "corrections": 2, "derivative": derivative, "guidance": 2.0}
    order = orders.parse(
        {
            "size": 128,
            "batch": 4,
            "seed": 9,
            "chunk": 3,
            "recipe": recipe,
            "condition": {"kind": "cdm", "fine": "independent", "draw": "paper"},
            "sampler": settings,
        }
    )
    worker, side = Worker(bundle), bundle.patch.side_px
    made, latents = finished_latents(joint.plan(order, bundle.patch), worker.answer)
    frames = made.frames
    cells, sampler = [(0, 0), (0, 1), (1, 0), (1, 1)], order.sampler
    enc, dec = bundle.vae.encode, bundle.vae.decode

    def unit(v):
        return v / v.abs().amax(dim=(1, 2, 3), keepdim=True) if sampler.normalize else v

    def along(f, at, v):
        if derivative == "difference":
            return (f(at + 0.005 * v) - f(at)) / 0.005
        return linearize(f, at)[1](v)

    def noises(scale, places, step):
        return normal(
            bundle.patch.latent, order.seed, "sampling", [(scale, *place, step) for place in places]
        )

    with torch.no_grad():
        how = order.condition.draw
        c_fine = bundle.cdm.draw(0, order.seed, [(0, *cell) for cell in cells], how)
        c_guide = bundle.cdm.draw(1, order.seed, [(1, 0, 0)], how)
        denoise = guided(bundle.denoiser(), sampler.guidance)
        z, z_l = noises(0, cells, 0), noises(1, [(0, 0)], 0)
        for i, step in enumerate(bundle.schedule.steps(sampler.steps)):
            f = lambda v, t=step.t: denoise(v, t, c_fine)  # noqa: E731
            y = dec(denoise(z_l, step.t, c_guide))[0]
            assert (y - frames[i]).abs().max() <= 1e-6
            y = y.clamp(-1, 1) if sampler.clamp else y
            half = side // 2
            parts = torch.stack(
                [y[:, r * half : (r + 1) * half, k * half : (k + 1) * half] for r, k in cells]
            )
            for _ in range(sampler.corrections):
                image = dec(f(z))
                e_img = unit(upsample(parts - downsample(image, 2), 2))
                e = unit(along(enc, image, e_img))
                z = z + sampler.correction_lr * unit(along(f, z, e))
            sigma = (
                sampler.eta
                * ((1 - step.abar_prev) / (1 - step.abar) * (1 - step.abar / step.abar_prev)) ** 0.5
            )
            for name, now, c, scale, places in (
                ("fine", z, c_fine, 0, cells),
                ("guide", z_l, c_guide, 1, [(0, 0)]),
            ):
                x_0 = denoise(now, step.t, c)
                eps = (now - step.abar**0.5 * x_0) / (1 - step.abar) ** 0.5
                new = step.abar_prev**0.5 * x_0 + (1 - step.abar_prev - sigma**2) ** 0.5 * eps
                new = new + sigma * noises(scale, places, i + 1)
                z, z_l = (new, z_l) if name == "fine" else (z, new)
    for cell, latent in zip(cells, z, strict=True):
        assert (latents[cell] - latent).abs().max() <= 1e-6


def test_each_condition_lands_at_its_own_row_and_column(tiny_bundle):
    """Rows before columns: an asymmetric canvas, one embedding changed, one window changes."""
    from raylarge.models.bundle import load

    bundle = load(tiny_bundle)
    worker = Worker(bundle)
    grid = np.random.default_rng(0).standard_normal((2, 4, 8)).astype(np.float16)
    changed = grid.copy()
    changed[1, 2] *= -1
    sides = {}
    for name, embeddings in (("before", grid), ("after", changed)):
        condition = orders.Condition.of(embeddings).plain()
        settings = {"steps": 3, "corrections": 0}
        order = orders.parse(
            {"size": "128x256", "batch": 4, "sampler": settings, "condition": condition}
        )
        _, sides[name] = finished_latents(joint.plan(order, bundle.patch), worker.answer)
    differ = {
        cell
        for cell in sides["before"]
        if not torch.equal(sides["before"][cell], sides["after"][cell])
    }
    assert differ == {(1, 2)}


def test_a_canvas_need_not_be_square_or_a_power_of_two():
    order = an_order(size="96x160", sampler={"steps": 3})
    worker = Worker(oracle.bundle(), GaussianDenoiser(0.0, 0.25))
    made = run(joint.plan(order, PATCH), worker.answer)
    image, frames = made.image, made.frames
    assert image.shape == (96, 160, 3)
    assert frames.shape[0] == 4
    bands = [
        r for r in joint.plan(order, PATCH).requests.values() if isinstance(r.task, DecodeBand)
    ]
    assert [(b.task.top, b.task.bottom) for b in bands] == [(0, 96)]


@pytest.mark.parametrize("solver", ["plms", "dpm++", "unipc"])
def test_patches_by_every_solver_come_closer_than_ddim(solver):
    """Windows of a Gaussian prior in 20 steps, against DDIM in 400."""
    worker = Worker(oracle.bundle(), GaussianDenoiser(0.1, 0.25))

    def latents(name, steps):
        sampler = {"steps": steps, "solver": name}
        order = orders.parse({"count": 3, "seed": 1, "batch": 2, "sampler": sampler})
        _, found = finished_latents(joint.plan(order, PATCH), worker.answer)
        return torch.stack([found[0, i] for i in range(3)])

    exact = latents("ddim", 400)
    assert (latents(solver, 20) - exact).abs().max() < 0.5 * (
        latents("ddim", 20) - exact
    ).abs().max()


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"count": 2, "sampler": {"solver": "euler"}}, "solver=euler: it must be one of: ddim"),
        ({"size": 64, "sampler": {"solver": "plms"}}, "solver plms is for separate patches"),
        ({"count": 2, "sampler": {"solver": "plms", "eta": 1.0}}, "with eta 0"),
    ],
)
def test_solvers_where_they_do_not_belong_are_refused(values, told):
    from raylarge.errors import UserError

    with pytest.raises(UserError, match=told):
        joint.plan(orders.parse(values), PATCH)
