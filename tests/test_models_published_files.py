"""What an importer of published checkpoints refuses or lets pass, and what it says of it."""

import pickle
import re

import numpy as np
import pytest
import torch
from published import figures, filled, kl_of, state

from raylarge.diffusion.schedule import Schedule
from raylarge.errors import UserError
from raylarge.models import published, published_schedule, weights

pytestmark = pytest.mark.usefixtures("one_thread")
NETWORK = 2e-5


def largest(found, wanted):
    return float((found.double() - wanted.double()).abs().max())


def dotless(name):
    return "model_ema.diffusion_model" + name.replace(".", "")


@pytest.fixture(scope="module")
def tensors(parity):
    return {k: state(parity, k) for k in ("unet_a", "unet_b", "vq", "summarizer", "dit")}


def test_a_wrong_prefix_names_the_first_missing_tensor(tensors):
    wrong = {f"net.{k}": v for k, v in tensors["unet_a"].items()}
    message = r"missing model\.diffusion_model\.input_blocks\.0\.0\.weight or .* begin with net\."
    with pytest.raises(UserError, match=message):
        published.unet_from_published(wrong)


READ = {
    "unet_a": published.unet_from_published,
    "vq": published.autoencoder_from_published,
    "kl": published.autoencoder_from_published,
    "summarizer": lambda state: published.summarizer_from_published(state, heads=4),
    "dit": lambda state: published.cdm_from_published(state, heads=4),
    "embedder": published.embedder_from_published,
    "tiny": lambda state: published.tiny_from_published(
        {k: v for k, v in state.items() if k.startswith("encoder.")},
        {k: v for k, v in state.items() if k.startswith("decoder.")},
    ),
}


def tiny_files():
    """TAESD as published: the decoder's numbers are one more, for the clamp before it."""
    from diffusers import AutoencoderTiny

    named = {}
    for name, tensor in AutoencoderTiny().state_dict().items():
        side, _, layer, rest = name.split(".", 3)
        named[f"{side}.{int(layer) + (side == 'decoder')}.{rest}"] = tensor
    return named


@pytest.fixture(scope="module")
def every(tensors):
    vectors = {"patch_fc.weight": (32, 384), "patch_fc.bias": (32,)}
    vectors |= {"region_fc.weight": (32, 768), "region_fc.bias": (32,)}
    return {
        **tensors,
        "kl": kl_of(tensors["vq"]),
        "embedder": {name: filled(name, shape) for name, shape in vectors.items()},
        "tiny": tiny_files(),
    }


@pytest.mark.parametrize("network", READ)
def test_any_one_missing_tensor_is_named_as_the_file_names_it(every, network):
    whole, read = every[network], READ[network]
    assert not read(whole).training
    ends = (".op.bias", "conv.bias", "sample.conv.weight")
    for index, name in enumerate(whole):
        if index % 6 and not name.endswith(ends) and not _may_tell_a_size(name):
            continue
        with pytest.raises(UserError, match=rf"missing.*[ (.]{re.escape(name)}"):
            read({k: v for k, v in whole.items() if k != name})


@pytest.mark.parametrize("network", READ)
def test_tensors_of_another_rank_are_refused(every, network):
    whole, read = every[network], READ[network]
    telling = [name for name in whole if _may_tell_a_size(name)]
    assert telling or network == "tiny"
    for name in telling or ["encoder.14.weight"]:
        for shape in [(), (0,) * whole[name].ndim, (5,), (7, 0)]:
            with pytest.raises(UserError):
                read(whole | {name: torch.zeros(shape)})


def _may_tell_a_size(name):
    parts = ("in_layers.2.w", "0.0.w", "to_k.w", "out.2.w", "conv1.w", "conv_in.w", "conv_out.w")
    parts += ("quant_conv.w", "embedding", "dim_reduce", "mlp.0.w", "fc", "embed", "linear.w")
    return any(part in name for part in parts) and "mid" not in name.split("middle_block.1")[0]


def test_extra_and_misshapen_tensors_are_named_as_the_file_names_them(every):
    for network, name in [
        ("unet_a", "out.0.bias"),
        ("vq", "decoder.norm_out.bias"),
        ("kl", "encoder.down.1.downsample.conv.bias"),
        ("summarizer", "final_proj.bias"),
        ("dit", "blocks.1.attn.proj.bias"),
        ("tiny", "decoder.1.bias"),
    ]:
        whole, read = every[network], READ[network]
        named = re.escape(name)
        with pytest.raises(UserError, match=rf"1 missing \({named}\)"):
            read({k: v for k, v in whole.items() if k != name})
        stray = name.replace(".bias", ".stray")
        with pytest.raises(UserError, match=rf"1 unexpected \({re.escape(stray)}\)"):
            read(whole | {stray: torch.ones(3)})
        with pytest.raises(UserError, match=rf"1 misshaped \({named} \[5\] instead of \["):
            read(whole | {name: torch.ones(5)})


def test_under_a_prefix_every_name_counts(every):
    for network, prefix in [
        ("unet_a", "model.diffusion_model."),
        ("vq", "first_stage_model."),
        ("summarizer", "cond_stage_model."),
        ("embedder", "cond_stage_model."),
    ]:
        whole = {prefix + name: tensor for name, tensor in every[network].items()}
        with pytest.raises(UserError, match=r"1 unexpected \(alien\.weight\)"):
            READ[network](whole | {f"{prefix}alien.weight": torch.ones(1)})
        beside = {"alien.weight": torch.ones(1), "first_stage_model.loss.x": torch.ones(1)}
        READ[network](whole | beside)
    average = {dotless(k): v for k, v in every["unet_a"].items()}
    for stray in ("model_ema.diffusion_modelalienweight", "model_ema.alien"):
        with pytest.raises(UserError, match=rf"1 unexpected \({stray}\)"):
            published.unet_from_published(average | {stray: torch.ones(1)})


def test_a_far_number_is_a_stray_name_and_no_size(every):
    for network, stray in [("dit", "blocks.999999999.x"), ("unet_a", "input_blocks.999999999.x")]:
        with pytest.raises(UserError, match=rf"1 unexpected \({stray}\)"):
            READ[network](every[network] | {stray: torch.ones(1)})


def test_a_unet_whose_inputs_and_outputs_differ(parity, tensors):
    wanted, plain = figures(parity, "unet_a"), tensors["unet_a"]
    more = dict(plain)
    more["input_blocks.0.0.weight"] = torch.cat([plain["input_blocks.0.0.weight"]] * 2, dim=1)
    more["out.2.weight"] = torch.cat([plain["out.2.weight"], torch.ones(1, 32, 3, 3)])
    more["out.2.bias"] = torch.cat([plain["out.2.bias"], torch.ones(1)])
    unet = published.unet_from_published(more)
    x = torch.cat([wanted["x"], torch.zeros_like(wanted["x"])], dim=1)
    output = unet(x, wanted["t"], wanted["c"])
    assert output.shape[1] == 4
    assert largest(output[:, :3], wanted["y"]) <= NETWORK


def test_a_unet_of_deeper_transformers(parity, tensors):
    """A second transformer block whose branches end in zeros changes nothing; others do."""
    wanted, plain = figures(parity, "unet_a"), tensors["unet_a"]
    second = {
        k.replace("transformer_blocks.0", "transformer_blocks.1"): v
        for k, v in plain.items()
        if "transformer_blocks.0" in k
    }
    ends = ("to_out.0.weight", "to_out.0.bias", "ff.net.2.weight", "ff.net.2.bias")
    idle = {k: torch.zeros_like(v) if k.endswith(ends) else v for k, v in second.items()}
    x, t, c = wanted["x"], wanted["t"], wanted["c"]
    deep = published.unet_from_published(plain | idle)
    assert largest(deep(x, t, c), wanted["y"]) <= NETWORK
    average = {dotless(k): v for k, v in (plain | second).items()}
    busy = published.unet_from_published(average)
    assert largest(busy(x, t, c), wanted["y"]) > 1e-3
    middle = {k: v for k, v in second.items() if "middle" in k}
    with pytest.raises(UserError, match="not supported: 1 and 2 transformer blocks"):
        published.unet_from_published(plain | middle)


def test_autoencoders_of_images_of_other_channels(every):
    for network in ("vq", "kl"):
        named = dict(every[network])
        named["encoder.conv_in.weight"] = torch.ones(32, 4, 3, 3)
        named["decoder.conv_out.weight"] = torch.ones(4, 32, 3, 3)
        named["decoder.conv_out.bias"] = torch.ones(4)
        vae = published.autoencoder_from_published(named).network
        assert vae(torch.zeros(1, 4, 32, 32)).sample.shape == (1, 4, 32, 32)


def test_what_is_not_supported_is_said_so(every):
    unet, vq = every["unet_a"], every["vq"]
    with pytest.raises(UserError, match=r"not supported: class embeddings .*label_emb\.0\.0\.w"):
        published.unet_from_published(unet | {"label_emb.0.0.weight": torch.ones(1)})
    with pytest.raises(UserError, match=r"not supported: attention without a context"):
        published.unet_from_published(unet | {"middle_block.1.qkv.weight": torch.ones(1)})
    with pytest.raises(UserError, match=r"not supported: a first level 32 wide .* 64 channels"):
        published.unet_from_published(unet | {"input_blocks.0.0.weight": torch.ones(64, 3, 3, 3)})
    with pytest.raises(UserError, match=r"not supported: attention within .*down\.2\.attn\.0"):
        published.vq_from_published(vq | {"encoder.down.2.attn.0.q.weight": torch.ones(1)})
    with pytest.raises(UserError, match=r"not supported: a VQ autoencoder with scale_factor 0\.5"):
        published.vq_from_published(vq | {"scale_factor": torch.tensor(0.5)})
    published.vq_from_published(vq | {"scale_factor": torch.tensor(1.0)})
    with pytest.raises(UserError, match=r"scale_factor is \[1.0, 2.0\], not a number above 0"):
        published.kl_from_published(every["kl"] | {"scale_factor": torch.tensor([1.0, 2.0])})


@pytest.mark.parametrize("heads", [5, 0, -1, 65])
def test_heads_that_do_not_divide_are_refused(tensors, heads):
    for network, read in [
        ("unet_a", published.unet_from_published),
        ("summarizer", published.summarizer_from_published),
        ("dit", published.cdm_from_published),
    ]:
        with pytest.raises(UserError, match=f"^{heads} attention heads do not divide"):
            read(tensors[network], heads)


def test_schedules_of_both_kinds_are_known_and_others_refused():
    for schedule in (Schedule(), Schedule("linear", 1000, 1e-4, 0.02), Schedule(length=2)):
        found = published_schedule.schedule_from_published({"betas": schedule.betas.float()})
        assert found == schedule
    assert published_schedule.schedule_from_published({}) == Schedule()
    for betas in (torch.tensor([]), torch.tensor(0.1), torch.tensor([0.1]), torch.ones(2, 2)):
        with pytest.raises(UserError, match=r"betas have the shape \["):
            published_schedule.schedule_from_published({"betas": betas})
    for betas in (
        Schedule("squaredcos").betas,
        torch.tensor([-0.1, 0.1]),
        torch.full((9,), np.nan),
    ):
        with pytest.raises(UserError, match="neither scaled_linear nor linear"):
            published_schedule.schedule_from_published({"betas": betas})


def test_a_tiny_autoencoder_however_its_files_are_wrapped(every):
    named = every["tiny"]
    sides = [
        {k.removeprefix(side): v for k, v in named.items() if k.startswith(side)}
        for side in ("encoder.", "decoder.")
    ]
    image = torch.rand(1, 3, 32, 32)
    wanted = READ["tiny"](named).encode(image)
    for first, second in [sides, [{"state_dict": side} for side in sides]]:
        assert torch.equal(published.tiny_from_published(first, second).encode(image), wanted)
    for first, second in [
        ({}, sides[1]),
        (sides[0], {"weight": torch.ones(1)}),
        (sides[0], {f"net.{k}": v for k, v in sides[1].items()}),
        (sides[0], sides[1] | {"odd.weight": torch.ones(1)}),
    ]:
        with pytest.raises(UserError, match=r"missing|unexpected \(decoder\.odd\.weight\)"):
            published.tiny_from_published(first, second)


def test_what_is_no_tensor_is_left_behind(tensors):
    odd = {7: torch.ones(1), "names": np.array(["a", "b"]), "epoch": 3, **tensors["unet_a"]}
    assert published.unet_from_published(odd).config.in_channels == 3
    assert not published.has_embedder(odd)


def test_lightnings_checkpoints_open_without_lightning(tensors, tmp_path):
    """A class as a key of `callbacks`, as pickled by old Lightning versions."""
    path = tmp_path / "last.ckpt"
    stand_in = type("ModelCheckpoint", (), {})
    stand_in.__module__ = "pytorch_lightning.callbacks.model_checkpoint"
    import sys
    import types

    modules = {
        name: types.ModuleType(name)
        for name in (
            "pytorch_lightning",
            "pytorch_lightning.callbacks",
            "pytorch_lightning.callbacks.model_checkpoint",
        )
    }
    modules["pytorch_lightning.callbacks.model_checkpoint"].ModelCheckpoint = stand_in
    sys.modules.update(modules)
    torch.save({"state_dict": tensors["unet_a"], "callbacks": {stand_in: {"best": 1}}}, path)
    for name in modules:
        del sys.modules[name]
    unet = published.unet_from_published(weights.open_checkpoint(str(path)))
    assert torch.equal(unet.conv_in.bias, tensors["unet_a"]["input_blocks.0.0.bias"])


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (self.marker, "w"))


def test_a_hostile_pickle_is_refused_and_runs_nothing(tmp_path):
    marker = tmp_path / "ran"
    for name, write in [
        ("zip.ckpt", lambda path: torch.save({"a": Hostile(str(marker))}, path)),
        ("bare.ckpt", lambda path: path.write_bytes(pickle.dumps({"a": Hostile(str(marker))}))),
    ]:
        write(tmp_path / name)
        with pytest.raises(UserError, match="cannot be opened as a file of tensors"):
            weights.open_checkpoint(str(tmp_path / name))
    assert not marker.exists()


def test_broken_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="there are no weights at"):
        weights.open_checkpoint(str(tmp_path / "none.ckpt"))
    for name in ("cut.ckpt", "cut.safetensors"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 no more")
        with pytest.raises(UserError, match="cannot be opened as a file of tensors"):
            weights.open_checkpoint(str(tmp_path / name))
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="contains no named tensors but a list"):
        weights.open_checkpoint(str(tmp_path / "list.pt"))
