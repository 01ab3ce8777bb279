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
from raylarge.train.tasks import ldm

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


def whole_cdm(parity, path, tokens=65, width=32, scales=8):
    """A CDM's training file, by default for the tokens of the Summarizer in small."""
    args = argparse.Namespace(lr=1e-4)
    average = state(parity, "dit")
    sizes = {
        "pos_embed": (1, tokens, 32),
        "x_embedder.weight": (32, width),
        "y_embedder.embedding_table.weight": (scales, 32),
        "final_layer.linear.weight": (2 * width, 32),
        "final_layer.linear.bias": (2 * width,),
    }
    average |= {name: filled(name, shape) for name, shape in sizes.items()}
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
    assert loaded.cdm.draw(3, 1, [(0, 0)]).shape == (1, 65, 32)
    facts = bundle.facts(str(tmp_path / "b"))
    assert facts["source"]["checkpoint"].startswith("weights.ckpt sha256:")
    assert str(tmp_path) not in json.dumps(facts)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_a_checkpoint_wholly_in_half_precision_imports(parity, tmp_path, kind):
    word = checkpoint(parity, tmp_path / "w.ckpt", state(parity, "summarizer"))
    content = torch.load(tmp_path / "w.ckpt", weights_only=True)
    half = {k: v.to(kind) if v.is_floating_point() else v for k, v in content.items()}
    torch.save(half, tmp_path / "w.ckpt")
    import_weights.main([word, f"out={tmp_path / 'b'}"])
    loaded = bundle.load(str(tmp_path / "b"))
    assert loaded.schedule == Schedule()
    assert {x.dtype for x in loaded.unet.parameters()} == {torch.float32}


def test_the_layout_of_graikos_imports_too(parity, tmp_path):
    shapes = {"patch_fc.weight": (32, 384), "patch_fc.bias": (32,)}
    shapes |= {"region_fc.weight": (32, 768), "region_fc.bias": (32,)}
    vectors = {name: filled(name, shape) for name, shape in shapes.items()}
    words = [checkpoint(parity, tmp_path / "last.ckpt", vectors), f"out={tmp_path / 'b'}"]
    with pytest.raises(UserError, match="uni has 1024 channels, this checkpoint needs 384"):
        import_weights.main([*words, "encoder=uni"])
    import_weights.main([*words, "encoder=hipt_vit256"])
    loaded = bundle.load(str(tmp_path / "b"))
    assert loaded.summarizer(torch.randn(2, 384, 1, 1), torch.tensor([0, 0])).shape == (2, 2, 32)
    known = bundle.facts(str(tmp_path / "b"))
    assert known["encoder"]["name"] == "hipt_vit256"
    assert "non-commercial" in known["licence"]["encoder"]


def changed(path, **tensors):
    """Change tensors of a checkpoint, those given as None by leaving them out."""
    content = torch.load(path, weights_only=True)
    for name, tensor in tensors.items():
        content.pop(name, None)
        content |= {} if tensor is None else {name: tensor}
    torch.save(content, path)


def test_what_is_no_checkpoint_is_refused_before_anything_is_written(parity, tmp_path):
    words = [checkpoint(parity, tmp_path / "w.ckpt", {"x": torch.zeros(1)}), f"out={tmp_path}/b"]
    with pytest.raises(UserError, match=r"missing cond_stage_model\.dim_reduce\.weight or dim_red"):
        import_weights.main(words)
    assert not (tmp_path / "b").exists()


WRONG = {
    "a name of the U-Net": {"model_ema.diffusion_modelout0bias": None},
    "a name of the autoencoder": {"first_stage_model.decoder.conv_in.bias": None},
    "the betas": {"betas": Schedule("squaredcos").betas},
    "the scale": {"scale_factor": torch.tensor(0.5)},
    "an average that diverged": {"model_ema.diffusion_modelout0bias": torch.full((32,), torch.nan)},
    "a stranger": {"first_stage_model.alien": torch.ones(1)},
}


@pytest.mark.parametrize("what", WRONG)
def test_a_refused_checkpoint_leaves_nothing(parity, tmp_path, what):
    words = [checkpoint(parity, tmp_path / "w.ckpt", state(parity, "summarizer"))]
    changed(tmp_path / "w.ckpt", **WRONG[what])
    with pytest.raises(
        UserError, match=r"missing|neither scaled_linear|scale_factor|unexpected|hold NaN"
    ):
        import_weights.main([*words, f"out={tmp_path}/b", "heads=[1,4,4]"])
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("heads=[5,4,4]", "5 attention heads do not divide a U-Net of width"),
        ("heads=[1,5,4]", "5 attention heads do not divide a Summarizer of width 32"),
        ("heads=[1,4,5]", "5 attention heads do not divide a CDM of width 32"),
        ("heads=[1,4,0]", "0 attention heads do not divide"),
        ("patch_px=-7", "patch_px=-7 is not a positive multiple of 4"),
        ("patch_px=0", "patch_px=0 is not a positive multiple of 4"),
        ("patch_px=30", "patch_px=30 is not a positive multiple of 4"),
        ("encoder=uni", "uni has 1024 channels"),
        ("cdm=none.pt", r"there are no weights at none\.pt"),
        ("cdm=.", r"there are no weights at \."),
        ("out=", "checkpoint= and out= are needed"),
        ("checkpoint=", "checkpoint= and out= are needed"),
    ],
)
def test_a_refused_word_leaves_nothing(parity, tmp_path, word, message):
    words = [
        checkpoint(parity, tmp_path / "w.ckpt", state(parity, "summarizer")),
        whole_cdm(parity, tmp_path / "cdm.pt"),
        f"out={tmp_path}/b",
        "heads=[1,4,4]",
    ]
    with pytest.raises(UserError, match=message):
        import_weights.main([*words, word])
    assert not (tmp_path / "b").exists()


def test_both_files_must_be_named():
    for words in ([], ["out=b"], ["checkpoint=w.ckpt"]):
        with pytest.raises(UserError, match=r"^checkpoint= and out= are needed: the file, and"):
            import_weights.main(words)


def test_parts_that_do_not_fit_each_other_are_refused(parity, tmp_path):
    words = [f"out={tmp_path}/b", "heads=[1,4,4]"]
    summarizer = state(parity, "summarizer")
    other = checkpoint(parity, tmp_path / "w24.ckpt", summarizer, context=24)
    with pytest.raises(UserError, match="context and the conditioner's tokens have 24 and 32 chan"):
        import_weights.main([*words, other])
    words.append(checkpoint(parity, tmp_path / "w.ckpt", summarizer))
    for sizes, message in [
        ({"tokens": 5}, "the CDM and the conditioner have 5 and 65 tokens"),
        ({"width": 16}, "the CDM and the conditioner have 16 and 32 channels"),
        ({"scales": 4}, "the CDM and the conditioner have 4 and 8 scales"),
    ]:
        with pytest.raises(UserError, match=message):
            import_weights.main([*words, whole_cdm(parity, tmp_path / "cdm.pt", **sizes)])
    wide = {"model_ema.diffusion_modelinput_blocks00weight": torch.ones(32, 9, 3, 3)}
    changed(tmp_path / "w.ckpt", **wide)
    with pytest.raises(UserError, match="inputs and the autoencoder's latents have 9 and 3 chan"):
        import_weights.main(words)
    image = {"first_stage_model.encoder.conv_in.weight": torch.ones(32, 4, 3, 3)}
    changed(tmp_path / "w.ckpt", **image)
    with pytest.raises(UserError, match="not supported: images of 4 channels"):
        import_weights.main(words)
    assert not (tmp_path / "b").exists()


def test_another_bundle_is_not_written_over(parity, tmp_path):
    words = [f"out={tmp_path}/b", "heads=[1,4,4]"]
    words.append(checkpoint(parity, tmp_path / "w.ckpt", state(parity, "summarizer")))
    import_weights.main([*words, whole_cdm(parity, tmp_path / "cdm.pt")])
    before = bundle.digest(f"{tmp_path}/b"), bundle.facts(f"{tmp_path}/b")
    changed(tmp_path / "w.ckpt", betas=Schedule("linear").betas)
    for again in (words, [*words, f"cdm={tmp_path}/cdm.pt"]):
        with pytest.raises(
            UserError, match=r"there is a bundle at .*; give another out= or remove"
        ):
            import_weights.main(again)
    assert before == (bundle.digest(f"{tmp_path}/b"), bundle.facts(f"{tmp_path}/b"))


def test_a_killed_import_is_finished_by_the_same_command(parity, tmp_path, monkeypatch):
    words = [f"out={tmp_path}/b", "heads=[1,4,4]", whole_cdm(parity, tmp_path / "cdm.pt")]
    words.append(checkpoint(parity, tmp_path / "w.ckpt", state(parity, "summarizer")))
    save, saved = bundle.save, []

    def killed(folder, parts, *rest):
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(save(folder, parts, *rest))

    monkeypatch.setattr(bundle, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        import_weights.main(words)
    with pytest.raises(UserError, match="lacks unet"):
        bundle.load(f"{tmp_path}/b")
    monkeypatch.undo()
    with pytest.raises(UserError, match="there is a bundle at"):
        import_weights.main(words[:2] + words[3:])  # another import: without the CDM
    import_weights.main(words)
    assert bundle.load(f"{tmp_path}/b").cdm is not None


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
    ratio = peak / (tmp_path / "weights.ckpt").stat().st_size
    print(f"peak memory: {ratio:.2f} times the file")
    assert ratio <= 2.5
    assert bundle.facts(f"{tmp_path}/b")["encoder"]["name"] == "uni"
