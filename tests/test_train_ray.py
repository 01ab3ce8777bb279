"""Ray equivalence, and resume equivalence after a killed worker."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toy

from raylarge.errors import UserError
from raylarge.train.launch import Train, train

STEPS, BATCH = 20, 8

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """The config of a finished local run and the loss of each of its steps."""
    folder = tmp_path_factory.mktemp("twin")
    toy.write_latents(folder / "data")
    config = Train(
        model="ldm",
        data=str(folder / "data"),
        out=str(folder / "out"),
        steps=STEPS,
        batch=BATCH,
        lr=1e-2,
        warmup=4,
        checkpoint_every=5,
        log_every=1,
        track="none",
    )
    return config, losses(train(config, toy.Toy()))


@pytest.fixture(autouse=True)
def _toy_travels(ray_session):
    ray_session.cloudpickle.register_pickle_by_value(toy)
    yield
    ray_session.cloudpickle.unregister_pickle_by_value(toy)


def losses(facts):
    with open(facts["loss_csv"]) as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def weights(config):
    return torch.load(Path(config.out, "toy", "weights.pt"))


ENGINES = [{"strategy": "torch"}] + [{"zero": zero} for zero in range(4)]
SLOW = pytest.mark.slow  # one engine each way is enough for every day


@pytest.mark.parametrize(
    "engine", [pytest.param(one, marks=[] if one.get("zero") == 2 else SLOW) for one in ENGINES]
)
def test_two_workers_one_killed_are_the_local_twin(twin, tmp_path, engine):
    config, expected = twin
    seen = tmp_path / "seen"
    seen.mkdir()
    mine = replace(
        config, workers=2, out=str(tmp_path / "out"), logs=str(tmp_path / "logs"), **engine
    )
    fatal = toy.Toy(
        seen=str(seen), fatal_sample=12 * BATCH + 5, fatal_once=str(tmp_path / "killed")
    )
    facts = train(mine, fatal)
    assert facts["resumed_from"] in (5, 10)
    assert losses(facts) == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(weights(mine), weights(config), atol=1e-5, rtol=0)

    samples = [sorted(map(int, file.read_text().split())) for file in seen.iterdir()]
    assert len(samples) == 4  # two workers, and two after the kill
    assert {sample for some in samples for sample in some} == set(range(STEPS * BATCH))
    one, other = (some for some in samples if some[0] < BATCH)
    assert not set(one) & set(other)
    assert {path.name for path in (tmp_path / "logs").iterdir()} >= {"train-ldm-rank0.log"}


def test_others_go_on_under_ray_from_where_the_twin_stopped(twin, tmp_path):
    config, expected = twin
    mine = replace(config, out=str(tmp_path / "out"))
    train(replace(mine, steps=10), toy.Toy())
    facts = train(replace(mine, workers=2, strategy="torch", steps=15), toy.Toy())
    assert facts["resumed_from"] == 10
    facts = train(replace(mine, workers=2, zero=3, sheet_every=18), toy.Toy(pictures=True))
    assert facts["resumed_from"] == 15
    sheets = sorted(path.name for path in Path(mine.run.folder, "sheets").iterdir())
    assert sheets == ["step-00000018.png", "step-00000020.png"]  # by tasks of their own
    assert losses(facts) == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(weights(mine), weights(config), atol=1e-5, rtol=0)


def test_what_a_user_can_mend_is_not_tried_again(twin, tmp_path):
    config, _ = twin
    poison = toy.Toy(poison=tuple(range(5 * BATCH, STEPS * BATCH)))
    with pytest.raises(UserError, match="3 steps running"):
        train(replace(config, out=str(tmp_path), workers=1, patience=3), poison)


def test_workers_that_keep_failing_are_given_up_with_a_sentence(twin, tmp_path):
    config, _ = twin
    mine = replace(config, out=str(tmp_path), workers=1, max_failures=0)
    with pytest.raises(UserError, match=r"the toy was told to fail.*the last checkpoint is kept"):
        train(mine, toy.Toy(fatal_sample=50, fatal_once="raise"))
    assert "RuntimeError" in Path(mine.run.folder, "error.txt").read_text()
