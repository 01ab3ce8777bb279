"""One process at a time trains one model into a bundle; different models share a bundle."""

import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import toy

from raylarge import storage
from raylarge.errors import UserError
from raylarge.models import bundle as bundles
from raylarge.models.cdm import CDM
from raylarge.models.light_autoencoder import LightAutoencoder
from raylarge.models.prior import GridPrior
from raylarge.models.summarizer import Summarizer
from raylarge.train import registry
from raylarge.train.launch import Train, train
from raylarge.train.tasks.vae import VaeConfig

SCRIPT = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    sys.path.insert(0, "tests")
    import toy
    from raylarge import report
    from raylarge.train.launch import Train, train
    root, name = sys.argv[1:3]
    Path(root, name).touch()
    while not Path(root, "go").exists():
        time.sleep(0.001)
    sys.argv[1:] = []
    report.entry(lambda _: train(
        Train(model="ldm", data=f"{root}/data", out=f"{root}/out", steps=20, batch=4,
              checkpoint_every=2, track="none"), toy.Toy(pause=0.1)))
    """
)


@pytest.fixture
def config(tmp_path):
    toy.write_latents(tmp_path / "data")
    where = {"data": str(tmp_path / "data"), "out": str(tmp_path / "out")}
    return Train(model="ldm", steps=20, batch=4, checkpoint_every=2, track="none", **where)


def started(root, name):
    words = [sys.executable, "-c", SCRIPT, str(root), name]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_of_two_that_start_at_one_moment_one_is_refused(config, tmp_path):
    both = [started(tmp_path, name) for name in "ab"]
    while not all((tmp_path / name).exists() for name in "ab"):
        time.sleep(0.05)
    (tmp_path / "go").touch()
    answers = [process.communicate(timeout=120) for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 2], answers
    refused = answers[codes.index(2)][1]
    assert "is in use: the training of model=ldm has been writing to it since" in refused
    assert "Traceback" not in refused
    assert storage.read_json(f"{config.run.folder}/facts.json")["step"] == 20


def test_a_killed_one_keeps_nobody_out(config, tmp_path):
    (tmp_path / "go").touch()
    process = started(tmp_path, "a")
    root = Path(config.run.folder)
    while not list(root.glob("step-*/checkpoint.json")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    facts = train(config, toy.Toy())
    assert facts["resumed_from"] >= 2
    assert facts["step"] == 20


def test_another_model_may_train_into_the_same_bundle_meanwhile(config, tmp_path):
    """The same model is refused for as long as a run lasts, others are not."""
    begun, end = threading.Event(), threading.Event()
    toy.write_examples(tmp_path / "images")
    small = VaeConfig(width=8, blocks=1)
    of_images = replace(config, model="vae", data=str(tmp_path / "images"), steps=1, vae=small)

    def late(its_config, facts):
        begun.set()
        end.wait(60)
        return registry.build(its_config.run, facts)

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(train, of_images, late)
        begun.wait(60)
        try:
            with pytest.raises(
                UserError, match=r"\.train/vae is in use: the training of model=vae"
            ):
                train(of_images)
            assert train(config, toy.Toy())["step"] == 20
        finally:
            end.set()
        assert first.result()["step"] == 1
    assert bundles.load_autoencoder(config.out)


def test_parts_that_are_saved_at_one_moment_are_all_there(tmp_path):
    out = str(tmp_path / "bundle")
    parts = {
        "vae": lambda: LightAutoencoder(width=8, blocks=1),
        "vae_small": lambda: LightAutoencoder(width=8, blocks=1),
        "summarizer": lambda: Summarizer(channels=8, width=16, layers=1, heads=2, scales=3),
        "cdm": lambda: CDM(
            channels=16, width=16, depth=1, heads=2, scales=3, learn_sigma=False
        ),
        "prior": lambda: GridPrior(channels=8, vector=8, width=16, blocks=1),
    }  # fmt: skip
    for turn in range(3):
        with ThreadPoolExecutor(len(parts)) as pool:
            saves = [
                pool.submit(bundles.save, out, {name: make()}, {f"{name}-{turn}": turn})
                for name, make in parts.items()
            ]
        assert [save.exception() for save in saves] == [None] * len(saves)
        index = storage.read_json(f"{out}/model_index.json")
        assert parts.keys() <= index.keys()
        assert index["raylarge"]["digests"].keys() == parts.keys()
        assert {f"{name}-{turn}" for name in parts} <= index["raylarge"].keys()
    assert {path.name for path in Path(out).iterdir()} == {*parts, "model_index.json"}
