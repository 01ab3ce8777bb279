"""Resume equivalence: 20 steps are 10 + kill + 10; atomic checkpoints; limits of time and NaN."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toy

from raylarge import storage
from raylarge.errors import UserError
from raylarge.train import launch, preemption
from raylarge.train.checkpoint import Checkpoints
from raylarge.train.launch import Train, train
from raylarge.train.state import StoredState
from raylarge.train.tasks.ldm import LdmConfig
from raylarge.train.worker import STATISTICS

STEPS, BATCH = 20, 8
INF, NAN = float("inf"), float("nan")


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
        track="none",
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
    assert weights(config)["n"] >= STATISTICS


def test_the_micro_batches_do_not_matter(config, tmp_path):
    one = train(config, toy.Toy())
    other = replace(config, out=str(tmp_path / "other"), micro_batch=3)
    assert losses(train(other, toy.Toy())) == pytest.approx(losses(one), abs=1e-6)


def test_a_finished_run_is_not_done_again_and_can_be_made_longer(config):
    first = train(config, toy.Toy())
    assert train(config, toy.Toy(fatal_sample=0, fatal_once="raise")) == first
    elsewhere = replace(config, data=f"{config.data}/none")  # what is finished knows its data
    with pytest.raises(UserError, match=r"jobs/prepare\.py"):
        train(elsewhere, toy.Toy())
    longer = train(replace(config, steps=STEPS + 3), toy.Toy())
    assert (longer["resumed_from"], longer["step"]) == (STEPS, STEPS + 3)


@pytest.mark.parametrize(("key", "value"), [("lr", 0.5), ("seed", 9), ("batch", 4)])
def test_a_run_is_not_mixed_with_another(config, key, value):
    train(config, toy.Toy())
    other = replace(config, steps=STEPS + 1, **{key: value})
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
    with pytest.raises(UserError, match=r"4 steps running.*samples 64 to 95.*a lower lr"):
        train(replace(config, patience=4), toy.Toy(poison=poison))
    assert Checkpoints(config.run.folder, 2).newest().facts["step"] == 10
    assert train(config, toy.Toy())["resumed_from"] == 10


def test_a_spike_is_skipped_and_told(config):
    # The loss falls, then samples are a hundred times as noisy for two steps.
    loud = tuple(range(70 * BATCH, 72 * BATCH))
    facts = train(replace(config, steps=80, spike=3.0), toy.Toy(loud=loud))
    assert facts["skipped"] == 2
    with Path(config.run.folder, "skipped.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == facts["skipped"]
    assert [(row["step"], row["why"]) for row in rows] == [("71", "spike"), ("72", "spike")]
    samples = range(int(rows[0]["first_sample"]), int(rows[0]["last_sample"]) + 1)
    assert samples == range(70 * BATCH, 71 * BATCH)
    assert set(map(int, rows[0]["worst"].split())) <= set(samples)


def test_held_out_samples_are_told_and_the_best_is_kept(config):
    toy.write_latents(config.data, counts=(4, 4, 4), split="val", seed=7)
    facts = train(replace(config, steps=60, lr=0.3, clip=0.0, keep=1, validate=5), toy.Toy())
    with open(facts["loss_csv"]) as file:
        held = {int(row["step"]): float(row["val"]) for row in csv.DictReader(file) if row["val"]}
    assert set(held) == set(range(5, 61, 5))
    assert (facts["best_step"], facts["best_loss"]) == min(held.items(), key=lambda one: one[1])
    checkpoints = Checkpoints(config.run.folder, 1)
    assert checkpoints.newest().facts["step"] == 60
    assert checkpoints.best().facts["step"] == facts["best_step"] < 60
    kept = list(Path(config.run.folder).glob("step-*"))
    assert len(kept) == 2


@pytest.mark.parametrize("result", ["last", "best"])
def test_the_bundle_is_of_the_last_or_of_the_best_checkpoint(config, result):
    toy.write_latents(config.data, counts=(4, 4, 4), split="val", seed=7)
    config = replace(config, steps=60, lr=0.3, clip=0.0, validate=5, result=result)
    facts = train(config, toy.Toy())
    checkpoints = Checkpoints(config.run.folder, 2)
    found = {"last": checkpoints.newest(), "best": checkpoints.best()}
    assert found["best"].facts["step"] < found["last"].facts["step"] == 60
    assert facts["result_step"] == found[result].facts["step"]
    with checkpoints.fetch(found[result]) as folder:
        stored = StoredState(folder)
        for name, value in weights(config)["network"].items():
            assert torch.equal(value, stored[f"weights/{name}"])
        for name, value in weights(config)["averaged"].items():
            assert torch.equal(value, stored[f"average/body.{name}"])
    assert train(config, toy.Toy())["result_step"] == facts["result_step"]
    other = replace(config, result="best" if result == "last" else "last")
    again = train(other, toy.Toy())
    assert (again["step"], again["result_step"] != facts["result_step"]) == (60, True)


def test_time_asks_for_checkpoints_too(config):
    train(replace(config, checkpoint_every=1000, checkpoint_minutes=0.0, keep=100), toy.Toy())
    assert len(list(Path(config.run.folder).glob("step-*"))) == STEPS


def test_who_is_preempted_saves_first(config, tmp_path, monkeypatch):
    monkeypatch.setattr(preemption, "NOTICE_S", 0.0)
    going = toy.Toy(fatal_sample=12 * BATCH, fatal_once=str(tmp_path / "told"), fatal="SIGTERM")
    with pytest.raises(UserError, match=r"saved at step 1[34]; the same command goes on"):
        train(replace(config, checkpoint_every=1000), going)
    assert train(config, toy.Toy())["resumed_from"] in (13, 14)


def test_what_a_run_leaves(config):
    facts = train(replace(config, track="tensorboard", sheet_every=12), toy.Toy(pictures=True))
    root = Path(config.run.folder)
    assert {path.name for path in root.iterdir()} >= {
        "loss.csv",
        "skipped.csv",
        "curve.png",
        "report.json",
        "facts.json",
        "config.json",
        "events",
    }
    assert storage.read_json(f"{root}/report.json")["step"] == facts["step"]
    assert [path.name for path in sorted((root / "sheets").iterdir())] == [
        "step-00000012.png",
        "step-00000020.png",
    ]


def test_a_broken_checkpoint_is_passed_over(config):
    facts = train(config, toy.Toy())
    kept = sorted(Path(config.run.folder).glob("step-*"))
    assert [path.name[:13] for path in kept] == ["step-00000015", "step-00000020"]
    Path(config.run.folder, "facts.json").unlink()
    Path(kept[-1], "state-0.safetensors").write_bytes(b"cut short")
    again = train(config, toy.Toy())
    assert again["resumed_from"] == 15
    assert losses(again) == pytest.approx(losses(facts), abs=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "gan"}, "choose one of: vae, ldm, cdm"),
        ({"precision": "fp16"}, "fp32, bf16"),
        ({"batch": 2, "workers": 3}, "batch=3 or more"),
        ({"checkpoint_every": 0}, "1 or more"),
        ({"min_workers": 2, "workers": 1}, "from 0 to workers=1"),
        ({"optimizer": "adamw8bit"}, "needs a GPU"),
        ({"optimizer": "adamw8bit", "workers": 2}, "DeepSpeed does not know"),
        ({"track": "paper"}, "tensorboard, wandb, mlflow, none"),
        ({"data": "/nowhere"}, "jobs/prepare.py"),
        ({"minutes": 0.0}, "minutes=0.0 must be above 0"),
        ({"lr": -1.0}, "lr=-1.0 must be above 0"),
        ({"workers": -1}, "workers=-1 must be at least 0"),
        ({"model": "vae", "data": "/nowhere", "workers": 2}, "jobs/prepare.py"),
        ({"max_failures": -5}, "max_failures=-5 must be at least 0"),
        ({"resize_s": -1.0}, "resize_s=-1.0 must be at least 0"),
        ({"sheet_gpus": -1.0}, "sheet_gpus=-1.0 must be at least 0"),
        ({"resize_s": NAN}, "resize_s=nan: it must be finite"),
        ({"lr": INF}, "lr=inf: it must be finite"),
        ({"weight_decay": INF}, "weight_decay=inf: it must be finite"),
        ({"scale_weights": (1.0, INF)}, r"scale_weights=\[1.0,inf\]: it must be finite"),
        ({"ldm": LdmConfig(drop=NAN)}, "ldm.drop=nan: it must be finite"),
        ({"scale_weights": (1e308, 1e308)}, "small enough to be added"),
        ({"seed": -1}, r"seed=-1: it must be from 0 to 2\^63 - 1"),
        ({"seed": 1 << 63}, r"from 0 to 2\^63 - 1"),
        ({"betas": (0.9, 1.0)}, r"betas=\[0.9,1.0\]: it must be two numbers from 0 to below 1"),
        ({"betas": (-0.1, 0.9)}, "two numbers from 0 to below 1"),
        ({"betas": (NAN, 0.9)}, r"betas=\[nan,0.9\]: it must be finite"),
        ({"out": ""}, "out= is empty; name a folder"),
        ({"data": ""}, "data= is empty; name a folder"),
        ({"out": "s3://"}, "out=s3:// names no bucket"),
        ({"data": "s3:///folder"}, "names no bucket"),
    ],
)
def test_a_config_that_cannot_be_is_refused_at_once(config, change, message):
    with pytest.raises(UserError, match=message):
        train(replace(config, **change), toy.Toy())


def test_a_notice_is_heeded_at_once_and_before_its_time_is_over(config, monkeypatch):
    left = [float("inf")] * 3 + [20.0, 15.0, 12.0, 0.5, 0.2, 0.0] + [float("inf")] * 3 + [9.0]

    class Leaving(launch.LocalContext):
        exits_on_preemption = False

        def preemption_s(self):
            return left.pop(0) if left else 9.0

    monkeypatch.setattr(preemption, "NOTICE_S", 0.0)
    monkeypatch.setattr(launch, "LocalContext", Leaving)
    train(replace(config, checkpoint_every=1000, keep=100), toy.Toy())
    names = sorted(path.name for path in Path(config.run.folder).glob("step-*"))
    assert [int(name.split("-")[1]) for name in names] == [3, 6, 12, STEPS]
