"""What is damaged, foreign or replaced is one sentence that names it, and costs nothing else."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import toy

from raylarge import config as config_of
from raylarge import storage
from raylarge.errors import UserError
from raylarge.models import bundle as bundles
from raylarge.models.light_autoencoder import LightAutoencoder
from raylarge.train.checkpoint import Checkpoints
from raylarge.train.launch import Train, train


@pytest.fixture
def config(tmp_path):
    toy.write_latents(tmp_path / "data")
    where = {"data": str(tmp_path / "data"), "out": str(tmp_path / "out")}
    return Train(model="ldm", steps=4, batch=4, checkpoint_every=2, track="none", **where)


@pytest.mark.parametrize("name", ["state-0.safetensors", "loss.csv"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(config, name):
    train(config, toy.Toy())
    root = Path(config.run.folder)
    newest = root / Checkpoints(str(root), 2).newest().name
    content = bytearray((newest / name).read_bytes())
    content[8:20] = b"\xff" * 12
    (newest / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{newest.name} in .* is damaged .*; remove it"):
        train(replace(config, steps=5), toy.Toy())
    shutil.rmtree(newest)
    facts = train(replace(config, steps=5), toy.Toy())
    assert (facts["resumed_from"], facts["step"]) == (2, 5)


@pytest.mark.parametrize("document", [[], {}, {"step": 4}])
def test_a_commit_that_says_nothing_is_none(config, document):
    train(config, toy.Toy())
    root = config.run.folder
    newest = Checkpoints(root, 2).newest().name
    storage.write_json(f"{root}/{newest}/checkpoint.json", document)
    assert train(replace(config, steps=5), toy.Toy())["resumed_from"] == 2


@pytest.mark.parametrize("document", [[], {}, {"step": 4}])
def test_facts_that_say_nothing_are_made_again(config, document):
    train(config, toy.Toy())
    path = f"{config.run.folder}/facts.json"
    storage.write_json(path, document)
    assert train(config, toy.Toy())["resumed_from"] == 4
    assert storage.read_json(path)["step"] == 4


def test_what_differs_is_named_and_checkpoints_of_nobody_are_not_taken(config):
    train(config, toy.Toy())
    summarizer = replace(config.ldm.summarizer, layers=2)
    other = replace(config, ldm=replace(config.ldm, summarizer=summarizer))
    with pytest.raises(UserError, match=r"trained with ldm\.summarizer\.layers=12, not 2; give"):
        train(other, toy.Toy())
    Path(config.run.folder, "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json does not say what the checkpoints beside"):
        train(replace(config, steps=5), toy.Toy())


def test_a_finished_bundle_that_was_copied_tells_its_own_place(config, tmp_path):
    train(config, toy.Toy())
    shutil.copytree(config.out, tmp_path / "copy")
    facts = train(replace(config, out=str(tmp_path / "copy")), toy.Toy())
    assert facts["loss_csv"] == f"{tmp_path}/copy/.train/ldm/loss.csv"


def test_no_bundle_is_made_of_no_step(config):
    with pytest.raises(UserError, match="were over before the first step"):
        train(replace(config, minutes=1e-9), toy.Toy())
    out = str(Path(config.out).with_name("nan"))
    with pytest.raises(UserError, match="none of 4 steps had a finite loss"):
        train(replace(config, out=out), toy.Toy(poison=tuple(range(1000))))
    assert not Path(config.out, "toy").exists()
    assert not Path(out, "toy").exists()


def test_more_held_out_samples_than_there_are_is_all_of_them(config):
    toy.write_latents(config.data, counts=(4, 4, 4), split="val", seed=7)
    facts = train(replace(config, validate=10**9, log_every=1), toy.Toy())
    assert facts["best_step"] in (2, 4)


def test_parts_that_stand_on_a_replaced_one_are_named(tiny_bundle, tmp_path):
    out = str(tmp_path / "bundle")
    shutil.copytree(tiny_bundle, out)
    for model, part in bundles.MAIN_PART.items():
        if part in storage.read_json(f"{out}/model_index.json"):
            on = bundles.digest(out, bundles.TRAINED_ON[model])
            bundles.save(out, {}, {model: {"on": on}})
            assert part in bundles.load(out).__dict__
    assert bundles.mismatched_parts(out) == {}
    bundles.save(out, {"vae": LightAutoencoder(width=8, blocks=1)}, {})
    assert set(bundles.mismatched_parts(out)) == {"unet"}
    with pytest.raises(UserError, match=r"unet in .* was trained on another vae than there is now"):
        bundles.load(out)


def test_models_know_what_they_were_trained_on(tmp_path):
    """Through `train`, every model in turn; then another autoencoder, and all is refused."""
    out, data = str(tmp_path / "bundle"), str(tmp_path / "data")
    codec = {"width": 8, "blocks": 1}
    bundles.save(out, {"vae": LightAutoencoder(factor=2, **codec)}, {"patch_px": 8})
    toy.write_examples(data, counts=(6, 4))
    toy.write_latents(data, counts=(6, 4), name=f"latents-{bundles.digest(out, ('vae',))}")
    short = {"data": data, "out": out, "steps": 1, "batch": 4, "track": "none"}
    unet = {"channels": [16, 16], "attention": [False, True], "layers": 1, "groups": 8, "heads": 2}
    sizes = {
        "ldm": {"unet": unet, "summarizer": {"width": 16, "layers": 1, "heads": 2}},
        "cdm": {"width": 16, "depth": 1, "heads": 2, "standardised": True},
        "controlnet": {"factors": [2]},
        "vae": {"distill": True, **codec},
    }
    for model, its in sizes.items():
        train(config_of.build(Train, short, {"model": model, model: its}))
    told = {model: bundles.facts(out)[model]["on"] for model in bundles.TRAINED_ON}
    assert told == {
        model: bundles.digest(out, parts) for model, parts in bundles.TRAINED_ON.items()
    }
    assert bundles.load(out).cdm.shift.any()
    bundles.save(out, {"vae": LightAutoencoder(factor=2, **codec)}, {})
    assert set(bundles.mismatched_parts(out)) == {"unet", "vae_small"}
    with pytest.raises(UserError, match=r"vae_small in .* was trained on another vae"):
        bundles.load(out)


def test_what_a_model_is_trained_on_stays_while_it_trains(config):
    class Replacing(toy.Toy):
        """Somebody else puts another autoencoder there on the way."""

        def __call__(self, its_config, facts):
            path = Path(its_config.run.folder, "config.json")
            path.write_text(json.dumps(json.loads(path.read_text()) | {"on": "another"}))
            return super().__call__(its_config, facts)

    with pytest.raises(UserError, match=r"vae in .*: not what .* was trained on"):
        train(config, Replacing())
    assert not Path(config.out, "toy").exists()


def test_a_full_disk_while_a_part_is_written_is_a_sentence(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(self, folder):
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr(LightAutoencoder, "save_pretrained", full)
    with pytest.raises(UserError, match=r"vae could not be written .*No space left.*; make room"):
        bundles.save(str(tmp_path / "b"), {"vae": LightAutoencoder(width=8, blocks=1)}, {})


def break_commit(newest, content):
    Path(newest, "checkpoint.json").write_bytes(content)


def break_size(newest, _):
    path = Path(newest, "state-0.safetensors")
    path.write_bytes(path.read_bytes()[:-9])


def lose_file(newest, _):
    Path(newest, "skipped.csv").unlink()


@pytest.mark.parametrize(
    ("damage", "content", "said"),
    [
        (break_commit, b"", r"checkpoint\.json \(0 bytes\) is empty, cut short or no commit"),
        (break_commit, b'{"step": 4, "fi', "cut short or no commit"),
        (break_commit, b"\x00" * 300, "cut short or no commit"),
        (break_commit, b'{"step": "x", "files": {"a": 1}}', "cut short or no commit"),
        (break_commit, b'{"step": 4, "files": {}}', "cut short or no commit"),
        (break_size, b"", r"state-0\.safetensors has \d+ bytes instead of \d+"),
        (lose_file, b"", r"skipped\.csv is missing"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_with_a_sentence(config, capsys, damage, content, said):
    train(config, toy.Toy())
    root = Path(config.run.folder)
    newest = root / Checkpoints(str(root), 2).newest().name
    damage(newest, content)
    capsys.readouterr()
    facts = train(replace(config, steps=5), toy.Toy())
    assert (facts["resumed_from"], facts["step"]) == (2, 5)
    line = next(line for line in capsys.readouterr().out.splitlines() if newest.name in line)
    assert re.search(rf"damaged and is passed over: .*{said}; training resumes from step 2", line)


def test_no_whole_checkpoint_means_a_new_start_that_is_announced(config, capsys):
    train(config, toy.Toy())
    for path in Path(config.run.folder).glob("step-*/checkpoint.json"):
        path.write_bytes(b"")
    capsys.readouterr()
    assert train(config, toy.Toy())["resumed_from"] is None
    assert capsys.readouterr().out.count("no other is whole, so training starts anew.") == 2


@pytest.mark.parametrize("name", ["facts.json", "owner.json", "status.json"])
def test_a_damaged_file_that_is_written_anew_anyway_costs_nothing(config, name):
    train(config, toy.Toy())
    Path(config.run.folder, name).write_bytes(b"")
    assert train(replace(config, steps=5), toy.Toy())["step"] == 5


def test_a_damaged_record_is_a_sentence(config):
    train(config, toy.Toy())
    Path(config.run.folder, "config.json").write_bytes(b"")
    with pytest.raises(UserError, match=r"does not say what .* were trained with; bring it back"):
        train(replace(config, steps=5), toy.Toy())
