"""Super-resolution: the result, made small, is the image that was given."""

import dataclasses

import oracle
import pytest
import torch

from raylarge import order as orders
from raylarge.diffusion.noise import normal
from raylarge.diffusion.schedule import Schedule
from raylarge.errors import UserError
from raylarge.geometry import batches
from raylarge.models.denoiser import GaussianDenoiser, guided
from raylarge.resample import downsample
from raylarge.sampling import superres, trajectory
from raylarge.sampling.backprop import correct_by_backprop
from raylarge.sampling.canvas import gather, scatter
from raylarge.sampling.constraint import correct
from raylarge.sampling.tasks import DenoiseWindows

PATCH = dataclasses.replace(oracle.PATCH, side_px=64)
CODEC = oracle.Unshuffle()


def an_order(recipe="paper", **sampler):
    values = {"algorithm": "superres", "recipe": recipe, "seed": 5, "batch": 4}
    return orders.parse({**values, "sampler": {"derivative": "difference", **sampler}})


def a_task(order, cells, levels, first=0, last=None):
    return DenoiseWindows(
        order=order,
        scale=order.scale,
        windows=tuple(cells),
        first=first,
        last=order.sampler.steps if last is None else last,
        guided_by=order.scale + levels,
    )


def low_resolution(size, variance):
    """An image half as contrasty as the prior's pixels: natural images stay so when small."""
    return 0.5 * variance**0.5 * normal((3, *size), 1, "test", [(0,)])[0]


def following(networks, task, tokens, y, x_t, correction=correct):
    """Windows under a fixed image; the correction is the order's, by name."""
    name = next(k for k, v in trajectory.CORRECTIONS.items() if v is correction)
    sampler = task.order.sampler.replace(correction=name)
    task = dataclasses.replace(task, order=task.order.replace(sampler=sampler))
    wanted = superres.fixed(y, task, networks.patch)
    return trajectory.windows(networks, task, tokens, wanted, x_t)


def super_resolve(order, y, levels, variance, correction=correct, patch=PATCH):
    """The whole image, in batches of windows as a worker would answer them."""
    networks = trajectory.Networks(GaussianDenoiser(0.0, variance), CODEC, patch)
    rows, columns = superres.layout(y.shape[1:], levels, patch)
    cells = [(r, k) for r in range(rows) for k in range(columns)]
    latents = {}
    for group in batches(len(cells), order.batch):
        task = a_task(order, [cells[i] for i in group], levels)
        tokens = torch.zeros(len(group), 65, 4)
        done = following(networks, task, tokens, y, None, correction)
        latents.update(zip(task.windows, done, strict=True))
    side = patch.side_lat
    places = [(r * side, k * side) for r, k in latents]
    canvas = scatter(torch.stack(list(latents.values())), places, (rows * side, columns * side))
    return CODEC.decode(canvas[None])[0]


def error(image, y, side=PATCH.side_px):
    """|A x - y| / |y - mean y|, with A inside the windows."""
    factor = image.shape[1] // y.shape[1]
    places = [
        (r, k) for r in range(0, image.shape[1], side) for k in range(0, image.shape[2], side)
    ]
    small = downsample(gather(image, places, side), factor)
    small = scatter(small, [(r // factor, k // factor) for r, k in places], tuple(y.shape[1:]))
    return float((small - y).norm() / (y - y.mean(dim=(1, 2), keepdim=True)).norm())


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize(
    # As in joint sampling: the released steps have a fixed length in latent units, made for
    # latents whose standard deviation is several.
    ("recipe", "variance", "falls"),
    [("paper", 0.25, 4), ("released", 25.0, 10)],
)
def test_the_result_made_small_is_the_given_image(recipe, variance, falls, levels):
    q = PATCH.side_px >> levels
    y = low_resolution((2 * q, q), variance)
    order = an_order(recipe)
    free = super_resolve(an_order(recipe, corrections=0), y, levels, variance)
    image = super_resolve(order, y, levels, variance)
    assert image.shape == (3, 2 * PATCH.side_px, PATCH.side_px)
    assert error(free, y) > 0.9
    assert error(free, y) / error(image, y) >= falls


@pytest.mark.parametrize(
    ("size", "levels", "wanted"),
    [((32, 96), 1, (1, 3)), ((48, 16), 2, (3, 1)), ((8, 24), 3, (1, 3)), ((64, 64), 2, (4, 4))],
)
def test_the_layout_of_windows(size, levels, wanted):
    assert superres.layout(size, levels, PATCH) == wanted
    y = low_resolution(size, 0.25)
    image = super_resolve(an_order(steps=1), y, levels, 0.25)
    assert image.shape == (3, size[0] << levels, size[1] << levels)


@pytest.mark.parametrize(
    ("size", "levels", "message"),
    [
        ((32, 33), 1, "32x33 px cannot be super-resolved 2x.*multiples of 32 px"),
        ((15, 16), 2, "multiples of 16 px"),
        ((0, 16), 2, "multiples of 16 px"),
        ((64, 64), 0, "by 2\\^0 does not fit.*choose 2\\^1 to 2\\^6"),
        ((64, 64), 7, "by 2\\^7 does not fit"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(size, levels, message):
    with pytest.raises(UserError, match=message):
        superres.layout(size, levels, PATCH)


def test_each_window_has_its_own_block():
    """Rows before columns: an image that is not square."""
    y = torch.arange(2.0 * 3).reshape(1, 2, 3).repeat_interleave(16, 1).repeat_interleave(16, 2)
    task = a_task(an_order(), [(0, 0), (0, 2), (1, 0), (1, 2)], 2)
    cut = superres.blocks(y.expand(3, -1, -1), task, PATCH)
    assert cut.shape == (4, 3, 16, 16)
    assert cut.amin(dim=(1, 2, 3)).tolist() == cut.amax(dim=(1, 2, 3)).tolist() == [0, 2, 3, 5]
    with pytest.raises(UserError, match=r"\[\(2, 0\)\] lie outside the 2x3 windows"):
        superres.blocks(y.expand(3, -1, -1), a_task(an_order(), [(0, 0), (2, 0)], 2), PATCH)


@pytest.mark.parametrize("recipe", ["paper", "released"])
def test_it_is_joint_sampling_under_frames_that_all_equal_y(tiny_bundle, recipe):
    from raylarge.models.bundle import load

    bundle = load(tiny_bundle)
    networks = trajectory.Networks(guided(bundle.denoiser(), 2.0), bundle.vae, bundle.patch)
    y = low_resolution((64, 64), 0.25)
    order = an_order(recipe, steps=4, corrections=2, clamp=False, derivative="jvp")
    task = a_task(order, [(0, 1), (1, 0)], 1)
    tokens = bundle.summarizer(torch.randn(2, 8, 1, 1), torch.zeros(2, dtype=torch.long)).detach()
    with torch.no_grad():
        wanted = trajectory.windows(
            networks, task, tokens, trajectory.below(y.expand(4, -1, -1, -1), task), None
        )
        found = following(networks, task, tokens, y, None)
        half = following(networks, dataclasses.replace(task, last=2), tokens, y, None)
        rest = following(networks, dataclasses.replace(task, first=2), tokens, y, half)
    assert torch.equal(found, wanted)
    assert torch.equal(rest, wanted)


def test_company_does_not_matter():
    order, y = an_order("released"), low_resolution((32, 48), 25.0)
    networks = trajectory.Networks(GaussianDenoiser(0.0, 25.0), CODEC, PATCH)

    def latents(cells):
        task = a_task(order, cells, 2)
        return following(networks, task, torch.zeros(len(cells), 65, 4), y, None)

    together = latents([(0, 0), (1, 2), (0, 1)])
    assert (latents([(1, 2)])[0] - together[1]).abs().max() < 1e-5


def distance(x_t, x_0, y):
    image = CODEC.decode(x_0(x_t))
    return (downsample(image, image.shape[-1] // y.shape[-1]) - y).flatten(1).norm(dim=1)


@pytest.mark.parametrize("derivative", ["jvp", "difference"])
@pytest.mark.parametrize("side", [32, 16, 8])
def test_backpropagation_has_the_direction_of_the_correction(side, derivative):
    """With an orthogonal autoencoder e of S1 is 2 / s^2 times e of S2."""
    denoiser, s = GaussianDenoiser(0.1, 0.5), PATCH.side_px // side
    x_t, y = torch.randn(3, *PATCH.latent, dtype=torch.float64), torch.randn(3, 3, side, side)
    y = y.double()

    def x_0(x):
        return denoiser(x, 300, x.new_zeros(len(x), 1, 1))

    plain = orders.Sampler(derivative=derivative)
    unit = plain.replace(normalize=True)
    with torch.no_grad():
        by_s1 = correct_by_backprop(x_t, x_0, CODEC, y, plain) - x_t
        by_s2 = correct(x_t, x_0, CODEC, y, plain) - x_t
        assert torch.allclose(by_s1, 2 / s**2 * by_s2, rtol=1e-6, atol=1e-9)
        same = correct_by_backprop(x_t, x_0, CODEC, y, unit)
        assert torch.allclose(same, correct(x_t, x_0, CODEC, y, unit), rtol=1e-6, atol=1e-9)
        before = distance(x_t, x_0, y)
        assert (distance(x_t + by_s1, x_0, y) < before).all()
        assert (distance(x_t + by_s2, x_0, y) < before).all()


def test_backpropagation_reaches_the_given_image_too():
    y = low_resolution((32, 16), 25.0)
    order = an_order("released")
    wanted = super_resolve(order, y, 2, 25.0)
    found = super_resolve(order, y, 2, 25.0, correct_by_backprop)
    assert error(found, y) < 0.1
    assert (found - wanted).abs().max() < 1e-2


def test_backpropagation_through_a_network(tiny_bundle):
    """Windows never meet, parameters get no gradients, and the error falls."""
    from raylarge.models.bundle import load

    vae = load(tiny_bundle).vae
    x_t, y = torch.randn(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    x_0 = torch.nn.Identity()
    sampler = orders.Sampler(correction_lr=0.05, normalize=True)
    found = correct_by_backprop(x_t, x_0, vae, y, sampler).detach()
    alone = correct_by_backprop(x_t[1:], x_0, vae, y[1:], sampler).detach()
    assert (found[1:] - alone).abs().max() < 1e-5
    assert not x_t.requires_grad
    assert all(p.grad is None for p in vae.parameters())

    def away(x):
        return (downsample(vae.decode(x), 4) - y).flatten(1).norm(dim=1)

    assert (away(found) < away(x_t)).all()


def test_the_baseline_listens_to_its_own_block(tiny_bundle):
    from raylarge.models import controlnet
    from raylarge.models.bundle import load

    plain = load(tiny_bundle)
    torch.manual_seed(0)
    made = controlnet.build(plain.unet, plain.patch.factor).eval()
    bundle = dataclasses.replace(plain, controlnet=made)
    order = an_order(steps=3)
    task = a_task(order, [(0, 0), (0, 1), (1, 0)], 1)
    free = dataclasses.replace(task, guided_by=None)
    tokens = torch.randn(3, 65, 64)

    def run(y):
        denoiser = guided(superres.controlled(bundle, task, y), 2.0, bundle.summarizer.null(1))
        networks = trajectory.Networks(denoiser, bundle.vae, bundle.patch)
        return trajectory.windows(networks, free, tokens, None, None)

    y = low_resolution((64, 64), 0.25)
    with torch.no_grad():
        networks = trajectory.Networks(guided(plain.denoiser(), 2.0), plain.vae, plain.patch)
        assert torch.equal(run(y), trajectory.windows(networks, free, tokens, None, None))
        for module in [made.controlnet_cond_embedding.conv_out, *made.controlnet_down_blocks]:
            torch.nn.init.normal_(module.weight, std=0.1)
        before, changed = run(y), y.clone()
        changed[:, 32:, :32] *= -1
        away = (run(changed) - before).abs().amax(dim=(1, 2, 3))
    assert (away > 1e-3).tolist() == [False, False, True]
    with pytest.raises(UserError, match="no ControlNet"):
        superres.controlled(plain, task, y)


def test_the_released_settings():
    sampler = an_order("released").sampler
    assert [step.t for step in Schedule().steps(sampler.steps)][:2] == [951, 901]
    assert (sampler.guidance, sampler.corrections, sampler.correction_lr, sampler.normalize) == (
        3.0,
        5,
        0.5,
        True,
    )
