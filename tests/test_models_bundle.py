"""A bundle: saved and loaded anywhere, whole or with its fault named, old formats too."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel, VQModel
from hub import Hub, redirect
from safetensors.torch import load_file, save_file

from raylarge.errors import UserError
from raylarge.fleet.facts import Facts
from raylarge.models import autoencoder, bundle, controlnet, unet
from raylarge.models.cells import Conditioner
from raylarge.models.embedder import VectorEmbedder
from raylarge.models.light import LightAutoencoder
from raylarge.models.prior import GridPrior
from raylarge.models.summarizer import ConvSummarizer, Summarizer

pytestmark = pytest.mark.usefixtures("one_thread")
OLD = Path(__file__).parent / "data" / "bundle_v1"


def networks():
    """One of each kind that can be the autoencoder."""
    torch.manual_seed(0)
    narrow = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
    return {
        "light": LightAutoencoder(width=8, blocks=1),
        "vq": autoencoder.vq((32, 32, 32), 1, (16, 3)),
        "kl": autoencoder.kl((32, 32, 32), 1, 3, 0.2),
        "tiny": AutoencoderTiny(
            **narrow, latent_channels=3, num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1)
        ),
    }


def conditioners():
    """One of each kind that can be the Summarizer, for 8-channel embeddings."""
    return {
        "vit": Summarizer(8, 16, 1, 2, 3),
        "cnn": ConvSummarizer(8, 16, 3),
        "vector": VectorEmbedder(8, 6, 16, 3),
    }


def small_unet():
    config = unet.UNetConfig((8, 16), (False, True), layers=1, heads=2, groups=4)
    return unet.build(config, (3, 8, 8), context=16)


def written(folder, vae="light", conditioner="vit", **more):
    parts = {"vae": networks()[vae], "unet": small_unet()}
    parts |= {"summarizer": conditioners()[conditioner]} | more
    bundle.save(str(folder), parts, {"patch_px": 32})
    return str(folder), parts


@pytest.mark.parametrize("kind", ["light", "vq", "kl", "tiny"])
def test_every_autoencoder_comes_back_and_means_the_same(tmp_path, kind):
    folder, parts = written(tmp_path / "b", kind)
    loaded, image = bundle.load(folder), torch.rand(2, 3, 32, 32) * 2 - 1
    given = autoencoder.Autoencoder(parts["vae"].eval())
    latent = loaded.vae.encode(image)
    assert latent.shape == (2, *loaded.patch.latent) == (2, 3, 8, 8)
    assert torch.equal(latent, given.encode(image))
    assert torch.equal(loaded.vae.decode(latent), given.decode(latent))
    assert loaded.patch == bundle.patch_of(folder) == Facts.read(folder).patch
    assert Facts.of(loaded) == Facts.read(folder)
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


def test_a_bundle_comes_from_the_hub(tmp_path, monkeypatch):
    folder, _ = written(tmp_path / "b")
    server = Hub()
    try:
        server.files["owner/bundle"] = {
            str(path.relative_to(folder)): path.read_bytes()
            for path in Path(folder).rglob("*")
            if path.is_file()
        }
        redirect(monkeypatch, server.url, tmp_path / "cache")
        loaded = bundle.load("owner/bundle")
        assert loaded.digest == bundle.digest(folder)
        with pytest.raises(UserError, match=r"owner/other .*no such folder either: copy"):
            bundle.load("owner/other")
    finally:
        server.close()
    assert bundle.load("owner/bundle").digest == loaded.digest  # from the cache, hub gone


def test_no_hub_and_no_folder_is_told_at_once(tmp_path, monkeypatch):
    redirect(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    with pytest.raises(UserError, match=r"could not be had.*no such folder either: copy"):
        bundle.load("owner/bundle")


def changed(folder, part, change):
    path = Path(folder, part, "diffusion_pytorch_model.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tensors: tensors.pop("conv_in.bias"), r"1 missing \(conv_in\.bias\)"),
        (lambda tensors: tensors.update(odd=torch.ones(2)), r"1 unexpected \(odd\)"),
        (
            lambda tensors: tensors.update({"conv_in.bias": torch.ones(5)}),
            r"1 misshaped \(conv_in\.bias \[5\] instead of \[8\]\)",
        ),
    ],
)
def test_loading_names_what_is_missing_or_extra(tmp_path, change, told):
    folder, _ = written(tmp_path / "b")
    changed(folder, "unet", change)
    with pytest.raises(UserError, match=rf"not the weights of .*unet: {told}"):
        bundle.load(folder)


def test_an_incomplete_or_foreign_bundle_is_refused(tmp_path):
    folder, _ = written(tmp_path / "b")
    Path(folder, "unet", "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"unet/.* does not exist: the bundle is incomplete"):
        bundle.load(folder)
    index = Path(folder, "model_index.json")
    values = json.loads(index.read_text())
    for wrong, told in [
        ({"unet": ["diffusers", "FluxTransformer"]}, "unet is a FluxTransformer; expected"),
        ({"raylarge": {"patch_px": 32, "format": 99}}, "has format 99, this raylarge reads 1 to"),
        ({"raylarge": {}}, "has format 0"),
    ]:
        index.write_text(json.dumps(values | wrong))
        with pytest.raises(UserError, match=told):
            bundle.load(folder)


def test_sharded_weights_are_read(tmp_path):
    folder, parts = written(tmp_path / "b")
    shutil.rmtree(Path(folder, "unet"))
    parts["unet"].save_pretrained(Path(folder, "unet"), max_shard_size="100KB")
    assert len(list(Path(folder, "unet").glob("*.safetensors"))) > 1
    found = bundle.load(folder).unet.state_dict()
    assert all(torch.equal(found[k], v) for k, v in parts["unet"].state_dict().items())


def test_a_bundle_of_format_1_computes_what_it_did(tmp_path):
    """Written by the code of that format, which also noted the mean squares."""
    wanted = json.loads((OLD / "expected.json").read_text())
    loaded = bundle.load(str(OLD))
    x = torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)
    grid = torch.linspace(-1, 1, 32).reshape(1, 8, 2, 2)
    with torch.no_grad():
        tokens = loaded.summarizer(grid, torch.tensor([1]))
        found = {
            "tokens": tokens,
            "x_0": loaded.denoiser()(x, 501, tokens),
            "drawn": loaded.cdm.draw(1, 7, [(1, 0, 0)]),
            "image": loaded.vae.decode(x),
        }
    for name, value in found.items():
        assert float(value.double().square().mean()) == pytest.approx(wanted[name], rel=1e-5)
    # A part added to it makes it a bundle of today's format, and still a whole one.
    again = tmp_path / "again"
    shutil.copytree(OLD, again)
    bundle.save(str(again), {"cdm": loaded.cdm}, {})
    assert bundle.facts(str(again))["format"] == 2
    drawn = bundle.load(str(again)).cdm.draw(1, 7, [(1, 0, 0)])
    assert torch.equal(drawn, found["drawn"])
