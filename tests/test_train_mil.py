import numpy as np
import pytest
import torch
from bagged import config, write
from bagged import fold as fold_by

from raylarge import storage
from raylarge.models.mil import ABMIL
from raylarge.train import registry
from raylarge.train.task import SampleSource, TrainTask
from raylarge.train.tasks import mil


def trained(config, steps=120, batch=8):
    source = registry.source(config.run)
    task = registry.build(config.run, source.facts)
    optimizer = torch.optim.Adam(task.network.parameters(), lr=3e-3)
    for step in range(steps):
        drawn = task.draw(source.batch(range(step * batch, (step + 1) * batch)))
        loss = task.network(drawn)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    return task, source


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("mil") / "data", slides=48)


@pytest.fixture(scope="module")
def done(data, tmp_path_factory):
    """Two folds of three, trained; where they were written."""
    out = str(tmp_path_factory.mktemp("out"))
    for fold in (0, 2):
        task, _ = trained(config(data, fold=fold))
        task.finish(out, None, {"steps": 120}, {})
    return out


def test_a_few_patches_that_decide_are_found(done):
    for fold in (0, 2):
        found = storage.read_json(f"{done}/mil/fold-{fold}.json")
        assert found["auc"] > 0.95
        assert found["test"]["auc"] > 0.95
        assert found["training"] == {"steps": 120}
        assert found["samples"] == len(found["slides"]) == sum(found["counts"].values())


def test_the_network_is_kept_and_gives_the_scores_that_are_told(data, done):
    network = ABMIL.from_pretrained(f"{done}/mil/fold-2").eval()
    fold = fold_by(config(data, fold=2))
    found = storage.read_json(f"{done}/mil/fold-2.json")["slides"]
    slides = fold.slides("val")
    assert {fold.bags.found.slides[slide] for slide in slides} == found.keys()
    for slide in slides:
        x = torch.from_numpy(fold.instances(int(slide)))[None]
        with torch.no_grad():
            share = network(x, torch.ones(x.shape[:2], dtype=torch.bool)).softmax(dim=1)[0, 0]
        one = found[fold.bags.found.slides[slide]]
        assert float(share) == pytest.approx(one["scores"]["high"], abs=1e-5)
        assert one["label"] == ("high" if int(fold.bags.found.slides[slide][1:]) % 2 else "low")


def test_the_means_are_over_the_folds_there_are(done):
    found = storage.read_json(f"{done}/mil.json")
    aucs = [storage.read_json(f"{done}/mil/fold-{fold}.json")["auc"] for fold in (0, 2)]
    assert found["folds"] == [0, 2]
    assert found["auc"]["mean"] == pytest.approx(np.mean(aucs))
    assert found["auc"]["deviation"] == pytest.approx(np.std(aucs, ddof=1))
    assert found["auc"]["folds"] == {"0": aucs[0], "2": aucs[1]}
    assert found["test"]["auc"]["mean"] > 0.95
    assert mil.summary(done) == found


def test_folds_of_another_cross_validation_are_left_out(tmp_path):
    one = {"auc": 0.5, "accuracy": 0.5, "balanced_accuracy": None}
    for fold, label in enumerate(("grade", "grade", "hrd")):
        document = one | {"fold": fold, "of": {"label": label}}
        storage.write_json(f"{tmp_path}/mil/fold-{fold}.json", document)
    assert mil.summary(str(tmp_path))["folds"] == [0, 1]
    other = mil.summary(str(tmp_path), {"label": "hrd"})
    assert (other["folds"], other["auc"]["deviation"]) == ([2], None)
    assert other["balanced_accuracy"] == {"mean": None, "deviation": None, "folds": {}}


def test_a_coarse_feature_that_alone_tells_is_found(tmp_path):
    root = write(tmp_path, slides=48, tells=2)
    both, _ = trained(config(root, scales=(0, 2)))
    fine, _ = trained(config(root))
    for task, low, high in ((both, 0.95, 1), (fine, 0, 0.8)):
        task.finish(str(tmp_path), None, {}, {})
        assert low <= storage.read_json(f"{tmp_path}/mil/fold-0.json")["auc"] <= high


def test_a_sample_does_not_depend_on_its_batch(data):
    source = registry.source(config(data, instances=20).run)
    task = registry.build(config(data, instances=20).run, source.facts)
    assert isinstance(source, SampleSource)
    assert isinstance(task, TrainTask)
    samples = [3, 90, 1 << 33, 5]
    together = task.draw(source.batch(samples))
    again = registry.source(config(data, instances=20).run)
    for i, sample in enumerate(samples):
        alone = task.draw(again.batch([sample]))
        for name, value in alone.items():
            assert torch.equal(value[0], together[name][i]), name
        with torch.no_grad():
            torch.testing.assert_close(task.network(alone)[0], task.network(together)[i])
    loss = task.network(together)
    assert loss.shape == (4,)
    assert loss.dtype == torch.float32
