"""Checkpoints of training tools: which copy of a network counts, and how its names are read."""

import numpy as np
import pytest
import timm
import torch

from raylarge.errors import UserError
from raylarge.models import ssl, state_dicts

WANTED = {"stem.weight": torch.zeros(2), "stem.bias": torch.zeros(2), "head.weight": torch.zeros(3)}
RAW = {name: torch.full_like(tensor, 1.0) for name, tensor in WANTED.items()}
GOOD = {name: torch.full_like(tensor, 2.0) for name, tensor in WANTED.items()}
SMALL = {"decay": torch.tensor(0.9), "num_updates": torch.tensor(3)}


def under(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"state_dict": RAW, "state_dict_ema": GOOD}, "state_dict_ema"),
        ({"model": RAW, "model_ema": GOOD, "optimizer": {"state": RAW}}, "model_ema"),
        ({"model": RAW, "ema": GOOD, "opt": {"w": RAW["stem.weight"]}}, "ema"),
        ({"ema": {"decay": 0.9, "shadow": GOOD}, "state_dict": RAW}, "ema.shadow"),
        ({"ema": SMALL, "model": GOOD}, "model"),
        ({"ema": {"shadow_params": list(RAW.values())}, "model": GOOD}, "model"),
        ({"student": RAW, "teacher": under("module.backbone.", GOOD)}, "teacher"),
        ({"model": {"student": RAW, "teacher": GOOD}}, "model.teacher"),
        (
            {"model": under("student.backbone.", RAW) | under("teacher.backbone.", GOOD)},
            "model.teacher",
        ),
        ({"encoder": RAW, "target_encoder": GOOD, "predictor": {}}, "target_encoder"),
        ({"params": RAW, "params_ema": GOOD}, "params_ema"),
        (
            {"state_dict": under("model.", RAW) | under("model_ema.module.", GOOD)},
            "state_dict.model_ema",
        ),
        ({"ema": under("online_model.", RAW) | under("ema_model.", GOOD)}, "ema.ema_model"),
        (
            {"state_dict": under("module.encoder_q.", GOOD) | under("module.encoder_k.", RAW)},
            "state_dict.encoder_q",
        ),
        ({"teacher": {"deeper." + n: t for n, t in RAW.items()}, "student": GOOD}, "student"),
        ({"teacher": {n: torch.ones(9) for n in RAW}, "model": GOOD}, "model"),
        ({"state_dict": under("model.", GOOD), "epoch": 3}, "state_dict.model"),
        ({"n_averaged": torch.tensor(7), **under("module.", GOOD)}, ""),
        ({"optimizer": {"state": RAW}, **GOOD}, ""),
    ],
)
def test_the_copy_that_is_evaluated_is_preferred(content, key):
    choice = state_dicts.choose(content, WANTED)
    assert choice.key == key
    assert list(choice.state) == list(WANTED)
    assert all(torch.equal(choice.state[name], GOOD[name]) for name in WANTED)


@pytest.mark.parametrize(
    "prefix",
    [
        *("module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod.", "backbone."),
        *("module.backbone._orig_mod.", "_orig_mod._orig_mod.", "encoder.module.module."),
        *("_forward_module._orig_mod.", "_fsdp_wrapped_module.encoder.backbone."),
    ],
)
def test_prefixes_are_removed_in_any_order(prefix):
    assert list(state_dicts.strip_prefixes(under(prefix, GOOD), WANTED)) == list(WANTED)


def test_the_networks_own_names_stay():
    wanted = {"encoder.layer.weight": torch.zeros(2)}
    state = {"module.encoder._orig_mod.layer.weight": torch.ones(2)}
    assert list(state_dicts.strip_prefixes(state, wanted)) == list(wanted)


def test_two_tensors_of_one_name_are_refused():
    state = {"backbone.stem.bias": torch.ones(2), "module.stem.bias": torch.zeros(2)}
    with pytest.raises(UserError, match=r"backbone\.stem\.bias and module\.stem\.bias are two"):
        state_dicts.strip_prefixes(state, WANTED)
    state["module.stem.bias"] = torch.ones(2)
    assert list(state_dicts.strip_prefixes(state, WANTED)) == ["stem.bias"]


def test_other_copies_are_named():
    choice = state_dicts.choose({"state_dict": RAW, "state_dict_ema": GOOD, "ema": GOOD}, WANTED)
    assert choice.others == ("ema", "state_dict")
    assert state_dicts.choose({"state_dict": GOOD}, WANTED).others == ()


def test_an_encoder_says_which_copy_it_takes(tmp_path, capsys):
    torch.manual_seed(0)
    good = timm.create_model("test_vit", num_classes=0).state_dict()
    raw = {name: tensor * 0 for name, tensor in good.items()}
    torch.save(good, tmp_path / "good.pth")
    images = np.random.default_rng(0).integers(0, 255, (1, 160, 160, 3), np.uint8)
    right = ssl.load("timm:test_vit", str(tmp_path / "good.pth"))(images)
    card = ssl.card("timm:test_vit")
    assert capsys.readouterr().out == ""
    for first, second in (
        ("state_dict", "state_dict_ema"),
        ("model", "model_ema"),
        ("model", "ema"),
        ("student", "teacher"),
    ):
        path = str(tmp_path / "both.pth")
        torch.save({first: raw, second: under("module._orig_mod.", good)}, path)
        assert (ssl.load("timm:test_vit", path)(images) == right).all()
        assert f"'{second}' of both.pth is used, not {first}" in capsys.readouterr().out
        assert ssl.weights_digest(card, path).endswith(f" {second}")


def test_a_checkpoint_in_which_nothing_fits_says_its_keys(tmp_path):
    path = str(tmp_path / "a.pth")
    torch.save({"epoch": 3, "optimizer": {"state": RAW}, "arch": "vit"}, path)
    with pytest.raises(UserError, match=r"no named tensors; its keys: epoch, optimizer, arch\."):
        ssl.load("timm:test_vit", path)
    torch.save({"epoch": 3, "model": GOOD}, path)
    with pytest.raises(UserError, match=r"missing .* 'model' was read; .* the keys epoch, model\."):
        ssl.load("timm:test_vit", path)
