"""Model cards: what a bundle knows stands in them, what it does not know is said, no path does."""

import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from raylarge.errors import UserError
from raylarge.models import bundle, model_card, ssl

LDM = {
    "step": 1234,
    "samples": 567_890,
    "seconds": 5400.0,
    "loss": 0.51234,
    "best_loss": 0.49,
    "data_digest": "feedbeef",
    "rows": {"1": 40, "0": 1500},
    "slides": 7,
    "commit": "0123456789ab",
    "config": {
        "model": "ldm",
        "data": "/home/someone/data",
        "out": "s3://bucket/bundle",
        "batch": 32,
        "betas": [0.9, 0.999],
        "ldm": {"prediction": "epsilon", "init": "/home/someone/cin/model.ckpt"},
    },
}


def known(**more):
    """Facts as a training on UNI's embeddings leaves them."""
    encoder = ssl.card("uni").as_json()
    facts = {"patch_px": 256, "base_mpp": 0.5, "encoder": encoder, "format": 2, "ldm": LDM}
    facts["licence"] = {"encoder": encoder["licence"], "data": "TCGA | open access"}
    sizes = {"unet": ["UNet2DConditionModel", 400_920_579], "summarizer": ["Summarizer", 7]}
    return {**facts, "digests": {"unet": "cafe"}, "parts": sizes, "written_by": "later", **more}


def front(text):
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def section(text, name):
    return text.split(f"## {name}\n")[1].split("\n## ")[0]


def row(text, first):
    """The cells of a table's row."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def test_the_hub_can_read_it():
    found = front(model_card.render(known()))
    assert (found["license"], found["library_name"]) == ("other", "raylarge")
    assert {"synthetic-images", "medical", "histopathology", "diffusers"} <= set(found["tags"])
    aerial = front(model_card.render(known(base_mpp=1e6)))
    assert "remote-sensing" in aerial["tags"]
    assert "medical" not in aerial["tags"]
    nobody_knows = front(model_card.render(known(base_mpp=None)))
    assert not {"medical", "remote-sensing"} & set(nobody_knows["tags"])


def test_what_is_known_stands_there():
    text = model_card.render(known())
    assert "Patches of 256 px; a pixel of the finest scale: 0.5 µm." in text
    parts = section(text, "Parts")
    assert row(parts, "unet")[1:4] == ["UNet2DConditionModel", "400,920,579", "cafe"]
    data = section(text, "Data")
    assert "feedbeef" in data
    assert row(data.split("rows by scale")[1], "ldm")[1:] == ["7", "0: 1,500, 1: 40"]
    assert "split `train`" in data
    assert row(data, "name")[1] == "uni"
    training = section(text, "Training")
    found = row(training, "ldm")
    assert found == ["ldm", "1,234", "567,890", "1.5", "0.5123", "0.49", "0123456789ab"]
    settings = yaml.safe_load(training.split("```yaml\n")[1].split("```")[0])
    assert settings["batch"] == 32
    assert settings["ldm"]["prediction"] == "epsilon"


def test_limits_and_licences_are_told():
    text = model_card.render(known())
    limits = section(text, "Intended use and limits")
    assert "synthetic" in limits
    assert "Not for diagnosis" in limits
    licences = section(text, "Licences")
    assert row(licences, "encoder")[1].startswith("CC-BY-NC-ND-4.0")
    assert row(licences, "data")[1] == "TCGA \\| open access"
    assert row(licences, "weights")[1] == model_card.UNKNOWN


def test_no_path_is_told():
    text = model_card.render(known())
    assert "someone" not in text
    assert "s3://bucket" not in text
    assert "init: model.ckpt" in text


def test_what_is_not_known_is_said():
    text = model_card.render({})
    assert text.count(model_card.UNKNOWN) > 5
    assert row(section(text, "Licences"), "encoder")[1] == model_card.UNKNOWN
    assert f"How the data were split: {model_card.UNKNOWN}" in text
    bare = model_card.render({"ldm": {"loss": None}})
    assert row(section(bare, "Training"), "ldm")[1:] == [model_card.UNKNOWN] * 6
    imported = model_card.render({"source": {"checkpoint": "weights.ckpt sha256:ab"}})
    assert "Imported from checkpoint weights.ckpt sha256:ab." in imported
    assert "Not trained here." in section(imported, "Training")


def test_a_bundle_gets_its_card(tiny_bundle, tmp_path):
    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    digest = bundle.digest(str(folder))
    model_card.write(str(folder))
    text = (folder / "README.md").read_text()
    unet = bundle.load(str(folder)).unet
    count = sum(one.numel() for one in unet.parameters())
    assert row(section(text, "Parts"), "unet")[1:3] == ["UNet2DConditionModel", f"{count:,}"]
    assert [row(text, part)[0] for part in ("vae", "summarizer", "cdm")]
    assert bundle.digest(str(folder)) == digest
    model_card.write(str(folder))
    assert (folder / "README.md").read_text() == text
    with pytest.raises(UserError, match="there is no bundle at"):
        model_card.write(str(tmp_path / "nothing"))


@pytest.mark.s3
def test_a_bundle_in_s3_gets_its_card(tiny_bundle, s3_bucket):
    from raylarge import storage

    there = f"{s3_bucket}/bundles/carded"
    storage.write_bytes(
        f"{there}/model_index.json", Path(tiny_bundle, "model_index.json").read_bytes()
    )
    for name in bundle.PARTS:
        config = Path(tiny_bundle, name, "config.json")
        if config.exists():
            storage.write_bytes(f"{there}/{name}/config.json", config.read_bytes())
    model_card.write(there)
    assert "| unet | UNet2DConditionModel |" in storage.read_bytes(f"{there}/README.md").decode()


def git(folder, *words):
    said = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(
        ["git", "-C", str(folder), *said, *words], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_the_commit_is_the_working_tree_s(tmp_path, monkeypatch):
    released = f"raylarge {version('raylarge')}"
    module = tmp_path / "raylarge" / "models" / "card.py"
    module.parent.mkdir(parents=True)
    module.write_text("one")
    monkeypatch.setattr(model_card, "__file__", str(module))
    assert model_card.commit() == released  # nobody's repository
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "one")
    git(tmp_path, "tag", "v1")
    commit = git(tmp_path, "rev-parse", "HEAD")[:12]
    assert model_card.commit() == commit
    module.write_text("two")
    assert model_card.commit() == f"{commit}-dirty"
    inside = tmp_path / "site" / "raylarge" / "models" / "card.py"
    monkeypatch.setattr(model_card, "__file__", str(inside))
    inside.parent.mkdir(parents=True)
    assert model_card.commit() == released  # installed into somebody else's


@pytest.mark.parametrize(
    "error", [FileNotFoundError("git"), subprocess.TimeoutExpired("git", 10)], ids=["none", "slow"]
)
def test_git_that_fails_stops_nobody(monkeypatch, error):
    def fail(*words, **options):
        raise error

    monkeypatch.setattr(subprocess, "run", fail)
    assert model_card.commit() == f"raylarge {version('raylarge')}"
