"""Encoders with weights of a file or of the hub, and what is said where they do not fit."""

import argparse
import os
import pickle
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from hub import Hub, redirect
from safetensors.torch import save_file
from torch import nn

from raylarge.errors import UserError
from raylarge.models import ssl, ssl_networks, weights
from raylarge.models.ssl_cards import CARDS


@pytest.fixture(scope="module")
def tiles():
    noise = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    return noise.repeat(4, axis=1).repeat(4, axis=2)


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return timm.create_model("test_vit", pretrained=False, num_classes=0).eval()


def expected(network, card, tiles):
    x = ssl_networks.to_inputs(tiles, card.input_px, card.colour, card.resample, "cpu")
    with torch.inference_mode():
        return network(x).numpy().astype(np.float16)


def saved(path, content):
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return str(path)


@pytest.mark.parametrize(
    ("file", "wrap"),
    [
        ("a.safetensors", lambda state: state),
        ("a.pth", lambda state: {"state_dict": state, "epoch": 3}),
        ("a.bin", lambda state: {"model": {f"module.{name}": x for name, x in state.items()}}),
        (
            "a.pt",
            lambda state: {
                "student": {},
                "teacher": {
                    **{f"module.backbone.{name}": x for name, x in state.items()},
                    "module.head.weight": torch.zeros(5),
                },
                "args": argparse.Namespace(arch="vit_small"),
            },
        ),
    ],
)
def test_weights_of_a_file_are_found_under_wrappers_and_prefixes(tmp_path, vit, tiles, file, wrap):
    path = saved(tmp_path / file, wrap(vit.state_dict()))
    encoder = ssl.load("timm:test_vit", weights=path)
    assert (encoder.card.width, encoder.card.input_px) == (64, 160)
    assert encoder.card.mean == tuple(vit.pretrained_cfg["mean"])
    assert (encoder(tiles) == expected(vit, encoder.card, tiles)).all()


def test_a_folder_of_the_hubs_layout_and_half_precision_will_do(tmp_path, vit, tiles):
    half = {name: x.half() for name, x in vit.state_dict().items()}
    saved(tmp_path / "pytorch_model.bin", half)
    encoder = ssl.load("timm:test_vit", weights=str(tmp_path))
    vectors = encoder(tiles)
    assert np.isfinite(vectors).all()
    assert np.allclose(vectors, expected(vit, encoder.card, tiles), atol=0.02)


def test_computed_buffers_survive(tmp_path, tiles):
    torch.manual_seed(0)
    options = {"img_size": 64, "window_size": 2, "embed_dim": 24, "depths": (1, 1, 2, 1)}
    card = replace(CARDS["ctranspath"], input_px=64, width=192, options={"num_classes": 0})
    options = {**options, "num_heads": (1, 2, 4, 8), "embed_layer": "ConvStem"}
    card = replace(card, options={**card.options, **options})
    network = ssl_networks._build(card).eval()
    state = network.state_dict()
    # CTransPath's own Swin shrinks at the end of a stage, timm's at the start of the next.
    old = {
        name.replace("layers.1.down", "layers.0.down")
        .replace("layers.2.down", "layers.1.down")
        .replace("layers.3.down", "layers.2.down"): x
        for name, x in state.items()
    }
    path = saved(tmp_path / "ctranspath.pth", {"model": old})
    assert (ssl.Encoder(card, path)(tiles) == expected(network, card, tiles)).all()


def test_class_token_and_mean_of_patches_without_registers(tmp_path, vit, tiles):
    options = {"num_classes": 0, "reg_tokens": 4, "img_size": 160}
    card = replace(CARDS["virchow2"], model="test_vit", options=options, input_px=160, width=128)
    network = timm.create_model("test_vit", **options).eval()
    path = saved(tmp_path / "a.pth", network.state_dict())
    x = ssl_networks.to_inputs(tiles, 160, card.colour, card.resample, "cpu")
    with torch.inference_mode():
        tokens = network.forward_features(x)
    wanted = torch.cat([tokens[:, 0], tokens[:, 5:].mean(1)], dim=1).numpy()
    assert (ssl.Encoder(card, path)(tiles) == wanted.astype(np.float16)).all()
    mean = ssl.Encoder(replace(card, pooling="mean", width=64), path)(tiles)
    assert (mean == wanted[:, 64:].astype(np.float16)).all()


def dino_positions(pos_embed, side):
    """As `interpolate_pos_encoding` of DINO's vision_transformer.py."""
    old = int((pos_embed.shape[1] - 1) ** 0.5)
    width = pos_embed.shape[-1]
    patches = pos_embed[:, 1:].reshape(1, old, old, width).permute(0, 3, 1, 2)
    scale = (side + 0.1) / old
    patches = nn.functional.interpolate(patches, scale_factor=(scale, scale), mode="bicubic")
    patches = patches.permute(0, 2, 3, 1).view(1, -1, width)
    return torch.cat([pos_embed[:, :1], patches], dim=1)


def test_a_dino_checkpoint_of_224_px_runs_at_256_px_as_dino_does(tmp_path, tiles):
    torch.manual_seed(0)
    given = timm.create_model("test_vit", num_classes=0, img_size=224).eval()
    nn.init.normal_(given.pos_embed)
    wanted = timm.create_model("test_vit", num_classes=0, img_size=256).eval()
    state = dict(given.state_dict())
    wanted.load_state_dict({**state, "pos_embed": dino_positions(state["pos_embed"], 16)})
    wrapped = {f"module.backbone.{name}": x for name, x in state.items()}
    wrapped["module.head.mlp.0.weight"] = torch.zeros(2, 2)
    path = saved(tmp_path / "vit256_small_dino.pth", {"teacher": wrapped, "epoch": 1})
    card = replace(CARDS["hipt_vit256"], model="test_vit", width=64)
    assert (ssl.Encoder(card, path)(tiles) == expected(wanted, card, tiles)).all()


def test_conchs_pooler_is_attention_of_one_query(tmp_path, tiles):
    torch.manual_seed(0)
    pooler = ssl_networks.AttentionalPooler(width=16, context=24, heads=4)
    nn.init.normal_(pooler.query)
    x = torch.randn(2, 5, 24)
    k, v = pooler.to_kv(pooler.ln_k(x)).chunk(2, dim=-1)
    q = pooler.to_q(pooler.ln_q(pooler.query))
    heads = []
    for head in range(4):  # the published code's einsum, one head at a time
        part = slice(4 * head, 4 * head + 4)
        attention = (q[None, :, part] * 4**-0.5 @ k[..., part].mT).softmax(dim=-1)
        heads.append(attention @ v[..., part])
    torch.testing.assert_close(pooler(x), pooler.to_out(torch.cat(heads, dim=-1)))
    names = ssl_networks.build(CARDS["conch_v1_5"]).state_dict()
    assert {name.split(".")[0] for name in names} == {"trunk", "attn_pool_contrast", "ln_contrast"}


def test_transformers_networks_take_a_file_too(tmp_path, tiles):
    from transformers import ViTModel

    options = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    options = {**options, "image_size": 32, "intermediate_size": 64}
    card = replace(CARDS["phikon"], options=options, input_px=32, width=32)
    torch.manual_seed(0)
    network = ssl_networks._build(card).eval()
    network.save_pretrained(tmp_path)  # model.safetensors, as on the hub
    assert isinstance(network, ViTModel)
    encoder = ssl.Encoder(card, str(tmp_path))
    wanted = expected(lambda x: network(pixel_values=x).last_hidden_state[:, 0], card, tiles)
    assert (encoder(tiles) == wanted).all()
    tensors = weights.read_tensors(tmp_path / "model.safetensors")
    tensors.pop(next(name for name in tensors if "cls_token" in name))
    with pytest.raises(UserError, match=r"not the weights of phikon .*1 missing \(.*cls_token"):
        ssl.Encoder(card, saved(tmp_path / "less.safetensors", tensors))


# --- what is refused ------------------------------------------------------------------------------


def test_another_networks_file_is_refused_by_name(tmp_path, vit):
    state = dict(vit.state_dict())
    state["blocks.9.attn.qkv.weight"] = torch.zeros(2, 2)
    state["cls_token"] = state["cls_token"][..., :3]
    del state["norm.weight"]
    told = (
        r"not the weights of timm:test_vit \(test_vit\): 1 missing \(norm.weight\); "
        r"1 unexpected \(blocks.9.attn.qkv.weight\); "
        r"1 misshaped \(cls_token \[1, 1, 3\] instead of \[1, 1, 64\]\); check the file"
    )
    with pytest.raises(UserError, match=told):
        ssl.load("timm:test_vit", weights=saved(tmp_path / "a.pth", state))
    with pytest.raises(UserError, match=r"not the weights of uni .*missing \(.*, …\)"):
        ssl.load("uni", weights=saved(tmp_path / "b.pth", vit.state_dict()))


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    torch.save(
        {"state_dict": {"a": torch.zeros(1)}, "more": Hostile(tmp_path / "was-here")},
        tmp_path / "a.pth",
    )
    (tmp_path / "b.bin").write_bytes(pickle.dumps(Hostile(tmp_path / "was-here"), protocol=2))
    (tmp_path / "c.safetensors").write_bytes(b"no tensors at all")
    for name in ("a.pth", "b.bin", "c.safetensors"):
        with pytest.raises(UserError, match=r"cannot be opened as a file of tensors"):
            ssl.load("timm:test_vit", weights=str(tmp_path / name))
    assert not (tmp_path / "was-here").exists()


def test_paths_and_names_that_lead_nowhere(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="contains no named tensors"):
        ssl.load("timm:test_vit", weights=str(tmp_path / "a.pth"))
    with pytest.raises(UserError, match=r"no weights at .*b\.pth; check the path"):
        ssl.load("uni", weights=str(tmp_path / "b.pth"))
    with pytest.raises(UserError, match=r"contains none of model\.safetensors, pytorch_model\.bin"):
        ssl.load("uni", weights=str(tmp_path))
    with pytest.raises(UserError, match=r"timm has no architecture 'vit_of_mine'"):
        ssl.load("timm:vit_of_mine")
    with pytest.raises(UserError, match=r"'toy' takes no weights; leave embed\.weights out"):
        ssl.load("toy", weights=str(tmp_path / "a.pth"))
    with pytest.raises(
        UserError, match=r"'hipt_vit256' is on no hub: .*mahmoodlab/HIPT.*weights=/"
    ):
        ssl.load("hipt_vit256")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("uni", r"MahmoodLab/UNI .*gated: ask for access at https://huggingface.co/MahmoodLab/UNI"),
        ("phikon", r"owkin/phikon .*get its weights from https://huggingface.co/owkin/phikon"),
    ],
)
def test_without_a_network_the_cure_is_a_file_and_no_wait(monkeypatch, tmp_path, name, told):
    from huggingface_hub import constants

    redirect(monkeypatch, "http://127.0.0.1:9", tmp_path)  # nobody answers there
    begun = time.monotonic()
    with pytest.raises(UserError, match=rf"{told}.*embed\.weights=/path/to/file"):
        ssl.load(name)
    assert time.monotonic() - begun < 5
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=rf"{told}.*embed\.weights=/path/to/file"):
        ssl.load(name)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = Hub()
    redirect(monkeypatch, server.url, tmp_path / "cache")
    yield server
    server.close()


def test_from_the_hub_comes_the_first_file_that_it_holds_and_then_the_cache(
    hub, tmp_path, vit, tiles, monkeypatch
):
    saved(tmp_path / "a.bin", vit.state_dict())
    hub.files["timm/test_vit.r160_in1k"] = {
        "pytorch_model.bin": (tmp_path / "a.bin").read_bytes()  # and no model.safetensors
    }
    encoder = ssl.load("timm:test_vit")
    assert encoder.card.hub == "timm/test_vit.r160_in1k"
    assert (encoder(tiles) == expected(vit, encoder.card, tiles)).all()
    hub.files.clear()
    assert (ssl.load("timm:test_vit")(tiles) == encoder(tiles)).all()


def test_a_gated_or_empty_repository_says_so(hub):
    hub.gated.add("MahmoodLab/UNI")
    with pytest.raises(UserError, match=r"MahmoodLab/UNI .*GatedRepoError.*ask for access at"):
        ssl.load("uni")
    hub.files["owkin/phikon"] = {"README.md": b"nothing else"}
    with pytest.raises(UserError, match=r"owkin/phikon on huggingface.co has none of .*weights="):
        ssl.load("phikon")


def test_a_missing_package_of_the_extra_is_named(monkeypatch, tmp_path, vit):
    monkeypatch.setitem(sys.modules, "transformers", None)
    path = saved(tmp_path / "a.pth", vit.state_dict())
    with pytest.raises(UserError, match=r"'phikon' needs the package transformers: .*\[text\]"):
        ssl.load("phikon", weights=path)


def test_weights_are_told_apart_by_their_content(tmp_path, vit):
    card = ssl.card("timm:test_vit")
    first = ssl.weights_digest(card, saved(tmp_path / "a.pth", vit.state_dict()))
    (tmp_path / "b.pth").write_bytes((tmp_path / "a.pth").read_bytes())
    assert ssl.weights_digest(card, str(tmp_path / "b.pth")) == first
    assert len(first) == 16
    (tmp_path / "b.pth").write_bytes(b"else")
    assert ssl.weights_digest(card, str(tmp_path / "b.pth")) != first
    assert ssl.weights_digest(ssl.card("toy"), "") == ""
