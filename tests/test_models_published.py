"""Published parity: imported checkpoints compute what the published code computed."""

import argparse

import pytest
import torch
from published import figures, filled, kl_of, state

from raylarge.diffusion.loss import learned_variance_losses
from raylarge.errors import UserError
from raylarge.models import published, weights
from raylarge.models.unet import UNet

pytestmark = pytest.mark.usefixtures("one_thread")
NETWORK = 2e-5


def largest(found, wanted):
    return float((found.double() - wanted.double()).abs().max())


def dotless(name):
    return "model_ema.diffusion_model" + name.replace(".", "")


def loads(tmp_path, content):
    path = str(tmp_path / "weights.ckpt")
    torch.save(content, path)
    return weights.open_checkpoint(path)


@pytest.fixture(scope="module")
def tensors(parity):
    return {k: state(parity, k) for k in ("unet_a", "unet_b", "vq", "summarizer", "dit")}


@pytest.mark.parametrize("file", ["unet_a", "unet_b"])
def test_the_unet_and_its_features_are_the_published_ones(parity, tensors, file):
    wanted, unet = figures(parity, file), published.unet_from_published(tensors[file])
    assert largest(unet(wanted["x"], wanted["t"], wanted["c"]), wanted["y"]) <= NETWORK
    output, features = unet.features(wanted["x"], wanted["t"], wanted["c"])
    assert largest(output, wanted["y"]) <= NETWORK
    assert len(features) == sum(name.startswith("inter") for name in wanted)
    for i, feature in enumerate(features):
        assert largest(feature.mean(dim=(2, 3)), wanted[f"inter{i}_mean"]) <= NETWORK
    assert not any(module._forward_hooks for module in unet.modules())


def test_the_vq_autoencoder_is_the_published_one(parity, tensors):
    wanted, vae = figures(parity, "vq"), published.vq_from_published(tensors["vq"])
    latent = vae.encode(wanted["im"])
    assert largest(latent, wanted["z"]) <= NETWORK
    codes, index = vae.quantise(wanted["z"])
    assert largest(codes, wanted["q"]) <= 1e-6
    assert torch.equal(index.flatten(), wanted["idx"])
    assert largest(vae.decode(wanted["z"]), wanted["dec"]) <= NETWORK
    plain = vae.network.decode(wanted["z"], force_not_quantize=True).sample
    assert largest(plain, wanted["dec_noquant"]) <= NETWORK
    assert largest(vae.network.quantize(wanted["z"])[1], wanted["loss"]) <= 1e-6
    assert (vae.factor, vae.channels) == (4, 3)


def test_a_kl_autoencoder_of_the_same_family(parity, tensors):
    wanted = figures(parity, "vq")
    named = kl_of(tensors["vq"])
    whole = {f"first_stage_model.{k}": v for k, v in named.items()} | {
        "scale_factor": torch.tensor(0.5)
    }
    vae = published.autoencoder_from_published(whole)
    assert largest(vae.decode(0.5 * wanted["z"]), wanted["dec_noquant"]) <= NETWORK
    mean = vae.network.encode(wanted["im"]).latent_dist.mean
    assert torch.equal(vae.encode(wanted["im"]), 0.5 * mean)
    with pytest.raises(UserError, match="it is a VQ, not a KL one"):
        published.kl_from_published(tensors["vq"])


@pytest.mark.parametrize("side", [1, 2, 4, 8])
def test_the_summarizer_is_the_published_one(parity, tensors, side):
    wanted = figures(parity, "summarizer")
    summarizer = published.summarizer_from_published(tensors["summarizer"], heads=4)
    tokens = summarizer(wanted[f"x{side}"], torch.tensor([0, 3]))
    assert largest(tokens, wanted[f"y{side}"]) <= NETWORK


def test_the_cdm_is_the_published_one(parity, tensors):
    wanted = figures(parity, "dit")
    cdm = published.cdm_from_published(tensors["dit"], heads=4)
    x, t, y = (wanted[name] for name in ("x", "t", "y"))
    assert largest(cdm(x, t, y), wanted["out"]) <= NETWORK
    assert largest(cdm.schedule.betas, wanted["betas"]) <= 1e-12
    x_t = cdm.schedule.noised(x, wanted["noise"], t)
    error, bound = learned_variance_losses(cdm(x_t, t, y), x, x_t, t, cdm.schedule)
    assert largest(error / wanted["mse"], torch.ones(2)) <= NETWORK
    assert largest(bound / wanted["vb"], torch.ones(2)) <= NETWORK
    assert largest((error + bound) / wanted["loss"], torch.ones(2)) <= NETWORK


def test_the_cdm_draws_the_published_tokens(parity, tensors):
    wanted = figures(parity, "dit")
    cdm = published.cdm_from_published(tensors["dit"], heads=4)
    steps = cdm.schedule.respaced(20)
    assert [step.t for step in steps[::-1]] == wanted["tmap20"].tolist()
    for i, scale in enumerate(wanted["y"].tolist()):
        drawn = cdm.denoise(wanted["z"][i : i + 1], steps, scale)
        assert largest(drawn, wanted["ddim20"][i : i + 1]) <= NETWORK


def test_token_positions_are_the_published_table(parity):
    cdm = published.CDM(channels=2, width=768, depth=0, heads=1)
    assert largest(cdm.pos_embed[0], figures(parity, "dit")["posembed_768_65"]) <= 1e-6


def wrapped(how, plain):
    """The U-Net's tensors as different checkpoints hold them, decoys beside the EMA."""
    raw = {f"model.diffusion_model.{k}": v for k, v in plain.items()}
    ema = {dotless(k): v for k, v in plain.items()}
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    return {
        "bare": plain,
        "prefixed": raw,
        "nested": {"state_dict": raw, "epoch": 3},
        "ema alone": ema | counters,
        "ema beside raw": {k: v + 1 for k, v in raw.items()} | ema | counters,
        "with the rest": raw | {"first_stage_model.x": torch.zeros(1), "betas": torch.ones(2)},
    }[how]


@pytest.mark.parametrize(
    "how", ["bare", "prefixed", "nested", "ema alone", "ema beside raw", "with the rest"]
)
def test_every_wrapping_gives_the_same_unet(tensors, tmp_path, how):
    wanted = published.unet_from_published(tensors["unet_a"]).state_dict()
    found = published.unet_from_published(loads(tmp_path, wrapped(how, tensors["unet_a"])))
    assert isinstance(found, UNet)
    assert all(torch.equal(found.state_dict()[name], wanted[name]) for name in wanted)


def test_raw_weights_can_be_had_beside_an_ema(tensors):
    raw = published.unet_from_published(wrapped("ema beside raw", tensors["unet_a"]), ema=False)
    assert torch.equal(raw.conv_in.bias, tensors["unet_a"]["input_blocks.0.0.bias"] + 1)


def test_the_cdms_training_file_gives_its_average(tensors, tmp_path):
    average, raw = tensors["dit"], {k: v + 1 for k, v in tensors["dit"].items()}
    args = argparse.Namespace(lr=1e-4)
    content = loads(tmp_path, {"model": raw, "ema": average, "opt": {}, "args": args})
    cdm = published.cdm_from_published(content, heads=4)
    assert torch.equal(cdm.x_embedder.bias, average["x_embedder.bias"])


def test_the_two_token_embedder_and_its_null():
    shapes = {"patch_fc": (512, 384), "region_fc": (512, 768)}
    named = {
        f"cond_stage_model.{k}.{kind}": filled(f"{k}.{kind}", s if kind == "weight" else s[:1])
        for k, s in shapes.items()
        for kind in ("weight", "bias")
    }
    embedder = published.embedder_from_published(named)
    assert sum(p.numel() for p in embedder.parameters()) == 590_848
    grid = torch.randn(2, 384, 1, 1)
    tokens = embedder(grid, torch.zeros(2, dtype=torch.long))
    unit = grid[:, :, 0, 0] / grid[:, :, 0, 0].norm(dim=1, keepdim=True)
    assert largest(tokens[:, 0], embedder.patch_fc(unit)) <= 1e-6
    assert torch.equal(tokens[:, 1], embedder.region_fc.bias.expand(2, -1))
    biases = torch.stack([embedder.patch_fc.bias, embedder.region_fc.bias])
    assert torch.equal(embedder.null(1)[0], biases)
