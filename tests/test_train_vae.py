"""Autoencoders of all kinds learn, each sample by itself; one optimiser does for both networks."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import test_models_perceptual
import torch
import toy
from waves import FACTS, JUDGE, JUDGED, SIDE, SMALL, Config, gradients, learn, made, rows

from raylarge.errors import UserError
from raylarge.models import bundle as bundles
from raylarge.models.discriminator import DiscriminatorConfig, hinge_loss
from raylarge.models.perceptual import FeatureDistance, Perceptual
from raylarge.train import registry
from raylarge.train.activations import recompute
from raylarge.train.task import TrainTask
from raylarge.train.tasks.vae import VaeConfig

KINDS = pytest.mark.parametrize("kind", list(SMALL))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    path = tmp_path_factory.mktemp("vgg") / "vgg.pth"
    torch.save(test_models_perceptual.vgg(), path)
    return str(path)


@KINDS
def test_it_learns_and_goes_into_the_bundle(kind, tmp_path):
    task = made(SMALL[kind])
    assert isinstance(task, TrainTask)
    assert task.averaged is None
    before, after = learn(task, 60 if kind == "light" else 12, 1e-2)
    assert after < 0.8 * before
    batch = rows(range(16))
    task.finish(str(tmp_path), None, {"steps": 12}, batch)
    found = bundles.load_autoencoder(str(tmp_path))
    sizes = {"light": (4, 3), "vq": (2, 3), "kl": (2, 4)}
    assert (found.factor, found.channels) == sizes[kind]
    assert bundles.facts(str(tmp_path))["patch_px"] == SIDE
    assert bundles.facts(str(tmp_path))["vae"] == {"steps": 12}
    with torch.no_grad():
        latent = found.encode(batch["image"])
    if kind == "light":
        torch.testing.assert_close(latent.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
        torch.testing.assert_close(latent.std(dim=(0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)
    if kind == "kl":
        assert float(latent.std()) == pytest.approx(1, abs=1e-4)
        assert found.network.config.scaling_factor != pytest.approx(1, abs=1e-3)


def test_the_light_ones_loss_is_l1_with_first_differences():
    task, batch = made(replace(SMALL["light"], gradient=0.3)), rows(range(2))
    error = task.network.codec.network(batch["image"]) - batch["image"]
    below, beside = error[:, :, 1:] - error[:, :, :-1], error[..., 1:] - error[..., :-1]
    wanted = [
        (e.abs().mean() + 0.3 * (b.abs().mean() + s.abs().mean())).item()
        for e, b, s in zip(error, below, beside, strict=True)
    ]
    assert task.network(batch).tolist() == pytest.approx(wanted, abs=1e-6)


def test_the_vq_loss_moves_codes_to_latents_and_latents_to_codes():
    base = replace(SMALL["vq"], gradient=0.0)
    batch = rows(range(2))
    grads = {}
    for beta in (0.0, 0.25, 0.5):
        task = made(replace(base, commitment=beta))
        grads[beta] = gradients(task, batch)[1]
    codes = "codec.network.quantize.embedding.weight"
    codec = task.network.codec
    z = codec.encode(batch["image"])
    index = codec.quantise(z)[1]
    e = codec.network.quantize.embedding.weight
    ours = torch.autograd.grad(2 * (e[index].movedim(-1, 1) - z.detach()).square().mean(), e)[0]
    assert all(torch.allclose(found[codes], ours, atol=1e-7) for found in grads.values())
    name = "codec.network.quant_conv.weight"
    step = grads[0.25][name] - grads[0.0][name]
    torch.testing.assert_close(grads[0.5][name] - grads[0.0][name], 2 * step, atol=1e-6, rtol=1e-3)
    assert step.abs().max() > 1e-4


def test_the_posteriors_noise_and_divergence_count():
    task = made(replace(SMALL["kl"], kl_weight=0.0))
    batch = task.draw(rows(range(2)))
    assert batch["noise"].shape == (2, 4, SIDE // 2, SIDE // 2)
    plain = task.network(batch)
    assert (task.network({**batch, "noise": -batch["noise"]}) != plain).all()
    weighed = made(replace(SMALL["kl"], kl_weight=1e-3))
    kl = task.network.codec.network.encode(batch["image"]).latent_dist.kl()
    added = weighed.network(batch) - plain
    torch.testing.assert_close(added, 1e-3 * kl / (3 * SIDE**2), atol=1e-6, rtol=1e-3)


@KINDS
def test_a_sample_is_its_own(kind, backbone):
    config = replace(
        SMALL[kind],
        features=0.3,
        lpips=0.5,
        lpips_backbone=backbone,
        adversarial=0.1,
        discriminator=JUDGE,
    )
    task = made(config)
    together = task.draw(rows([5, 2**40]))
    alone = [task.draw(rows([sample])) for sample in (5, 2**40)]
    for name, value in together.items():
        assert torch.equal(torch.cat([one[name] for one in alone]), value)
    losses, grads = gradients(task, together)
    parts = [gradients(task, one) for one in alone]
    torch.testing.assert_close(losses, torch.cat([loss for loss, _ in parts]), atol=1e-6, rtol=0)
    for name, value in grads.items():
        total = parts[0][1][name] + parts[1][1][name]
        torch.testing.assert_close(
            total, value, atol=2e-6 + 1e-3 * float(value.abs().max()), rtol=0
        )


def test_lpips_counts_and_is_no_part_of_what_is_trained(backbone):
    plain = made(SMALL["light"])
    task = made(replace(SMALL["light"], lpips=0.5, lpips_backbone=backbone))
    assert task.network.state_dict().keys() == plain.network.state_dict().keys()
    batch = rows(range(2))
    distance = Perceptual(backbone)(task.network.codec.network(batch["image"]), batch["image"])
    task.network.train()
    torch.testing.assert_close(task.network(batch), plain.network(batch) + 0.5 * distance)


def test_features_count_and_are_no_part_of_what_is_trained():
    plain, task = made(SMALL["light"]), made(replace(SMALL["light"], features=0.5))
    assert task.network.state_dict().keys() == plain.network.state_dict().keys()
    batch = rows(range(2))
    distance = FeatureDistance()(task.network.codec.network(batch["image"]), batch["image"])
    task.network.train()
    torch.testing.assert_close(task.network(batch), plain.network(batch) + 0.5 * distance)


def test_the_adversarial_terms_begin_when_told_and_change_no_value():
    plain, task = made(SMALL["light"], batch=4), made(replace(JUDGED, adversarial_from=3), batch=4)
    images = rows(range(4))["image"]
    for first in (8, 12):  # steps 2 and 3
        batch = {"sample": torch.arange(first, first + 4), "image": images}
        loss, grads = gradients(task, task.draw(batch))
        wanted, others = gradients(plain, plain.draw(batch))
        assert torch.equal(loss, wanted)
        judge = [value for name, value in grads.items() if name.startswith("judge.")]
        same = [torch.allclose(grads[name], value, atol=1e-7) for name, value in others.items()]
        assert len(judge) == 10
        if first == 8:
            assert all(value.abs().max() == 0 for value in judge)
            assert all(same)
        else:
            assert any(value.abs().max() > 0 for value in judge)
            assert not all(same)


def test_one_optimiser_does_for_both_networks():
    task = made(replace(JUDGED, adversarial=1e-3))
    before, after = learn(task, 40, 1e-2)
    assert after < 0.8 * before
    image = rows(range(16))["image"]
    with torch.no_grad():
        blurred = task.network.codec.network(image)
        assert hinge_loss(task.network.judge(image), task.network.judge(blurred)).mean() < 0.9


@pytest.mark.parametrize("start", [0, 100])
def test_ddp_finds_every_gradient(start, tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        task = made(replace(JUDGED, adversarial_from=start))
        wanted = gradients(task, task.draw(rows(range(2))))[1]
        model = torch.nn.parallel.DistributedDataParallel(task.network)
        for _ in range(2):  # the second pass would tell of parameters without a gradient
            task.network.zero_grad()
            model(task.draw(rows(range(2)))).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    for name, parameter in task.network.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-6, rtol=1e-4)


def test_flips_are_a_function_of_seed_and_sample():
    samples = [0, 1, 2, 3, 2**33 + 1]
    batch = rows(samples)
    task = made(SMALL["light"])
    drawn = task.draw(batch)
    assert torch.equal(drawn["image"], task.draw(batch)["image"])
    found = []
    for image, flipped in zip(batch["image"], drawn["image"], strict=True):
        ways = {(): image, (1,): image.flip(1), (2,): image.flip(2), (1, 2): image.flip(1, 2)}
        found += [way for way, other in ways.items() if torch.equal(flipped, other)]
    assert len(found) == len(samples)
    assert len(set(found)) > 1
    other = made(SMALL["light"], seed=1).draw(batch)["image"]
    assert not torch.equal(other, drawn["image"])
    assert torch.equal(batch["image"], rows(samples)["image"])


def test_the_average_is_what_is_written(tmp_path):
    task = made(replace(SMALL["light"], average=True))
    halved = {name: value / 2 for name, value in task.averaged.state_dict().items()}
    task.finish(str(tmp_path), halved, {}, rows(range(4)))
    found = bundles.load_autoencoder(str(tmp_path)).network.encoder[1].weight
    assert torch.equal(found, halved["network.encoder.1.weight"])


@KINDS
def test_half_precision_and_computing_again(kind):
    task, again = made(SMALL[kind]), made(SMALL[kind])
    recompute(again.network)
    batch = task.draw(rows(range(2)))
    calls: list[int] = []
    middle = getattr(again.network.codec.network.encoder, "mid_block", None)
    if middle is not None:  # a light one has nothing worth computing again
        middle.register_forward_pre_hook(lambda *_: calls.append(1))
    plain, other = gradients(task, batch), gradients(again, batch)
    torch.testing.assert_close(other, plain)
    assert len(calls) == (0 if kind == "light" else 2)
    with torch.autocast("cpu", torch.bfloat16):
        half, _ = gradients(task, batch)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, plain[0], atol=0.02, rtol=0.02)


def test_the_sheet_shows_what_becomes_of_images():
    task = made(SMALL["light"])
    page = task.sheet(rows(range(10)))
    assert page.dtype == np.uint8
    assert page.shape[1] > 8 * 128
    assert 2 * 128 < page.shape[0] < 3 * 128
    cell = page[-100:-40, -100:-40]
    learn(task, 3)
    assert not np.array_equal(task.sheet(rows(range(10)))[-100:-40, -100:-40], cell)


@pytest.fixture
def taught(tiny_bundle, tmp_path):
    """A bundle of its own, whose autoencoder has latents worth learning."""
    folder = str(tmp_path / "bundle")
    shutil.copytree(tiny_bundle, folder)
    teacher = bundles.load_autoencoder(folder).network
    teacher.standardise(rows(range(16))["image"])
    bundles.save(folder, {"vae": teacher}, {})
    return folder


def test_a_small_one_learns_the_latents_of_another(taught):
    teacher = bundles.load_autoencoder(taught)
    config = Config(out=taught, vae=VaeConfig(distill=True, width=16, blocks=1))
    task = registry.build(config.run, FACTS)
    image = rows(range(500, 508))["image"]

    def errors(codec):
        with torch.no_grad():
            z = teacher.encode(image)
            pixels = codec.decode(z) - teacher.decode(z)
            return (codec.encode(image) - z).square().mean(), pixels.abs().mean()

    before = errors(task.network.codec)
    first, last = learn(task, 40)
    assert last < 0.7 * first
    assert task.sheet(rows(range(3))).shape[0] > 3 * 128
    task.finish(taught, None, {"steps": 40}, rows(range(4)))
    loaded = bundles.load(taught)
    after = errors(loaded.vae_small)
    assert (loaded.vae_small.factor, loaded.vae_small.channels) == (4, 3)
    assert after[0] < 0.6 * before[0]
    assert after[1] < 0.8 * before[1]
    assert bundles.load_autoencoder(taught).digest == teacher.digest
    assert bundles.facts(taught)["vae_small"] == {"steps": 40}


def test_a_student_takes_its_teachers_sizes_and_holds_none_of_its_weights(tmp_path):
    torch.manual_seed(1)
    teacher = made(SMALL["kl"])
    teacher.finish(str(tmp_path), None, {}, rows(range(4)))
    task = made(VaeConfig(distill=True, width=16, blocks=1), out=str(tmp_path))
    assert (task.network.codec.factor, task.network.codec.channels) == (2, 4)
    held = {f"codec.{name}" for name in task.network.codec.state_dict()}
    assert task.network.state_dict().keys() == held
    assert task.network(task.draw(rows(range(2)))).shape == (2,)


def test_images_come_from_the_examples(tmp_path):
    toy.write_examples(tmp_path)
    config = Config(data=str(tmp_path), vae=SMALL["light"])
    source = registry.source(config.run)
    batch = source.batch([0, 1, 2])
    assert source.facts.image == (3, 8, 8)
    loss = registry.build(config.run, source.facts).network(
        registry.build(config.run, source.facts).draw(batch)
    )
    assert loss.shape == (3,)
    assert loss.isfinite().all()


def test_the_published_one_has_its_size():
    with torch.device("meta"):
        task = registry.build(
            Config(vae=VaeConfig(kind="vq")).run, replace(FACTS, image=(3, 256, 256))
        )
    assert sum(p.numel() for p in task.network.parameters()) == 55_322_782


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "gan"}, "vae.kind 'gan' is none of light, vq, kl"),
        ({"kind": "vq", "factor": 8}, r"vae.factor=4, not 8"),
        ({"kind": "kl", "channels": (32, 48, 64)}, "32 must divide each"),
        ({"factor": 3}, "images of 16 px cannot be coded by factor 3"),
        ({"factor": 0}, "vae.factor is 0; give 1 or more"),
        ({"lpips": -1.0}, "vae.lpips is -1.0; give 0 or more"),
        ({"lpips": 1.0, "lpips_backbone": "nowhere.pth"}, "no weights at nowhere.pth"),
        ({"adversarial": 1.0, "discriminator": DiscriminatorConfig(16, 4)}, "cannot judge"),
        ({"distill": True, "kind": "kl"}, "learns from its teacher alone"),
        ({"distill": True}, "there is no bundle at"),
    ],
)
def test_what_cannot_be_is_refused(change, message, tmp_path):
    with pytest.raises(UserError, match=message):
        made(VaeConfig(**change), out=str(tmp_path))


def test_a_sharded_discriminator_is_refused():
    with pytest.raises(UserError, match=r"zero=3 shards.*give zero=2 or less"):
        made(JUDGED, workers=2, zero=3)
    assert made(JUDGED, workers=2, zero=3, strategy="torch").network.judge is not None
