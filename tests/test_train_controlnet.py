"""A ControlNet starts as the plain U-Net, learns to follow its control, touches nothing else."""

import shutil
from functools import partial

import bundles as small
import numpy as np
import pytest
import torch

from raylarge.data import encode
from raylarge.data.encode import EncodeConfig
from raylarge.data.pipeline import ExecutorConfig
from raylarge.diffusion.loss import mse_per_sample
from raylarge.diffusion.noise import generator
from raylarge.diffusion.schedule import Schedule
from raylarge.errors import UserError
from raylarge.images import to_uint8
from raylarge.models import bundle as bundles
from raylarge.models.controlnet import lift
from raylarge.models.summarizer import Summarizer
from raylarge.resample import downsample
from raylarge.train import registry
from raylarge.train.config import Train
from raylarge.train.task import DataFacts, TrainTask
from raylarge.train.tasks.controlnet import ControlnetConfig

SIDE = 32


Config = partial(Train, model="controlnet", data="", out="")


class Rows:
    """A few smooth random images, over and over; a latent is its image made small."""

    digest = "rows"
    facts = DataFacts(8, {0: 6}, (3, SIDE, SIDE), (3, 8, 8), None, {"name": "toy"})

    def batch(self, samples):
        coarse = [generator(2, "row", s % 6).uniform(-1, 1, (3, 4, 4)) for s in samples]
        image = lift(torch.from_numpy(np.stack(coarse)).float(), SIDE).clamp(-1, 1)
        cells = [generator(3, "row", s % 6).standard_normal((64, 8)) for s in samples]
        grid = torch.from_numpy(np.stack(cells)).float()
        grid[:, 1:] = 0
        one = torch.ones(len(samples), dtype=torch.int64)
        return {
            "sample": torch.tensor(list(samples)),
            "scale": one - 1,
            "grid": grid,
            "grid_rows": one,
            "grid_columns": one,
            "image": image,
            "latent": downsample(image, 4),
        }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small bundle whose U-Net predicts v: there the control tells most."""
    root, parts = small.written(tmp_path_factory.mktemp("bundle"))
    bundles.save(root, {"unet": parts["unet"]}, {}, Schedule(prediction="v_prediction"))
    return root


def made(folder, seed=0, **more):
    config = Config(out=folder, seed=seed, controlnet=ControlnetConfig(**more))
    return registry.build(config.run, Rows.facts)


def loud(task):
    """The task with a ControlNet that says something."""
    torch.manual_seed(1)
    net = task.network.controlnet
    ends = [net.controlnet_mid_block, *net.controlnet_down_blocks]
    for module in [net.controlnet_cond_embedding.conv_out, *ends]:
        torch.nn.init.normal_(module.weight, std=0.1)
    return task


def drawn(task, samples):
    return task.draw(Rows().batch(samples))


@pytest.fixture(scope="module")
def trained(folder):
    """A task after some steps on few images, its loss before, and what was frozen."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    task = made(folder)
    frozen = {name: value.clone() for name, value in weights(task).items()}
    before = loss_of(task)
    optimizer = torch.optim.Adam(task.network.parameters(), lr=3e-3)
    for step in range(100):
        loss = task.network(drawn(task, range(8 * step, 8 * step + 8))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.set_num_threads(threads)
    task.network.eval()
    return task, before, frozen


def loss_of(task, **columns):
    """The mean loss of samples that no step has seen, of images that all have."""
    batch = {**drawn(task, range(6000, 6048)), **columns}
    with torch.no_grad():
        return task.network(batch).mean().item()


def weights(task):
    """All that is frozen, by name."""
    parts = (*task.network.frozen, task.bundle.vae)
    return {
        f"{i}.{name}": value
        for i, network in enumerate(parts)
        for name, value in network.state_dict().items()
    }


def test_it_starts_as_the_plain_unet(folder):
    task = made(folder, drop=0.3)
    assert isinstance(task, TrainTask)
    batch, bundle = drawn(task, range(8)), bundles.load(folder)
    size = torch.stack([batch["grid_rows"], batch["grid_columns"]], dim=1)
    tokens = bundle.summarizer(batch["grid"], batch["scale"], size)
    dropped = batch["coin"] < 0.3
    assert 0 < dropped.sum() < 8
    tokens[dropped] = bundle.summarizer.null(int(dropped.sum()))
    x_t = bundle.schedule.noised(batch["latent"], batch["eps"], batch["t"])
    target = bundle.schedule.target(batch["latent"], batch["eps"], batch["t"])
    plain = mse_per_sample(bundle.unet(x_t, batch["t"], tokens), target)
    assert torch.allclose(task.network(batch), plain, rtol=1e-5)
    assert bundle.schedule.prediction == "v_prediction"


def test_training_lowers_the_loss_and_leaves_the_rest_alone(trained):
    task, before, frozen = trained
    assert loss_of(task) < 0.7 * before
    now = weights(task)
    assert all(torch.equal(now[name], value) for name, value in frozen.items())
    ours = {name.split(".")[0] for name, _ in task.network.named_parameters()}
    assert ours == {"controlnet"}
    assert task.averaged is task.network.controlnet


def test_it_follows_its_own_control(trained):
    task, _, _ = trained
    control = drawn(task, range(6000, 6048))["control"]
    true, other = loss_of(task), loss_of(task, control=control.roll(1, 0))
    assert other > 1.25 * true
    # The control stays where embeddings are dropped.
    null = {"coin": torch.zeros(48)}
    assert loss_of(task, **null, control=control.roll(1, 0)) > 1.25 * loss_of(task, **null)


def test_every_weight_hears_of_the_loss(folder):
    task = loud(made(folder))
    task.network(drawn(task, range(2))).mean().backward()
    parameters = dict(task.network.named_parameters())
    assert [name for name, p in parameters.items() if p.grad is None] == []
    assert sum(bool(p.grad.any()) for p in parameters.values()) > 0.95 * len(parameters)
    assert all(p.grad is None for part in task.network.frozen for p in part.parameters())


def test_activations_may_be_computed_again(folder):
    task = loud(made(folder))
    again = loud(registry.build(Config(out=folder, checkpointing=True).run, Rows.facts))
    assert again.bundle.unet.is_gradient_checkpointing
    for one in (task, again):
        one.network(drawn(one, range(2))).mean().backward()
    pairs = zip(task.network.parameters(), again.network.parameters(), strict=True)
    assert all(torch.allclose(a.grad, b.grad, atol=1e-6) for a, b in pairs)


def test_a_sample_is_by_itself(folder):
    task = loud(made(folder, factors=(2, 4)))
    far = 3 * 2**32 + 4
    both, each = drawn(task, [4, far]), [drawn(task, [sample]) for sample in (4, far)]
    for name in ("t", "eps", "coin", "control"):
        assert torch.equal(both[name], torch.cat([one[name] for one in each]))
    assert not torch.equal(*both["eps"])
    losses = task.network(both)
    assert (losses.shape, losses.dtype) == ((2,), torch.float32)
    assert torch.allclose(losses, torch.cat([task.network(one) for one in each]), rtol=1e-4)


def test_controls_are_images_of_low_resolution(folder):
    task = made(folder, factors=(2, 8))
    batch = drawn(task, range(40))
    image, factors = batch["image"], []
    for one, control in zip(image, batch["control"], strict=True):
        errors = {}
        for factor in (2, 4, 8):
            low = downsample(one[None], factor)
            errors[factor] = (lift(low.clamp(-1, 1), SIDE)[0] - control).abs().max().item()
        factors.append(min(errors, key=errors.get))
        assert errors[factors[-1]] < 1.5 / 127.5  # bytes, overshooting a little
    assert set(factors) == {2, 8}
    assert 8 < factors.count(2) < 32
    assert batch["control"].shape == image.shape


def test_a_sheet_has_low_made_and_original(trained):
    task, _, _ = trained
    batch = Rows().batch(range(6))
    page = task.sheet(batch).astype(float)
    pitch, left = 132, page.shape[1] - 6 * 132
    for i, image in enumerate(to_uint8(batch["image"]).astype(float)):
        at = slice(left + i * pitch, left + i * pitch + 128)
        low, found, original = (page[4 + row * pitch :][:128, at] for row in range(3))
        assert np.array_equal(original[::4, ::4], image)  # enlarged
        assert np.array_equal(low[::16, ::16], low[15::16, 15::16])  # 8 x 8 px
        assert np.abs(low - original).mean() < 25
        assert found.std() > 1
    assert np.array_equal(page, task.sheet(drawn(task, range(6))))


def test_the_average_is_what_a_bundle_holds(folder, tmp_path):
    root, _ = small.written(tmp_path)
    task = made(root)
    begun = {name: value.clone() for name, value in task.network.state_dict().items()}
    averaged = {name: torch.zeros_like(v) for name, v in task.averaged.state_dict().items()}
    task.finish(root, averaged, {"step": 3}, Rows().batch(range(2)))
    found = bundles.load(root)
    assert not any(p.any() for p in found.controlnet.parameters())
    known = bundles.facts(root)["controlnet"]
    again = made(root).network.state_dict()  # begins alike, whatever else the bundle holds
    assert all(torch.equal(again[name], value) for name, value in begun.items())
    assert known["step"] == 3


def test_latents_meet_their_images_however_flipped(small_examples, tiny_bundle, tmp_path):
    root = shutil.copytree(small_examples, tmp_path / "data").as_posix()
    encode.run(root, tiny_bundle, EncodeConfig(flips=True), ExecutorConfig())
    out = shutil.copytree(tiny_bundle, tmp_path / "bundle").as_posix()
    shape = {"channels": 32, "width": 64, "layers": 1, "heads": 4, "scales": 4}
    bundles.save(out, {"summarizer": Summarizer(**shape)}, {})
    config = Config(data=root, out=out, batch=4)
    rows = registry.source(config.run)
    batch = rows.batch(range(32))
    found = bundles.load_autoencoder(out).encode(batch["image"])
    assert torch.allclose(found, batch["latent"], atol=5e-3)
    turned = bundles.load_autoencoder(out).encode(batch["image"].flip(3))
    assert not torch.allclose(turned, batch["latent"], atol=5e-2)
    task = registry.build(config.run, rows.facts)
    loss = task.network(task.draw(rows.batch(range(4))))
    assert loss.isfinite().all()
    assert task.sheet(registry.source(config.run, "val").batch(range(2))).shape[2] == 3


def test_what_does_not_fit_is_refused_with_the_cure(folder, tmp_path):
    for factors in ((), (3,), (4, 1), (64,)):
        with pytest.raises(UserError, match=r"patches of 32 px take one or more of 2, 4, 8, 16"):
            made(folder, factors=factors)
    with pytest.raises(UserError, match=r"controlnet\.drop=-1\.0: it must be 0 to 1"):
        made(folder, drop=-1.0)
    bundles.save(str(tmp_path), {"vae": small.networks()["light"]}, {"patch_px": SIDE})
    with pytest.raises(UserError, match=r"lacks unet, summarizer; train it with .*model=ldm"):
        made(str(tmp_path))
