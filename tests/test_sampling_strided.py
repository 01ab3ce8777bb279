"""Overlapping windows in bands: against the published figures, a literal loop, the closed form."""

import dataclasses
import random

import numpy as np
import oracle
import pytest
import torch
from published import drawn, figures
from torch import nn

from raylarge import order as orders
from raylarge.diffusion.noise import normal
from raylarge.diffusion.schedule import Schedule
from raylarge.diffusion.slerp import slerp
from raylarge.diffusion.steps import ddim
from raylarge.errors import UserError
from raylarge.geometry import Patch, windows
from raylarge.models.conditioner import normalise
from raylarge.models.denoiser import GaussianDenoiser, NetworkDenoiser, standard_guidance
from raylarge.order import Condition
from raylarge.sampling import bands, joint
from raylarge.sampling.canvas import kernel, scatter
from raylarge.sampling.plan import run
from raylarge.sampling.strided import interpolated
from raylarge.sampling.tasks import (
    DecodeBand,
    DenoiseBand,
    DenoiseGuide,
    DenoiseWindows,
    EncodeContext,
)
from raylarge.workers.worker import Worker

PATCH = oracle.PATCH  # latents of 12 x 16 x 16
CORNERS = [(0, 0), (0, 64), (64, 0), (64, 64)]


@pytest.mark.parametrize("u", [0.0, 0.25, 0.5, 1.0])
def test_slerp_is_the_published_one(parity, u):
    wanted = figures(parity, "slerp")
    assert (slerp(u, wanted["a"], wanted["b"]) - wanted[f"t{u}"]).abs().max() <= 1e-6


def test_slerp_of_parallel_and_zero_vectors(parity):
    wanted = figures(parity, "slerp")
    a, b = wanted["a"], wanted["b"]
    assert (slerp(0.3, a, 1.001 * a + 1e-4) - wanted["near"]).abs().max() <= 1e-6
    assert torch.allclose(slerp(0.3, torch.zeros_like(b), b), 0.3 * b)
    assert torch.allclose(slerp(0.5, a, -a), torch.zeros_like(a), atol=1e-6)
    both = slerp(torch.tensor([0.0, 1.0]), torch.stack([a, a]), torch.stack([b, b]))
    assert torch.allclose(both, torch.stack([a, b]), atol=1e-6)


def test_each_condition_stands_at_its_own_row_and_column():
    grid = torch.zeros(3, 2, 3)
    grid[0, 0, 0] = grid[1, 0, 2] = grid[2, 1, 0] = 1.0  # no two alike, not symmetric
    at = interpolated(grid, [(0, 0), (0, 32), (16, 0), (16, 32)], 16)
    assert torch.equal(at[0], torch.tensor([1.0, 0, 0]))
    assert torch.equal(at[1], torch.tensor([0, 1.0, 0]))
    assert torch.equal(at[2], torch.tensor([0, 0, 1.0]))
    assert not at[3].any()
    half = interpolated(grid, [(8, 0)], 16)[0]
    assert torch.allclose(half, torch.tensor([0.5**0.5, 0, 0.5**0.5]))


def published_unet(x_t, t, context):
    """The figures' analytic model; t is the timestep that the released loop tells it."""
    return 0.3 * x_t.tanh() + 0.01 * context.mean(dim=(1, 2))[:, None, None, None] + 1e-4 * t


class PublishedSummarizer(nn.Module):
    def forward(self, grid, scale):
        return normalise(grid[..., 0, 0])[:, :8].sum(dim=1)[:, None, None].expand(-1, 65, 512)

    def null(self, count):
        return torch.zeros(count, 65, 512)


def final_latents(plan, answer):
    """Carry a plan out without decoding; the finished latent canvas."""
    rows = {}

    def watched(task, **inputs):
        if isinstance(task, DecodeBand):
            return np.zeros((1, 1, 3), np.uint8)
        reply = answer(task, **inputs)
        if isinstance(task, DenoiseBand) and not task.windows and task.step:
            rows[task.band] = reply
        return reply

    run(plan, watched)
    return torch.cat([rows[j] for j in sorted(rows)], dim=1)


def test_seam_removal_is_the_published_one(parity, monkeypatch):
    """The whole plan, with the figures' noise: the first draw by patches, the others whole."""
    given = figures(parity, "postprocess")

    def noise(shape, seed, stream, addresses):
        at = list(addresses)
        if at[0][3] == 0:
            first = drawn("pp/noise0", (4, 3, 64, 64))
            return torch.stack([first[2 * row + column] for _, row, column, _ in at])
        whole = drawn(f"pp/noise{at[0][3]}", (1, 3, 128, 128))[0]
        cut = [whole[:, 64 * r : 64 * r + 64, 64 * c : 64 * c + 64] for _, r, c, _ in at]
        return torch.stack(cut)

    monkeypatch.setattr(bands, "normal", noise)
    patch = Patch(side_px=256, factor=4, channels=3, scales=8)
    bundle = dataclasses.replace(oracle.bundle(patch), summarizer=PublishedSummarizer())
    worker = Worker(bundle, NetworkDenoiser(published_unet, Schedule(), timestep_offset=1))
    condition = Condition.of(np.zeros((2, 2, 32), np.float16)).plain()
    order = orders.parse(
        {
            "size": 512,
            "refine": True,
            "condition": condition,
            "sampler": {"guidance": standard_guidance(2.0), "steps": 1, "corrections": 0},
        }
    )

    def answer(task, **inputs):
        if isinstance(task, DenoiseWindows):  # the finished patches are given
            return torch.stack([given["xt"][2 * r + c] for r, c in task.windows])
        if isinstance(task, EncodeContext) and task.interpolated:
            return interpolated(given["ssl"], task.windows, 64)
        if isinstance(task, DenoiseGuide):
            return torch.zeros(2, 3, 4, 4)
        return np.zeros(1) if isinstance(task, EncodeContext) else worker.answer(task, **inputs)

    found = final_latents(joint.plan(order, patch), answer)
    wanted = scatter(given["out"], CORNERS, (128, 128))
    assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def an_order(**values):
    sampler = {"steps": 5, **values.pop("sampler", {})}
    return orders.parse(
        {"size": "80x104", "algorithm": "strided", "batch": 3, "sampler": sampler, **values}
    )


class WindowMean:
    """A denoiser whose estimate depends on the whole window: seams show."""

    schedule = Schedule()

    def __call__(self, x_t, t, context):
        slope = torch.linspace(0.2, 0.6, x_t.shape[-1])
        return slope * x_t + 0.3 * x_t.mean(dim=(1, 2, 3), keepdim=True)


@pytest.mark.parametrize("average", ["gaussian", "uniform"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_bands_equal_the_loop_over_the_whole_canvas(average, eta):
    """80 x 104 px are 40 x 52 cells: neither a multiple of the patch nor of the stride."""
    order = an_order(strided={"average": average}, sampler={"eta": eta})
    found = final_latents(joint.plan(order, PATCH), Worker(oracle.bundle(), WindowMean()).answer)
    denoise, side, height, width = WindowMean(), 16, 40, 52
    weight = kernel(side) if average == "gaussian" else torch.ones(side, side)

    def noise(step):
        rows = []
        for r in range(3):
            at = [(0, r, c, step) for c in range(4)]
            rows.append(torch.cat(list(normal(PATCH.latent, order.seed, "sampling", at)), 2))
        return torch.cat(rows, 1)[:, :height, :width]

    x_t = noise(0)
    for i, step in enumerate(Schedule().steps(5)):
        total, mass = torch.zeros_like(x_t), torch.zeros(1, height, width)
        for r, c in windows((height, width), side, 4):
            x_0 = denoise(x_t[None, :, r : r + side, c : c + side], step.t, None)[0]
            total[:, r : r + side, c : c + side] += weight * x_0
            mass[:, r : r + side, c : c + side] += weight
        x_t = ddim(x_t[None], (total / mass)[None], step, eta, noise(i + 1)[None])[0]
    assert found.shape == x_t.shape
    assert (found - x_t).abs().max() <= 1e-5


def test_closed_form_and_the_patches_of_joint_sampling():
    """Under a Gaussian prior windows agree: strided = one patch at a time = joint, K = 0."""
    worker = Worker(oracle.bundle(), GaussianDenoiser(0.1, 0.25))
    order = an_order(size=64)
    image = run(joint.plan(order, PATCH), worker.answer).image
    plain = orders.parse({"size": 64, "sampler": {"steps": 5, "corrections": 0}})
    apart = run(joint.plan(plain, PATCH), worker.answer).image
    assert np.abs(image.astype(int) - apart).max() <= 1
    latent = final_latents(joint.plan(order, PATCH), worker.answer)
    assert latent.mean() == pytest.approx(0.1, abs=0.05)


def test_law_4_for_bands():
    worker = Worker(oracle.bundle(), WindowMean())
    order = an_order()
    pixels = run(joint.plan(order, PATCH), worker.answer).image
    for seed in range(2):
        shuffle, plan, waiting = random.Random(seed), joint.plan(order, PATCH), []
        for _ in range(9):
            waiting += plan.ready()
            shuffle.shuffle(waiting)
            request = waiting.pop()
            plan.feed(request.id, worker.answer(request.task, **plan.inputs(request)))
        again = joint.plan(order, PATCH).restore(plan.snapshot())
        assert np.array_equal(run(again, worker.answer).image, pixels)
    assert pixels.shape == (80, 104, 3)


def test_a_condition_colours_its_own_place(tiny_bundle):
    """Asymmetric: changing one patch's embedding changes the image around it alone."""
    from raylarge.models.bundle import load

    worker = Worker(load(tiny_bundle))
    grid = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float16)
    changed = grid.copy()
    changed[0, 4] *= -1
    images = []
    for embeddings in (grid, changed):
        condition = Condition.of(embeddings).plain()
        order = orders.parse(
            {
                "size": "128x320",
                "algorithm": "strided",
                "strided": {"share": 2},
                "condition": condition,
                "sampler": {"steps": 1, "guidance": 100.0},
            }
        )
        images.append(run(joint.plan(order, worker.bundle.patch), worker.answer).image)
    differ = (images[0] != images[1]).any(axis=2)
    assert differ[:64, 256:].mean() > 0.5
    assert not differ[:, :128].any()


def test_seams_are_fewer_after_refinement(tiny_bundle):
    """The plan with seam removal changes the image, keeps the guide, and needs no embeddings."""
    from raylarge.models.bundle import load

    worker = Worker(load(tiny_bundle))
    values = {"size": 128, "batch": 4, "sampler": {"steps": 2, "derivative": "difference"}}
    plain = run(joint.plan(orders.parse(values), worker.bundle.patch), worker.answer)
    refined = orders.parse(values | {"refine": True})
    made = run(joint.plan(refined, worker.bundle.patch), worker.answer)
    assert torch.equal(made.frames, plain.frames)
    assert made.image.shape == plain.image.shape
    assert (made.image != plain.image).any()


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"size": 31}, "must be multiples of 2 from the patch side 32"),
        ({"size": 16}, "from the patch side 32"),
        ({"strided": {"share": 3}}, "strided.share 3 must divide the 16 latent cells"),
        (
            {"strided": {"average": "mean"}},
            "strided.average=mean: it must be one of: gaussian, uniform",
        ),
        ({"strided": {"coarser": 0}}, "strided.coarser=0: it must be from 1 to"),
        ({"condition": {"kind": "cdm"}}, "the CDM draws no embeddings to interpolate"),
        ({"scale": 9}, "order.scale 9 is not one of 0 to 3"),
        ({"algorithm": "magic"}, "algorithm=magic: it must be one of: joint, strided, superres"),
    ],
)
def test_bad_strided_orders_are_refused(values, told):
    with pytest.raises(UserError, match=told):
        joint.plan(an_order(**values), PATCH)


@pytest.mark.parametrize("algorithm", ["strided", "joint"])
def test_every_plan_runs_in_half_precision(tiny_bundle, algorithm):
    """bfloat16 networks, float32 canvases and embeddings: near the image of float32."""
    from raylarge.models.bundle import load

    grid = np.random.default_rng(0).standard_normal((2, 2, 8)).astype(np.float16)
    order = orders.parse(
        {
            "size": 128,
            "algorithm": algorithm,
            "refine": algorithm == "joint",
            "condition": Condition.of(grid).plain(),
            "batch": 4,
            "sampler": {"steps": 2},
        }
    )
    images = []
    for dtype in (torch.float32, torch.bfloat16):
        worker = Worker(load(tiny_bundle, dtype=dtype))
        images.append(run(joint.plan(order, worker.bundle.patch), worker.answer).image)
    away = np.abs(images[0].astype(int) - images[1])
    assert away.mean() < 3
    assert away.max() > 0
