"""Files of weights: whatever is wrong with one is said, and a network owns what it loaded."""

import os
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from raylarge.errors import UserError
from raylarge.models import state_dicts, weights


def network():
    return torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))


def on_meta():
    with torch.device("meta"):
        return network()


def test_damage_of_any_kind_is_nothing_but_a_user_error(tmp_path):
    state = {f"layer.{i}.weight": torch.randn(8, 8) for i in range(40)}
    torch.save(state, tmp_path / "new.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "s.safetensors")
    draw = np.random.default_rng(0)
    path, told = tmp_path / "damaged.ckpt", []
    for name in ("new.pt", "old.pt", "s.safetensors"):
        raw = (tmp_path / name).read_bytes()
        changed = [raw[:size] for size in range(1, len(raw) - 1, len(raw) // 25)]
        for place in draw.integers(0, min(len(raw), 3000), 40):
            other = bytes([int(draw.integers(256))])
            changed.append(raw[:place] + other + raw[place + 1 :])
        for content in [*changed, b"", b"hello\n", b"<html>", b"PK\x03\x04"]:
            path.write_bytes(content)
            try:  # changed values in a tensor cannot be seen, all else is told
                assert isinstance(weights.open_checkpoint(path), dict)
            except UserError as error:
                told.append(str(error))
    assert len(told) > 75  # every cut file, and most of the others
    assert all(str(path) in sentence for sentence in told)


def test_a_text_file_and_a_folder_are_no_weights(tmp_path):
    (tmp_path / "a.ckpt").write_text("hello\n")
    with pytest.raises(UserError, match="it is damaged, or has another format"):
        weights.open_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="there are no weights at"):
        weights.open_checkpoint(tmp_path)


def test_a_refused_class_is_named_and_torchs_advice_is_not_passed_on(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"a": Fraction(1, 2)}, path)
    with pytest.raises(
        UserError, match=r"\(it contains a fractions\.Fraction, which is no"
    ) as error:
        weights.open_checkpoint(path)
    path.write_bytes(pickle.dumps({"a": os.getcwd}, protocol=2))
    with pytest.raises(UserError, match=r"\(it contains a posix\.getcwd, which is no") as other:
        weights.open_checkpoint(path)
    assert not any(
        word in str(e.value) for e in (error, other) for word in ("safe_globals", "http")
    )


@pytest.mark.parametrize("name", ["a.ckpt", "a.SAFETENSORS", "a"])
def test_safetensors_are_known_by_their_content(tmp_path, name):
    save_file({"w": torch.arange(3.0)}, tmp_path / name)
    assert torch.equal(weights.read_tensors(tmp_path / name)["w"], torch.arange(3.0))


def test_wrappers_without_tensors_are_passed_over():
    named, other = {"w": torch.ones(2)}, {"w": torch.zeros(2)}
    for found, wanted in [
        ({"model": named, "ema": {}}, named),
        ({"model": named, "ema": {"decay": 0.9}}, named),
        ({"model": named, "ema": other}, other),
        ({"state_dict": None, **named}, named),
        ({"state_dict": {"model": named}, "epoch": 3}, named),
        ({"student": other, "teacher": named}, named),
        ({7: torch.ones(1), "note": np.array(["a"]), "object": np.array([None]), **named}, named),
    ]:
        assert torch.equal(state_dicts.preferred_tensors(found)["w"], wanted["w"])
        assert list(state_dicts.preferred_tensors(found)) == ["w"]


def test_a_network_owns_its_tensors():
    state = {k: torch.nn.Parameter(v) for k, v in network().state_dict().items() if v.ndim}
    state["1.num_batches_tracked"] = torch.tensor(3)
    before = {name: tensor.detach().clone() for name, tensor in state.items()}
    first, second = (weights.fill(on_meta(), state, "a network") for _ in range(2))
    with torch.no_grad():
        for tensor in first.state_dict().values():
            tensor.add_(1)
    for name, tensor in second.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert torch.equal(state[name], before[name])
        assert tensor.is_contiguous()
    assert all(tensor.requires_grad for tensor in state.values() if tensor.is_floating_point())
    assert not any(parameter.requires_grad for parameter in first.parameters())


def test_a_network_outlives_its_file(tmp_path):
    """The mapped file cut short under a loaded network used to end the process."""
    path = tmp_path / "a.ckpt"
    torch.save({"0.weight": torch.ones(512, 512), "0.bias": torch.ones(512)}, path)
    with torch.device("meta"):
        empty = torch.nn.Sequential(torch.nn.Linear(512, 512))
    filled = weights.fill(empty, weights.read_tensors(path), "a network")
    path.write_bytes(b"")
    assert float(filled[0].weight.sum()) == 512 * 512


def test_other_precisions_become_float32_and_integers_are_refused():
    state = network().state_dict()
    for kind in (torch.float16, torch.bfloat16, torch.float64):
        cast = {k: v.to(kind) if v.is_floating_point() else v for k, v in state.items()}
        filled = weights.fill(on_meta(), cast, "a network")
        assert {parameter.dtype for parameter in filled.parameters()} == {torch.float32}
    whole = {name: tensor.to(torch.int64) for name, tensor in state.items()}
    with pytest.raises(UserError, match=r"6 mistyped \(0\.weight torch\.int64"):
        weights.fill(on_meta(), whole, "a network")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value):
    state = {name: tensor.clone() for name, tensor in network().state_dict().items()}
    state["1.running_var"][1] = value
    with pytest.raises(UserError, match=r"a network: 1 of 7 tensors hold NaN .*1\.running_var"):
        weights.fill(on_meta(), state, "a network")
    state["0.weight"] = state["0.weight"].bfloat16().fill_(value)
    with pytest.raises(UserError, match=r"2 of 7 tensors hold NaN .*\(0\.weight, 1\.running_var\)"):
        weights.fill(on_meta(), state, "a network")


def test_finite_is_every_value_that_is_a_number():
    for kind in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        largest = torch.tensor([torch.finfo(kind).max, -torch.finfo(kind).max], dtype=kind)
        assert weights.is_finite(largest)
        assert not weights.is_finite(2 * largest)
    assert weights.is_finite(torch.empty(0))
    assert weights.is_finite(torch.arange(3))


def test_networks_of_transformers_own_their_tensors_too():
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=8,
        patch_size=4,
    )
    state = {
        k: v.clone() for k, v in ViTModel(config, add_pooling_layer=False).state_dict().items()
    }
    before = {name: tensor.clone() for name, tensor in state.items()}
    options = {"add_pooling_layer": False}
    filled = weights.fill_transformers(ViTModel, config, state, "a ViT", **options)
    with torch.no_grad():
        for parameter in filled.parameters():
            parameter.add_(1)
    assert all(torch.equal(state[name], before[name]) for name in state)
