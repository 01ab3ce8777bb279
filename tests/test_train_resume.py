"""Resuming across versions: records lack keys that came later and have keys that are gone."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import toy

from raylarge import config as config_of
from raylarge import storage
from raylarge.errors import UserError
from raylarge.train import resume
from raylarge.train.launch import Train, train

DEFAULTS = json.loads(Path(__file__).with_name("data").joinpath("train_defaults.json").read_text())
"""The default of every key when it first came."""
CHANGED = {"lr": 2e-3, "ldm": {"drop": 0.2, "summarizer": {"layers": 2}}}


@pytest.fixture
def config(tmp_path):
    toy.write_latents(tmp_path / "data")
    short = {"steps": 2, "batch": 4, "track": "none", "checkpoint_every": 2}
    where = {"data": str(tmp_path / "data"), "out": str(tmp_path / "out")}
    return config_of.build(Train, {"model": "ldm"}, short, where, CHANGED)


def leaves(record):
    return resume._leaves(record)


def without(record, key):
    """A record without one dotted key."""
    record = json.loads(json.dumps(record))
    *above, last = key.split(".")
    inner = record
    for part in above:
        inner = inner[part]
    del inner[last]
    return record


def test_a_record_may_lack_any_key(config):
    """Absent keys mean the default of their time; what differs from it is named exactly."""
    train(config, toy.Toy())
    root = config.run.folder
    path = f"{root}/config.json"
    record = storage.read_json(path)
    keys = leaves(record).keys() - {"on", "model"}
    assert {"super_block", "betas", "ldm.unet.channels", "scale_weights"} <= keys
    refused = set()
    for key in sorted(keys):
        storage.write_json(path, without(record, key))
        value = leaves(record)[key]
        cure = f"{key}={config_of.format_value(DEFAULTS[key])}"
        if value == DEFAULTS[key]:
            resume.refuse_mixing(config)
            assert storage.read_json(path) == record  # the record is complete again
            continue
        other = config_of.format_value(value)
        said = f"without the key {key}, which means {cure}, not {other}; give {cure}"
        with pytest.raises(UserError, match=re.escape(said)):
            resume.refuse_mixing(config)
        refused.add(key)
    assert refused == {"lr", "batch", "ldm.drop", "ldm.summarizer.layers"}


def test_a_run_resumes_without_a_key_in_its_record(config):
    train(config, toy.Toy())
    path = f"{config.run.folder}/config.json"
    storage.write_json(path, without(storage.read_json(path), "super_block"))
    facts = train(replace(config, steps=4), toy.Toy())
    assert (facts["resumed_from"], facts["step"]) == (2, 4)


@pytest.fixture
def record(config):
    """A function that adds keys to the record of a run."""
    train(config, toy.Toy())
    path = f"{config.run.folder}/config.json"

    def change(**more):
        storage.write_json(path, storage.read_json(path) | more)
        resume.refuse_mixing(config)
        return storage.read_json(path)

    return change


def test_a_key_that_is_gone_is_named(record, monkeypatch):
    with pytest.raises(UserError, match=r"trained with sigma=0\.5, which this version lacks"):
        record(sigma=0.5)
    monkeypatch.setitem(resume.REMOVED, "sigma", 0.0)
    record(sigma=0.0)
    with pytest.raises(UserError, match=r"sigma=0\.5, which this version lacks"):
        record(sigma=0.5)


def test_keys_that_may_change_or_are_of_other_models_do_not_count(record):
    assert record(workers=7, vae={"width": 3}, gpu=True)["ldm"] == record()["ldm"]


def test_a_key_may_be_renamed_and_a_default_may_change(config, record, monkeypatch):
    path = f"{config.run.folder}/config.json"
    monkeypatch.setitem(resume.RENAMED, "block", "super_block")
    storage.write_json(path, without(storage.read_json(path), "super_block"))
    with pytest.raises(UserError, match="with super_block=3, not 16; give the old value"):
        record(block=3)
    storage.write_json(path, without(storage.read_json(path), "block"))
    record(block=16)
    storage.write_json(path, without(storage.read_json(path), "super_block"))
    monkeypatch.setitem(resume.ABSENT, "super_block", 8)
    with pytest.raises(UserError, match="means super_block=8, not 16; give super_block=8 to go on"):
        record()


def test_absent_keys_mean_their_first_default():
    """A default that changes must be entered in `ABSENT`, a new key in train_defaults.json."""
    told = leaves(json.loads(json.dumps(config_of.plain(Train()))))
    known = {k for k, v in told.items() if k.split(".")[0] not in resume.FREE and v != "???"}
    assert known == DEFAULTS.keys() - resume.REMOVED.keys() - resume.RENAMED.keys()
    assert {key: resume.absent(key) for key in known} == {key: DEFAULTS[key] for key in known}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "cdm"}, r"model=cdm is trained on summarizer, which .* not have; .* model=ldm"),
        ({"model": "controlnet"}, r"on unet and summarizer, which .*; run .* model=ldm out="),
        ({"model": "vae", "vae": {"distill": True}}, r"model=vae is trained on vae, .* model=vae"),
    ],
)
def test_models_in_the_wrong_order_are_refused_and_leave_nothing(config, change, said):
    other = config_of.build(Train, config_of.plain(config), change)
    with pytest.raises(UserError, match=said):
        train(other)
    assert not Path(config.out).exists()


def test_a_diffusion_model_before_its_autoencoder_knows_it_still(config, capsys):
    resume.refuse_lacking(config.run)
    assert "has no autoencoder: model=ldm is trained on latents-0 of" in capsys.readouterr().out
    assert resume.stands_on(config.run) == "0"
    path = f"{config.run.folder}/config.json"
    train(config, toy.Toy())
    storage.write_json(path, storage.read_json(path) | {"on": ""})  # as older versions wrote it
    resume.refuse_mixing(config)
    storage.write_json(path, storage.read_json(path) | {"on": "1"})
    with pytest.raises(UserError, match=r"not what .* was trained on"):
        resume.refuse_mixing(config)
