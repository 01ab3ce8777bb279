"""Checkpoints are whole or absent, on a disk and in S3, whoever is killed while he writes."""

import itertools
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import servers
import torch
import toy

from raylarge import storage
from raylarge.errors import UserError
from raylarge.storage import files
from raylarge.train import checkpoint
from raylarge.train.async_checkpoint import AsyncCheckpointer
from raylarge.train.checkpoint import Checkpoints
from raylarge.train.launch import Train, train
from raylarge.train.state import StoredState, TrainState

machine, store = servers.machine, servers.store  # fixtures


def save(checkpoints, step, score=None):
    with checkpoints.scratch() as folder:
        Path(folder, "weights").write_text(str(step))
        Path(folder, "more").write_text(str(step))
        checkpoints.put(step, 0, folder)
        checkpoints.commit(step, 1, {"score": score})
        checkpoints.prune()


def opened(root, keep=1, attempt="0"):
    checkpoints = Checkpoints(root, keep, attempt)
    checkpoints.claim()
    return checkpoints


def said(saver):
    with pytest.raises(UserError) as error:
        saver.wait()
    assert saver.problem() == str(error.value)
    saver._future = None  # the loop starts no other write after this error
    return str(error.value)


def newest_step(checkpoints):
    found = checkpoints.newest()
    return None if found is None else found.facts["step"]


@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_a_failure_at_any_write_leaves_the_old_or_the_new_whole(kind, tmp_path, monkeypatch):
    root = str(tmp_path / "run") if kind == "disk" else f"memory://{tmp_path.name}/run"
    checkpoints = opened(root)
    save(checkpoints, 1)
    for fatal in itertools.count():
        calls = itertools.count()
        with monkeypatch.context() as patch:
            for place, name in ((files, "write_bytes"), (storage, "put_file")):
                patch.setattr(place, name, dies_at(fatal, calls, getattr(place, name)))
            try:
                save(checkpoints, fatal + 2)
            except KeyboardInterrupt:
                survived = False
            else:
                survived = True
        newest = checkpoints.newest()
        step = newest.facts["step"]
        assert step == fatal + 2 if survived else step in (1, fatal + 2)
        with checkpoints.fetch(newest) as folder:
            assert Path(folder, "weights").read_text() == Path(folder, "more").read_text()
            assert step == int(Path(folder, "more").read_text())
        if survived:
            break
        checkpoints.clear()
        save(checkpoints, 1)
    assert fatal >= 4


def dies_at(fatal, calls, work):
    def maybe(*arguments):
        if next(calls) == fatal:
            raise KeyboardInterrupt
        return work(*arguments)

    return maybe


SAVING = """
    import sys, torch
    from raylarge.train.checkpoint import Checkpoints
    from raylarge.train.async_checkpoint import AsyncCheckpointer
    from raylarge.train.state import TrainState

    root, attempt = sys.argv[1:]
    checkpoints = Checkpoints(root, 2, attempt)
    checkpoints.claim()
    found = checkpoints.newest()
    checkpoints.clear()
    step = found.facts["step"] if found else 0
    saver = AsyncCheckpointer(checkpoints, 0, 1)
    print("begun", flush=True)
    while True:
        step += 1
        tensors = {f"weights/{i}": torch.full((40_000,), float(step)) for i in range(8)}
        state = TrainState(tensors, step, step)
        saver.begin(step, state, {"loss.csv": str(step)}, {"score": -step})
"""


@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_the_newest_whole_checkpoint_is_found_after_any_kill(tmp_path, kills):
    """SIGKILL at random moments of saving without end; each life goes on from the one before."""
    root, steps, chance = str(tmp_path), [0], random.Random(5)
    for life in range(kills):
        command = [sys.executable, "-c", textwrap.dedent(SAVING), root, str(life)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout.readline() == b"begun\n"
            time.sleep(chance.uniform(0.01, 0.3))
            process.send_signal(signal.SIGKILL)
        found = Checkpoints(root, 2).newest()
        if found is None:
            assert steps == [0]
            continue
        with Checkpoints(root, 2).fetch(found) as folder:
            stored, step = StoredState(folder), found.facts["step"]
            assert stored.updates == stored.averaged == step
            assert all(stored[f"weights/{i}"].eq(step).all() for i in range(8))
            assert (folder / "loss.csv").read_text() == str(step)
        steps.append(step)
    assert steps == sorted(steps)
    assert steps[-1] >= kills // 2
    checkpoints = opened(root, keep=2)
    checkpoints.clear()
    assert len(list(tmp_path.glob("step-*"))) <= 3
    assert not list(tmp_path.glob(".beside-*"))


def test_a_state_that_is_not_finite_is_refused_by_name(tmp_path):
    tensors = {"weights/a": torch.ones(3), "weights/b": torch.tensor([1.0, torch.nan])}
    TrainState(tensors, updates=1).write(tmp_path, rank=0)
    stored = StoredState(tmp_path)
    assert stored["weights/a"].tolist() == [1, 1, 1]
    with pytest.raises(UserError, match=r"weights/b holds NaN .*remove that folder to go on from"):
        stored["weights/b"]


def test_checkpoints_in_s3(s3_bucket):
    root = f"{s3_bucket}/runs/one"
    checkpoints = opened(root, keep=2)
    assert checkpoints.newest() is None
    for step in (1, 2, 3):
        save(checkpoints, step)
    assert newest_step(checkpoints) == 3
    storage.write_bytes(f"{root}/step-00000003-0/more", b"other")
    assert newest_step(checkpoints) == 2
    checkpoints.clear()
    assert storage.children(root, "step-*") == [f"{root}/step-00000002-0"]
    with checkpoints.fetch(checkpoints.newest()) as folder:
        assert Path(folder, "weights").read_text() == "2"


def test_the_best_stays_beside_the_newest(tmp_path):
    checkpoints = opened(str(tmp_path))
    for step, score in ((1, 0.5), (2, 0.1), (3, 0.4), (4, None)):
        save(checkpoints, step, score)
    assert checkpoints.best().facts["step"] == 2
    assert newest_step(checkpoints) == 4
    assert len(list(tmp_path.glob("step-*"))) == 2


def test_one_run_at_a_time(tmp_path):
    first = opened(str(tmp_path), attempt="first")
    save(first, 1)
    second = opened(str(tmp_path), attempt="second")
    with pytest.raises(UserError, match="another run has taken"):
        save(first, 2)
    assert newest_step(second) == 1
    save(second, 2)
    assert newest_step(second) == 2
    second.check_shared()
    with pytest.raises(UserError, match="must share the storage"):
        first.check_shared()


def test_a_rank_that_writes_nothing_is_waited_for_and_then_named(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARED_S", 0.2)
    checkpoints = opened(str(tmp_path))
    with checkpoints.scratch() as folder:
        Path(folder, "weights").write_text("1")
        checkpoints.put(1, 0, folder)
    with pytest.raises(UserError, match="files of rank 1 do not show"):
        checkpoints.commit(1, 2, {})
    assert checkpoints.newest() is None


def test_saving_goes_on_in_the_background_and_failures_are_told(tmp_path, monkeypatch):
    checkpoints = opened(str(tmp_path))
    saver = AsyncCheckpointer(checkpoints, 0, 1)
    state = TrainState({"weights/a": torch.ones(3)}, 4, 0)
    saver.begin(1, state, {"loss.csv": "one"}, {"score": None})
    saver.wait()
    assert newest_step(checkpoints) == 1
    assert (tmp_path / "loss.csv").read_text() == "one"

    def full(*_):
        raise UserError("a path: No space left on device; make room.")

    with monkeypatch.context() as patch:  # what comes after the commit takes nothing back
        patch.setattr(Checkpoints, "show", full)
        saver.begin(2, state, {"loss.csv": "two"}, {"score": None})
        assert "No space left" in said(saver)
    assert newest_step(checkpoints) == 2
    monkeypatch.setattr(storage, "put_file", full)
    saver.begin(3, state, {"loss.csv": "three"}, {"score": None})
    assert "No space left" in said(saver)
    saver.close()
    assert newest_step(checkpoints) == 2
    assert not list(tmp_path.glob("step-00000003*"))
    assert (tmp_path / "loss.csv").read_text() == "one"


@pytest.mark.s3
def test_a_store_that_fails_for_good_leaves_the_last_checkpoint(store, tmp_path):
    """The line to S3 breaks while a run saves; another life goes on when it is there again."""
    toy.write_latents(tmp_path)
    config = Train(
        model="ldm",
        data=str(tmp_path),
        out=f"{store.root}/bundle",
        steps=20,
        batch=8,
        checkpoint_every=5,
        log_every=1,
        track="none",
    )
    down = toy.Toy(before={13 * 8: store.line.down}, local=str(tmp_path))
    with pytest.raises(UserError, match="see that the server"):
        train(config, down)
    store.line.up()
    last = newest_step(Checkpoints(config.run.folder, 2))
    assert last in (5, 10)  # the one of step 10 was perhaps still being written
    assert train(config, toy.Toy(local=str(tmp_path)))["resumed_from"] == last


@pytest.mark.s3
def test_a_store_that_comes_back_is_waited_for(store, tmp_path):
    toy.write_latents(tmp_path)
    config = Train(
        model="ldm",
        data=str(tmp_path),
        out=f"{store.root}/bundle",
        steps=20,
        batch=8,
        checkpoint_every=5,
        log_every=1,
        track="none",
    )

    def blink():
        store.line.down()
        threading.Timer(1.0, store.line.up).start()

    facts = train(config, toy.Toy(before={13 * 8: blink}, local=str(tmp_path)))
    assert (facts["step"], facts["resumed_from"]) == (20, None)
    assert newest_step(Checkpoints(config.run.folder, 2)) == 20
