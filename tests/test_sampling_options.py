"""What makes sampling cheaper: kept contexts change nothing; trading options do what they say."""

import copy
import dataclasses

import numpy as np
import oracle
import pytest
import torch

from raylarge import order as orders
from raylarge.compute.config import ComputeConfig
from raylarge.diffusion.steps import ddim
from raylarge.errors import UserError
from raylarge.models import bundle as bundles
from raylarge.models import controlnet
from raylarge.models.autoencoder import Autoencoder
from raylarge.models.denoiser import GaussianDenoiser, Guided, NetworkDenoiser, bind_context
from raylarge.models.light_autoencoder import LightAutoencoder
from raylarge.order import Condition
from raylarge.sampling import joint, trajectory
from raylarge.sampling.bundle_facts import BundleFacts
from raylarge.sampling.plan import run
from raylarge.sampling.tasks import DenoiseWindows
from raylarge.workers.worker import Worker

QUICK = {"steps": 2, "derivative": "difference"}


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return bundles.load(tiny_bundle)


def image_of(bundle, **values):
    order = orders.parse({"size": 128, "batch": 4, "seed": 2, **values})
    with torch.no_grad():
        return run(joint.plan(order, bundle.patch), Worker(bundle).answer).image


def tokens_and_x(bundle, count=3):
    generator = torch.Generator().manual_seed(0)
    shape = bundle.summarizer.null(1).shape[1:]
    tokens = torch.randn(count, *shape, generator=generator)
    return tokens, torch.randn(count, *bundle.patch.latent, generator=generator)


@pytest.mark.parametrize("zeros", [0, 1, 3])
def test_a_kept_context_gives_what_its_tokens_give(bundle, zeros):
    """Keys and values once; zero tokens at the end are the output's bias alone."""
    tokens, x_t = tokens_and_x(bundle)
    tokens[3 - zeros :] = 0
    with torch.no_grad():
        context = bundle.unet.context(tokens)
        assert all(len(k) == len(v) == 3 - zeros for k, v in context.keys_values)
        kept, plain = bundle.unet(x_t, 500, context), bundle.unet(x_t, 500, tokens)
    assert (kept - plain).abs().max() <= 1e-5 * plain.abs().max()


def test_zero_tokens_that_are_not_at_the_end_are_attended_to(bundle):
    tokens, x_t = tokens_and_x(bundle)
    tokens[0] = 0
    with torch.no_grad():
        context = bundle.unet.context(tokens)
        assert len(context.keys_values[0][0]) == 3
        assert torch.allclose(bundle.unet(x_t, 9, context), bundle.unet(x_t, 9, tokens), atol=1e-5)


def test_guidance_outside_its_interval_is_the_condition_alone(bundle):
    tokens, x_t = tokens_and_x(bundle)
    plain = NetworkDenoiser(bundle.unet, bundle.schedule)
    guided = Guided(plain, 3.0, None, (0.2, 0.6))
    with torch.no_grad():
        for t, w in ((100, 1.0), (200, 3.0), (600, 3.0), (601, 1.0)):
            c, u = plain(x_t, t, tokens), plain(x_t, t, torch.zeros_like(tokens))
            assert torch.allclose(guided(x_t, t, tokens), u + w * (c - u), atol=1e-4), t
            assert torch.allclose(
                bind_context(guided, tokens)(x_t, t), u + w * (c - u), atol=1e-4
            ), t


def test_correcting_in_every_third_step_leaves_the_others_alone():
    """Against the same steps, written out for one window."""
    variance, patch = 0.5, oracle.PATCH
    denoiser = GaussianDenoiser(0.0, variance)
    order = orders.parse(
        {"size": 128, "batch": 1, "sampler": {"steps": 7, "correct_every": 3, "clamp": False}}
    )
    y = torch.randn(1, 3, 8, 8)
    networks = trajectory.Networks(denoiser, oracle.Unshuffle(), patch)
    task = DenoiseWindows(order, 0, ((1, 2),), 0, 7, 2)
    asked, tokens = [], torch.zeros(1, 65, 4)
    got = trajectory.windows(networks, task, tokens, lambda i: asked.append(i) or y, None)
    assert asked == [0, 3, 6]
    start = trajectory.Stepper(networks, order, 0, ((1, 2),), tokens).start()
    always = order.sampler.replace(correct_every=1)
    x = start
    for i, step in enumerate(denoiser.schedule.steps(7)):
        if i % 3 == 0:
            x = trajectory.correct(
                x, lambda z, t=step.t: denoiser(z, t, tokens), networks.autoencoder, y, always
            )
        x = ddim(x, denoiser(x, step.t, tokens), step)
    assert torch.allclose(got, x, atol=1e-6)


def test_the_small_autoencoder_corrects_and_the_large_one_decodes(bundle):
    same = dataclasses.replace(bundle, vae_small=copy.deepcopy(bundle.vae))
    torch.manual_seed(1)
    other = dataclasses.replace(bundle, vae_small=Autoencoder(LightAutoencoder(width=8, blocks=1)))
    large = image_of(bundle, sampler=QUICK)
    small = {**QUICK, "small_autoencoder": True}
    assert np.array_equal(image_of(same, sampler=small), large)
    assert not np.array_equal(image_of(other, sampler=small), large)
    free = image_of(bundle, sampler={**QUICK, "corrections": 0})
    assert np.array_equal(image_of(other, sampler={**small, "corrections": 0}), free)


def test_a_bundle_carries_its_small_autoencoder(tiny_bundle, tmp_path):
    import shutil

    folder = str(tmp_path / "b")
    shutil.copytree(tiny_bundle, folder)
    asked = orders.parse({"size": 128, "sampler": {"small_autoencoder": True}})
    with pytest.raises(UserError, match="the bundle has no vae_small"):
        BundleFacts.read(folder).check(asked)
    bundles.save(folder, {"vae_small": LightAutoencoder(width=8, blocks=1)}, {})
    BundleFacts.read(folder).check(asked)
    assert BundleFacts.of(bundles.load(folder)) == BundleFacts.read(folder)
    bundles.save(folder, {"vae_small": LightAutoencoder(latent_channels=5, width=8, blocks=1)}, {})
    with pytest.raises(UserError, match=r"vae_small has factor and channels \(4, 5\)"):
        bundles.load(folder)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_half_precision_gives_nearly_the_same_image(tiny_bundle, name):
    """An untrained network is asked for two steps alone: more would amplify anything."""
    single = Worker.opened(tiny_bundle, ComputeConfig())
    half = Worker.opened(tiny_bundle, ComputeConfig(dtype=name))
    assert half.bundle.unet.dtype == ComputeConfig(dtype=name).torch_dtype
    condition = Condition.of(np.ones((2, 2, 8), np.float16)).plain()
    order = orders.parse(
        {"size": 128, "batch": 4, "condition": condition, "sampler": {"steps": 1, "guidance": 1.0}}
    )
    frames = [
        run(joint.plan(order, worker.bundle.patch), worker.answer).frames
        for worker in (single, half)
    ]
    cosine = torch.nn.functional.cosine_similarity(*(f.flatten() for f in frames), dim=0)
    assert cosine > 0.995


def test_a_controlnet_in_half_precision(bundle):
    """Latents are float32, both networks are not."""
    half = copy.deepcopy(bundle.unet).to(torch.bfloat16)
    network = controlnet.build(half, bundle.patch.factor).eval().to(torch.bfloat16)
    tokens, x_t = tokens_and_x(bundle)
    control = torch.zeros(3, 3, 64, 64)
    with torch.no_grad():
        asked = controlnet.Controlled(half, network, bundle.schedule, control)
        found = asked(x_t, 500, tokens.bfloat16())
        plain = NetworkDenoiser(bundle.unet, bundle.schedule)(x_t, 500, tokens)
    assert found.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(found.flatten(), plain.flatten(), dim=0) > 0.99


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"dtype": "int8"}, "dtype=int8: it must be one of: float32, bfloat16, float16"),
        ({"threads": 0}, "threads=0: it must be at least 1"),
        ({"gpus": -0.5}, "gpus=-0.5: it must be -1 or"),
    ],
)
def test_means_that_mean_nothing_are_refused(values, told):
    with pytest.raises(UserError, match=told):
        ComputeConfig(**values)


@pytest.mark.slow
def test_compiled_networks_give_the_same_image(tiny_bundle):
    """Values compiled, derivatives not; each batch shape is compiled once."""
    condition = Condition.of(np.ones((2, 2, 8), np.float16)).plain()
    order = orders.parse({"size": 128, "batch": 4, "condition": condition, "sampler": {"steps": 2}})
    made = []
    for means in (ComputeConfig(), ComputeConfig(compile=True)):
        worker = Worker.opened(tiny_bundle, means)
        made.append(run(joint.plan(order, worker.bundle.patch), worker.answer))
    plain, compiled = made
    assert torch.allclose(plain.frames, compiled.frames, atol=1e-3)
    assert np.abs(plain.image.astype(int) - compiled.image).max() <= 2
