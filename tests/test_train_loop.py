"""Law 6: 20 steps are 10 + kill + 10; checkpoints are whole or absent; time and NaN are bounded."""

import csv
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toy

from raylarge import storage
from raylarge.errors import UserError
from raylarge.storage import files
from raylarge.train import launch
from raylarge.train.checkpoint import Checkpoints
from raylarge.train.launch import Train, run_folder, train

STEPS, BATCH = 20, 8


@pytest.fixture
def config(tmp_path):
    toy.write_latents(tmp_path / "data")
    return Train(
        model="ldm",
        data=str(tmp_path / "data"),
        out=str(tmp_path / "out"),
        steps=STEPS,
        batch=BATCH,
        lr=1e-2,
        warmup=4,
        schedule="cosine",
        checkpoint_every=5,
        log_every=1,
    )


def losses(facts):
    with open(facts["loss_csv"]) as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def weights(config):
    return torch.load(Path(config.out, "toy", "weights.pt"))


def test_twenty_steps_are_ten_and_a_crash_and_ten(config, tmp_path):
    whole = train(config, toy.Toy())
    broken = replace(config, out=str(tmp_path / "broken"))
    with pytest.raises(RuntimeError, match="told to fail"):
        train(broken, toy.Toy(fatal_sample=12 * BATCH, fatal_once="raise"))
    resumed = train(broken, toy.Toy())
    assert (whole["resumed_from"], resumed["resumed_from"]) == (None, 10)
    assert resumed["step"] == STEPS
    assert len(losses(whole)) == STEPS
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-6)
    torch.testing.assert_close(weights(broken), weights(config), atol=1e-6, rtol=0)
    assert weights(config)["n"] >= launch.STATISTICS


def test_the_micro_batches_do_not_matter(config, tmp_path):
    one = train(config, toy.Toy())
    other = replace(config, out=str(tmp_path / "other"), accumulation=4)
    assert losses(train(other, toy.Toy())) == pytest.approx(losses(one), abs=1e-6)


def test_a_finished_run_is_not_done_again_and_can_be_made_longer(config):
    first = train(config, toy.Toy())
    assert train(config, toy.Toy(fatal_sample=0, fatal_once="raise")) == first
    longer = train(replace(config, steps=STEPS + 3), toy.Toy())
    assert (longer["resumed_from"], longer["step"]) == (STEPS, STEPS + 3)


@pytest.mark.parametrize(("key", "value"), [("lr", 0.5), ("seed", 9), ("batch", 4), ("zero", 2)])
def test_a_run_is_not_mixed_with_another(config, key, value):
    train(config, toy.Toy())
    other = replace(config, steps=STEPS + 1, **{key: value})
    if key == "zero":  # of no meaning to the local twin
        assert train(other, toy.Toy())["step"] == STEPS + 1
        return
    with pytest.raises(UserError, match=rf"{key}=.*, not {value}"):
        train(other, toy.Toy())


def test_a_run_is_not_mixed_with_other_data(config, tmp_path):
    train(config, toy.Toy())
    toy.write_latents(tmp_path / "new", seed=1)
    with pytest.raises(UserError, match="other data"):
        train(replace(config, steps=30, data=str(tmp_path / "new")), toy.Toy())


def test_time_ends_a_run(config):
    facts = train(replace(config, steps=10**9, minutes=2 / 60), toy.Toy())
    assert 2 <= facts["seconds"] < 20
    with open(facts["loss_csv"]) as file:
        rates = [float(row["lr"]) for row in csv.DictReader(file)]
    assert max(rates) > 0.6e-2
    assert rates[-1] < 0.1e-2  # the cosine ends with the time
    more = train(replace(config, steps=10**9, minutes=4 / 60), toy.Toy())
    assert more["resumed_from"] == facts["step"]


def test_bad_steps_are_skipped_and_counted(config):
    facts = train(config, toy.Toy(poison=(3 * BATCH, 7 * BATCH + 1)))
    assert (facts["step"], facts["skipped"]) == (STEPS, 2)
    assert all(value.isfinite().all() for value in weights(config)["network"].values())


def test_too_many_bad_steps_end_the_run(config):
    poison = tuple(range(8 * BATCH, STEPS * BATCH))
    with pytest.raises(UserError, match=r"4 steps running.*samples 64 to 95.*lower lr"):
        train(replace(config, patience=4), toy.Toy(poison=poison))
    assert Checkpoints(run_folder(config), 2).newest() == 10
    assert train(config, toy.Toy())["resumed_from"] == 10


def test_a_broken_checkpoint_is_passed_over(config):
    facts = train(config, toy.Toy())
    kept = sorted(path.name for path in Path(run_folder(config)).glob("step-*"))
    assert kept == ["step-00000015", "step-00000020"]
    Path(run_folder(config), "facts.json").unlink()
    Path(run_folder(config), "step-00000020", "torch.pt").write_bytes(b"cut short")
    again = train(config, toy.Toy())
    assert again["resumed_from"] == 15
    assert losses(again) == pytest.approx(losses(facts), abs=1e-6)


@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_a_kill_while_saving_leaves_the_old_or_the_new_whole(kind, tmp_path, monkeypatch):
    root = str(tmp_path / "run") if kind == "disk" else f"memory://{tmp_path.name}/run"
    checkpoints = Checkpoints(root, keep=1)
    save(checkpoints, 1)
    for fatal in itertools.count():
        calls = itertools.count()
        with monkeypatch.context() as patch:
            for place, name in ((files, "write_bytes"), (Checkpoints, "_place")):
                patch.setattr(place, name, dies_at(fatal, calls, getattr(place, name)))
            try:
                save(checkpoints, fatal + 2)
            except KeyboardInterrupt:
                survived = False
            else:
                survived = True
        newest = checkpoints.newest()
        assert newest == fatal + 2 if survived else newest in (1, fatal + 2)
        with checkpoints.fetch(newest) as (folder, facts):
            assert Path(folder, "a", "weights").read_text() == Path(folder, "more").read_text()
            assert facts["step"] == newest == int(Path(folder, "more").read_text())
        if survived:
            break
        checkpoints.forget_after(1)
        save(checkpoints, 1)
    assert fatal >= 4


def test_checkpoints_in_s3(s3_bucket):
    checkpoints = Checkpoints(f"{s3_bucket}/runs/one", keep=2)
    assert checkpoints.newest() is None
    for step in (1, 2, 3):
        save(checkpoints, step)
    assert checkpoints.newest() == 3
    storage.write_bytes(f"{s3_bucket}/runs/one/step-00000003/more", b"other")
    assert checkpoints.newest() == 2
    checkpoints.forget_after(2)
    assert storage.listing(f"{s3_bucket}/runs/one/step-*/more") == [
        f"{s3_bucket}/runs/one/step-00000002/more"
    ]
    with checkpoints.fetch(2) as (folder, _):
        assert Path(folder, "a", "weights").read_text() == "2"


def save(checkpoints, step):
    with checkpoints.scratch() as folder:
        Path(folder, "a").mkdir()
        Path(folder, "a", "weights").write_text(str(step))
        Path(folder, "more").write_text(str(step))
        checkpoints.put(step, 0, folder)
        checkpoints.commit(step, 1, {"loss": None})


def dies_at(fatal, calls, work):
    def maybe(*arguments):
        if next(calls) == fatal:
            raise KeyboardInterrupt
        return work(*arguments)

    return maybe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "gan"}, "choose one of: vae, ldm, cdm"),
        ({"precision": "fp16"}, "fp32, bf16"),
        ({"batch": 9, "accumulation": 2}, "batch=10 does"),
        ({"checkpoint_every": 0}, "1 or more"),
        ({"data": "/nowhere"}, "train one with python jobs/train.py"),
        ({"model": "vae", "data": "/nowhere", "workers": 2}, "jobs/prepare.py"),
    ],
)
def test_a_config_that_cannot_be_is_refused_at_once(config, change, message):
    with pytest.raises(UserError, match=message):
        train(replace(config, **change), toy.Toy())
