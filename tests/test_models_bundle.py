"""A bundle: saved and loaded anywhere, whole or with what it lacks named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bundles import WEIGHTS, networks, other, small_unet, written
from diffusers import DDIMScheduler, UNet2DConditionModel, VQModel

from raylarge import storage
from raylarge.diffusion.schedule import Schedule
from raylarge.errors import UserError
from raylarge.models import autoencoder, bundle, bundle_parts, controlnet
from raylarge.models.conditioner import Conditioner
from raylarge.models.prior import GridPrior
from raylarge.models.summarizer import ConvSummarizer
from raylarge.sampling.bundle_facts import BundleFacts

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", ["light", "vq", "kl", "tiny"])
def test_every_autoencoder_comes_back_and_means_the_same(tmp_path, kind):
    folder, parts = written(tmp_path / "b", kind)
    loaded, image = bundle.load(folder), torch.rand(2, 3, 32, 32) * 2 - 1
    given = autoencoder.Autoencoder(parts["vae"].eval())
    latent = loaded.vae.encode(image)
    assert latent.shape == (2, *loaded.patch.latent) == (2, 3, 8, 8)
    assert torch.equal(latent, given.encode(image))
    assert torch.equal(loaded.vae.decode(latent), given.decode(latent))
    assert loaded.patch == bundle.patch_of(folder) == BundleFacts.read(folder).patch
    assert BundleFacts.of(loaded) == BundleFacts.read(folder)
    assert bundle.load_autoencoder(folder).digest == bundle.digest(folder, ("vae",))


def test_the_scale_of_a_kl_latent_is_that_of_its_config():
    network = networks()["kl"].eval()
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    mean = network.encode(image).latent_dist.mean
    assert torch.allclose(autoencoder.Autoencoder(network).encode(image), 0.2 * mean)
    with pytest.raises(TypeError, match="no codebook"):
        autoencoder.Autoencoder(network).quantise(mean)
    with pytest.raises(TypeError, match=r"Linear is not one of LightAutoencoder, VQModel"):
        autoencoder.Autoencoder(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("kind", ["vit", "cnn", "vector"])
def test_every_conditioner_comes_back_and_has_a_null(tmp_path, kind):
    folder, parts = written(tmp_path / "b", conditioner=kind)
    loaded, given = bundle.load(folder).summarizer, parts["summarizer"].eval()
    assert isinstance(loaded, Conditioner)
    for shape in ((1, 1), (3, 5), (8, 8), (16, 32)):
        grid, scale = torch.randn(2, 8, *shape), torch.tensor([0, 2])
        tokens = loaded(grid, scale)
        assert torch.allclose(tokens, given(grid, scale), atol=1e-5)  # fused where frozen
        assert loaded.null(2).shape == tokens.shape
    with pytest.raises(UserError, match="have 7 channels, the bundle's Summarizer takes 8"):
        loaded(torch.randn(1, 7, 2, 2), torch.tensor([0]))
    with pytest.raises(UserError, match=r"a grid of \(0, 2\) embeddings is empty"):
        loaded(torch.randn(1, 8, 0, 2), torch.tensor([0]))
    with pytest.raises(UserError, match=r"cells \[B, 64, C\] with their sizes"):
        loaded(torch.randn(1, 64, 8), torch.tensor([0]))


def test_a_convolutional_summarizer_sees_rows_and_columns():
    torch.manual_seed(0)
    summarizer = ConvSummarizer(4, 8, 2).eval()
    grid, scale = torch.randn(1, 4, 2, 4), torch.tensor([1])
    tokens = summarizer(grid, scale)
    assert tokens.shape == (1, 65, 8)
    spread = grid.repeat_interleave(4, dim=2).repeat_interleave(2, dim=3)
    assert torch.allclose(tokens, summarizer(spread, scale), atol=1e-5)
    assert not torch.allclose(tokens, summarizer(grid.mT, scale), atol=1e-2)


def test_diffusers_loads_the_parts_it_knows(tmp_path):
    folder, parts = written(tmp_path / "b", "vq")
    known = {"unet": UNet2DConditionModel, "vae": VQModel}
    for name, kind in known.items():
        part = kind.from_pretrained(f"{folder}/{name}", low_cpu_mem_usage=False)
        wanted = parts[name].state_dict()
        assert all(torch.equal(part.state_dict()[key], wanted[key]) for key in wanted)
    scheduler = DDIMScheduler.from_pretrained(f"{folder}/scheduler")
    assert scheduler.config.beta_schedule == "scaled_linear"
    index = json.loads(Path(folder, "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert not list(Path(folder).rglob("*.bin"))


def test_optional_parts_travel_too(tmp_path):
    steer = controlnet.build(small_unet(), 4)
    prior = GridPrior(8, 5, width=16, blocks=1)
    folder, _ = written(tmp_path / "b", controlnet=steer, prior=prior)
    loaded = bundle.load(folder)
    assert torch.equal(loaded.prior.shift, prior.shift)
    assert loaded.controlnet.config.conditioning_channels == 3
    assert loaded.cdm is None


def test_half_precision_is_channels_last_but_not_for_tiny_autoencoders(tmp_path):
    loaded = bundle.load(written(tmp_path / "b", "tiny")[0], dtype=torch.bfloat16)
    assert loaded.unet.conv_in.weight.dtype == torch.bfloat16
    assert loaded.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert loaded.vae.network.dtype == torch.float32


@pytest.mark.s3
def test_a_bundle_lives_in_s3(tmp_path, s3_bucket):
    folder, _ = written(tmp_path / "b")
    there = f"{s3_bucket}/bundles/one"
    written(there)
    assert bundle.digest(there) == bundle.digest(folder)
    here, far = bundle.load(folder), bundle.load(there)
    x_t, tokens = torch.randn(1, 3, 8, 8), torch.randn(1, 65, 16)
    assert torch.equal(here.denoiser()(x_t, 7, tokens), far.denoiser()(x_t, 7, tokens))
    bundle.save(there, {"vae": networks()["vq"]}, {"note": 1})
    assert isinstance(bundle.load(there).vae.network, VQModel)
    assert bundle.facts(there)["note"] == 1
    with pytest.raises(UserError, match="no bundle at s3://"):
        bundle.load(f"{s3_bucket}/bundles/none")


@pytest.mark.s3
def test_weights_in_several_files_are_replaced_in_s3_by_one(s3_bucket):
    there = f"{s3_bucket}/bundles/several"
    given = written(there)[1]
    part, listed = f"{there}/unet", {"weight_map": {"conv_in.bias": "a.safetensors"}}
    storage.write_bytes(f"{part}/a.safetensors", storage.read_bytes(f"{part}/{WEIGHTS}"))
    storage.write_json(f"{part}/{WEIGHTS}.index.json", listed)
    changed_unet = other(given["unet"])
    bundle.save(there, {"unet": changed_unet}, {})
    found = bundle.load(there).unet.conv_in.bias
    assert torch.equal(found, changed_unet.conv_in.bias)
    assert set(storage.sizes(part)) == {"config.json", WEIGHTS}


def test_what_cannot_be_saved_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(UserError, match="has no part tokenizer, unets; its parts: vae, vae_small"):
        bundle.save(f"{tmp_path}/b", {"unets": small_unet(), "tokenizer": small_unet()}, {})
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    for path in ("file", "file/b"):
        with pytest.raises(UserError, match=f"{path} cannot be a bundle: it is a file"):
            bundle.save(f"{tmp_path}/{path}", {"vae": networks()["light"]}, {})


def test_a_kill_between_parts_leaves_nothing_that_does_not_belong_together(tmp_path, monkeypatch):
    folder, given = written(tmp_path / "b")
    before = bundle.facts(folder)
    new = {name: other(given[name]) for name in ("unet", "summarizer")}
    put = storage.put_folder

    def killed(made, target):
        if target.endswith("summarizer"):
            raise KeyboardInterrupt
        put(made, target)

    monkeypatch.setattr(storage, "put_folder", killed)
    with pytest.raises(KeyboardInterrupt):
        bundle.save(folder, new, {"note": 1})
    monkeypatch.undo()
    index, known = bundle_parts.read_index(folder), bundle.facts(folder)
    assert {"vae", "unet", "scheduler"} == set(index) - {"raylarge"} == set(known["digests"])
    assert known["digests"]["unet"] != before["digests"]["unet"]
    assert known["digests"]["unet"] == bundle_parts.computed_digest(f"{folder}/unet")
    with pytest.raises(UserError, match="lacks summarizer"):
        bundle.load(folder)
    bundle.save(folder, {"summarizer": new["summarizer"]}, {})
    loaded = bundle.load(folder)
    assert torch.equal(loaded.summarizer.pad_token, new["summarizer"].pad_token)
    assert bundle.facts(folder)["patch_px"] == 32


KILLED = """
import os, signal, sys
from diffusers import AutoencoderTiny
from raylarge import storage
from raylarge.models import bundle
storage.put_folder = lambda made, target: os.kill(os.getpid(), signal.SIGKILL)
narrow = {"encoder_block_out_channels": (8,), "decoder_block_out_channels": (8,)}
made = AutoencoderTiny(**narrow, num_encoder_blocks=(1,), num_decoder_blocks=(1,))
bundle.save(sys.argv[1], {"vae": made}, {})
"""


def test_what_a_killed_run_left_is_removed(tmp_path):
    folder, given = written(tmp_path / "b")
    names = {path.name for path in Path(folder).iterdir()}
    done = subprocess.run([sys.executable, "-c", KILLED, folder], capture_output=True)
    assert done.returncode == -9
    lock, left = sorted({path.name for path in Path(folder).iterdir()} - names, reverse=True)
    assert (lock, left.startswith(".part-")) == (".saving", True)
    with pytest.raises(UserError, match="lacks vae"):
        bundle.load(folder)
    bundle.save(folder, {"vae": given["vae"]}, {})
    assert {path.name for path in Path(folder).iterdir()} == names
    assert bundle.load(folder)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_whoever_may_read_the_folder_may_read_the_weights(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        folder, _ = written(tmp_path / "b")
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in Path(folder, "unet").iterdir()}
    assert modes == {mode}


def test_every_schedule_comes_back_and_diffusers_knows_it(tmp_path):
    folder, given = written(tmp_path / "b")
    for name in ("squaredcos", "linear", "scaled_linear"):
        bundle.save(folder, {"unet": given["unet"]}, {}, Schedule(name, prediction="sample"))
        made = bundle.load(folder).schedule
        assert made == Schedule(name, prediction="sample")
        known = DDIMScheduler.from_pretrained(f"{folder}/scheduler").alphas_cumprod
        assert torch.allclose(known, made.abar.float(), rtol=1e-3, atol=1e-8)
