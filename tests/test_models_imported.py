"""`jobs/import_weights.py`: a whole published checkpoint becomes a bundle, in one command."""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from published import filled, state

from jobs import import_weights
from raylarge.diffusion.schedule import Schedule
from raylarge.errors import UserError
from raylarge.models import bundle, published
from raylarge.models import unet as unets
from raylarge.train import ldm

ROOT = Path(__file__).parents[1]
PUBLISHED = {"vae": 55_322_782, "summarizer": 38_656_000, "unet": 400_920_579}
CDM = 130_746_880


def checkpoint(parity, path, conditioner="summarizer", context=32):
    """A ZoomLDM checkpoint in small: every section of the 1,750 names, by the fill rule."""
    unet = state(parity, "unet_a")
    wide = {k: filled(k, (v.shape[0], context)) for k, v in unet.items() if _reads_context(k)}
    unet |= wide
    content = {f"model.diffusion_model.{k}": v for k, v in unet.items()}
    content |= {f"model_ema.diffusion_model{k.replace('.', '')}": v + 1 for k, v in unet.items()}
    content |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(3)}
    content |= {f"first_stage_model.{k}": v for k, v in state(parity, "vq").items()}
    content |= {f"cond_stage_model.{k}": v for k, v in conditioner.items()}
    content |= {"betas": Schedule().betas.float(), "alphas_cumprod": Schedule().abar.float()}
    torch.save(content, path)
    return f"checkpoint={path}"


def _reads_context(name):
    return "attn2.to_k" in name or "attn2.to_v" in name


def whole_cdm(parity, path):
    args = argparse.Namespace(lr=1e-4)
    average = state(parity, "dit")
    raw = {k: v + 1 for k, v in average.items()}
    torch.save({"model": raw, "ema": average, "opt": {"state": {}}, "args": args}, path)
    return f"cdm={path}"


def test_a_checkpoint_becomes_a_bundle_that_samples(parity, tmp_path, capsys, one_thread):
    words = [
        checkpoint(parity, tmp_path / "weights.ckpt", state(parity, "summarizer")),
        whole_cdm(parity, tmp_path / "cdm.pt"),
        f"out={tmp_path / 'b'}",
        "heads=[1,4,4]",
    ]
    import_weights.main(words)
    said = capsys.readouterr().out
    loaded = bundle.load(str(tmp_path / "b"))
    for name in ("vae", "summarizer", "unet", "cdm"):
        assert name in said
    assert (loaded.patch.side_px, loaded.patch.latent, loaded.patch.scales) == (256, (3, 64, 64), 8)
    first = filled("input_blocks.0.0.bias", (32,))
    assert torch.equal(loaded.unet.conv_in.bias, first + 1)  # the average, not the raw weights
    assert loaded.summarizer.config.raw
    grid, scale = torch.randn(1, 16, 2, 2), torch.tensor([3])
    given = published.summarizer_from_published(state(parity, "summarizer"), heads=4)
    unit = (grid - grid.mean(dim=1, keepdim=True)) / (grid.std(dim=1, keepdim=True) + 1e-8)
    assert torch.allclose(loaded.summarizer(grid, scale), given(unit, scale), atol=1e-5)
    x_0 = loaded.denoiser()(torch.randn(1, 3, 16, 16), 501, loaded.summarizer(grid, scale))
    assert x_0.isfinite().all()
    assert loaded.cdm.draw(3, 1, [(0, 0)]).shape == (1, 5, 16)
    facts = bundle.facts(str(tmp_path / "b"))
    assert facts["source"]["checkpoint"].startswith("weights.ckpt sha256:")
    assert str(tmp_path) not in json.dumps(facts)


def test_the_layout_of_graikos_imports_too(parity, tmp_path):
    shapes = {"patch_fc.weight": (32, 384), "patch_fc.bias": (32,)}
    shapes |= {"region_fc.weight": (32, 768), "region_fc.bias": (32,)}
    vectors = {name: filled(name, shape) for name, shape in shapes.items()}
    words = [checkpoint(parity, tmp_path / "last.ckpt", vectors), f"out={tmp_path / 'b'}"]
    import_weights.main([*words, "encoder=hipt_vit256"])
    loaded = bundle.load(str(tmp_path / "b"))
    assert loaded.summarizer(torch.randn(2, 384, 1, 1), torch.tensor([0, 0])).shape == (2, 2, 32)
    known = bundle.facts(str(tmp_path / "b"))
    assert known["encoder"]["name"] == "hipt_vit256"
    assert "non-commercial" in known["licence"]["encoder"]
    with pytest.raises(UserError, match="uni gives 1024 channels, this checkpoint takes 384"):
        import_weights.main([*words, "encoder=uni"])


def test_what_is_no_checkpoint_is_refused_before_anything_is_written(parity, tmp_path):
    words = [checkpoint(parity, tmp_path / "w.ckpt", {"x": torch.zeros(1)}), f"out={tmp_path}/b"]
    with pytest.raises(UserError, match=r"missing cond_stage_model\.dim_reduce\.weight or dim_red"):
        import_weights.main(words)
    odd = torch.load(tmp_path / "w.ckpt", weights_only=True) | {
        "betas": torch.linspace(1e-4, 0.02, 1000)
    }
    with pytest.raises(UserError, match=r"betas \(0\.0001 to 0\.02\) are not scaled_linear"):
        published.schedule_from_published(odd)
    assert not (tmp_path / "b").exists()


def test_training_starts_from_the_imagenet_weights(parity, tmp_path):
    """LDM's file: a U-Net, an autoencoder, and a class embedder that is left behind."""
    unet = state(parity, "unet_a")
    content = {f"model.diffusion_model.{k}": v for k, v in unet.items()}
    content |= {"cond_stage_model.embedding.weight": torch.zeros(1001, 24)}
    torch.save({"state_dict": content}, tmp_path / "model.ckpt")
    config = unets.UNetConfig((32, 64), (False, True), layers=1, heads=1)
    network = unets.build(config, (3, 16, 16), 24)
    ldm.initialise(network, str(tmp_path / "model.ckpt"), heads=1)
    assert torch.equal(network.conv_in.bias, unet["input_blocks.0.0.bias"])
    assert all(parameter.requires_grad for parameter in network.parameters())
    other = unets.build(config, (3, 16, 16), 32)
    with pytest.raises(UserError, match=r"misshaped \(.*attn2\.to_k\.weight"):
        ldm.initialise(other, str(tmp_path / "model.ckpt"), heads=1)
    torch.save({"state_dict": {f"unet.{k}": v for k, v in unet.items()}}, tmp_path / "wrong.ckpt")
    with pytest.raises(UserError, match=r"missing model\.diffusion_model\.input_blocks"):
        ldm.initialise(network, str(tmp_path / "wrong.ckpt"), heads=1)


def shapes(parity, model="brca"):
    return json.loads((parity / f"keys_{model}.json").read_text())


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("model", "scales", "size"), [("brca", 8, 0), ("naip", 4, -2048)])
def test_the_published_names_and_sizes_without_their_gigabytes(parity, model, scales, size):
    keys = shapes(parity, model)
    assert len(keys) == 1750
    with torch.device("meta"):
        named = {name: torch.empty(shape) for name, shape in keys.items()}
        for ema in (True, False):
            assert count(published.unet_from_published(named, ema=ema)) == PUBLISHED["unet"]
        assert count(published.vq_from_published(named)) == PUBLISHED["vae"]
        summarizer = published.summarizer_from_published(named)
    assert count(summarizer) == PUBLISHED["summarizer"] + size
    assert summarizer.config.scales == scales


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_checkpoint_of_full_size_imports_within_its_memory(parity, tmp_path):
    """3.58 GB and the CDM, by the command itself: peak memory at most 2.5 times the file."""
    named = {name: torch.full(shape, 0.01) for name, shape in shapes(parity).items()}
    named["betas"] = Schedule().betas.float()
    torch.save(named, tmp_path / "weights.ckpt")
    del named
    with torch.device("meta"):
        cdm = published.CDM().state_dict()
    names = {
        k.replace("t_embedder.", "t_embedder.mlp.").replace(
            "y_embedder.weight", "y_embedder.embedding_table.weight"
        ): torch.full(v.shape, 0.01)
        for k, v in cdm.items()
    }
    torch.save(
        {"model": names, "ema": names, "opt": {}, "args": argparse.Namespace()}, tmp_path / "cdm.pt"
    )
    words = [f"checkpoint={tmp_path}/weights.ckpt", f"cdm={tmp_path}/cdm.pt", f"out={tmp_path}/b"]
    command = [sys.executable, "jobs/import_weights.py", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for part in (*PUBLISHED.values(), CDM):
        assert f"{part:,}" in done.stdout
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    assert peak <= 2.5 * (tmp_path / "weights.ckpt").stat().st_size
    assert bundle.facts(f"{tmp_path}/b")["encoder"]["name"] == "uni"
