from functools import partial

import numpy as np
import pytest
import torch
import toy

from raylarge import images, schema, storage
from raylarge.errors import UserError
from raylarge.models.classifier import Classifier
from raylarge.train import registry
from raylarge.train.config import Train
from raylarge.train.ingest import Ingest
from raylarge.train.task import DataFacts, SampleSource, TrainTask
from raylarge.train.tasks import classifier
from raylarge.train.tasks.classifier import ClassifierConfig, Mixed

COLOURS = {"blue": (60, 60, 200), "green": (60, 200, 60), "red": (200, 60, 60)}


Config = partial(Train, model="classifier", data="", out="")


def write(root, split="train", slides=6, images_of=8, names=tuple(COLOURS), offset=0):
    """Noisy images whose colour is their slide's label, at scale 0; grey ones at scale 1."""
    rng, rows = np.random.default_rng(offset), []
    for k in (0, 1):
        for i in range(slides * images_of):
            slide = i % slides
            name = names[slide % len(names)]
            base = np.array(COLOURS[name] if k == 0 else (128, 128, 128))
            noise = rng.integers(-50, 50, (8, 8, 3))
            row = next(toy.keys(rng, (1,), split)) | {
                "key": 1000 * k + i + offset,
                "scale": k,
                "row": i,
                "slide_id": f"{split}-{slide + offset}",
                "labels": [("colour", name), ("site", "A")],
                "tissue": 1.0,
                "image": images.png_bytes((base + noise).clip(0, 255).astype(np.uint8)),
            }
            rows.append(row)
    return toy.write(str(root), "examples", rows, schema.EXAMPLES, split)


def config(root, seed=0, **values):
    known = {"network": "test_resnet", "label": "colour"}
    return Config(data=str(root), seed=seed, classifier=ClassifierConfig(**(known | values)))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("classifier") / "data"
    write(root)
    return write(root, "val", slides=3, images_of=4, offset=500)


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    """Images of two of the classes, in another order of indices."""
    return write(tmp_path_factory.mktemp("made") / "data", names=("red", "green"), offset=7000)


def trained(config, steps=50, batch=12):
    source = registry.source(config.run)
    task = registry.build(config.run, source.facts)
    optimizer = torch.optim.Adam(task.network.parameters(), lr=3e-3)
    for step in range(steps):
        drawn = task.draw(source.batch(range(step * batch, (step + 1) * batch)))
        loss = task.network(drawn)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    return task


@pytest.fixture(scope="module")
def task(data):
    return trained(config(data))


def test_colours_are_learned_and_scored_on_each_held_out_image_once(data, task, tmp_path):
    task.finish(str(tmp_path), None, {"steps": 50}, {})
    found = storage.read_json(f"{tmp_path}/classifier.json")
    assert found["accuracy"] > 0.9
    assert found["balanced_accuracy"] > 0.9
    assert found["auc"] > 0.95
    assert found["counts"] == {"blue": 4, "green": 4, "red": 4}
    assert (found["training"], found["synthetic_share"]) == ({"steps": 50}, 0.0)
    kept = Classifier.from_pretrained(f"{tmp_path}/classifier").eval()
    red = torch.tensor([0.5, -0.5, -0.5])[None, :, None, None].expand(1, 3, 8, 8)
    assert kept.config.classes[int(kept(red).argmax())] == "red"


def test_held_out_images_are_spread_evenly_where_there_are_too_many(data, task, tmp_path):
    wish = config(data, held_out=4)
    few = classifier.ClassifierTask(task.network.classifier, wish.classifier, wish.run)
    few.finish(str(tmp_path), None, {}, {})
    assert storage.read_json(f"{tmp_path}/classifier.json")["samples"] == 4


def test_a_sheet_shows_images_by_what_they_are_taken_for(data, task):
    held = registry.source(config(data).run, "val")
    task.network.eval()
    sheet = task.sheet(held.batch(range(12)))
    assert sheet.dtype == np.uint8
    assert sheet.shape[0] > 3 * 128
    # A row of blue, one of green, one of red, from the top.
    left = sheet[:, -200:].astype(int)
    for i, channel in enumerate((2, 1, 0)):
        band = left[4 + 132 * i + 40 : 4 + 132 * i + 90, -120:-80].reshape(-1, 3)
        assert band.mean(axis=0).argmax() == channel


def test_a_sample_does_not_depend_on_its_batch(data, synthetic):
    wish = config(data, synthetic=synthetic, share=0.3)
    source, again = registry.source(wish.run), registry.source(wish.run)
    task = registry.build(wish.run, source.facts)
    assert isinstance(source, SampleSource)
    assert isinstance(task, TrainTask)
    samples = [41, 3, 1 << 34, 40, 42, 43]
    together = task.draw(source.batch(samples))
    for i, sample in enumerate(samples):
        alone = task.draw(again.batch([sample]))
        for name, value in alone.items():
            assert torch.equal(value[0], together[name][i]), name
        with torch.no_grad():
            torch.testing.assert_close(task.network(alone)[0], task.network(together)[i])
    loss = task.network(together)
    assert (loss.shape, loss.dtype) == ((6,), torch.float32)


def test_images_are_mirrored_in_four_ways_each_at_its_address(data):
    source = registry.source(config(data).run)
    task = registry.build(config(data).run, source.facts)
    batch = source.batch(range(64))
    seen = set()
    for plain, drawn in zip(batch["image"], task.draw(batch)["image"], strict=True):
        ways = [plain, plain.flip(1), plain.flip(2), plain.flip(1, 2)]
        (way,) = [i for i, one in enumerate(ways) if torch.equal(one, drawn)]
        seen.add(way)
    assert seen == {0, 1, 2, 3}
    other = registry.build(config(data, seed=1).run, source.facts)
    assert not torch.equal(other.draw(batch)["image"], task.draw(batch)["image"])


class Fake:
    """Samples that tell whose they are."""

    def __init__(self, name, classes, side=8):
        self.digest, self.name = name, len(name)
        self.facts = DataFacts(0, {0: 100}, (3, side, side), None, None, {}, classes=classes)

    def batch(self, samples):
        index = torch.tensor(list(samples))
        known = {"label": index % len(self.facts.classes), "own": index}
        return {"sample": index, "who": torch.full_like(index, self.name), **known}


@pytest.mark.parametrize("share", [0.3, 0.5, 1.0])
def test_every_run_of_samples_has_its_share_and_no_source_is_asked_twice(share):
    mixed = Mixed(Fake("a", ("x", "y", "z")), Fake("bb", ("z", "y")), share)
    batch = mixed.batch(range(200))
    assert batch["sample"].tolist() == list(range(200))
    theirs = batch["who"] == 2
    for start in range(0, 200, 20):
        assert abs(int(theirs[start : start + 20].sum()) - 20 * share) <= 1
    for who in (1, 2):
        own = batch["own"][batch["who"] == who].tolist()
        assert own == list(range(len(own)))
    # Their class 0 is our 2, their 1 our 1.
    assert torch.equal(batch["label"][theirs], 2 - batch["own"][theirs] % 2)
    assert torch.equal(batch["label"][~theirs], batch["own"][~theirs] % 3)
    order = [150, 3, 77, 4]
    for name, value in mixed.batch(order).items():
        assert torch.equal(value, batch[name][order]), name


def test_synthetic_images_keep_their_class_and_are_not_held_out(data, synthetic, tmp_path):
    wish = config(data, synthetic=synthetic, share=1.0)
    batch = registry.source(wish.run).batch(range(40))
    strongest = 2 - batch["image"].mean(dim=(2, 3)).argmax(dim=1)  # blue, green, red
    assert torch.equal(strongest, batch["label"])
    assert set(batch["label"].tolist()) == {1, 2}
    assert isinstance(registry.source(wish.run, "val"), Ingest)
    task = trained(wish, steps=1)
    task.finish(str(tmp_path), None, {}, {})
    found = storage.read_json(f"{tmp_path}/classifier.json")
    assert (found["synthetic_share"], found["samples"]) == (1.0, 12)
    half = registry.source(config(data, synthetic=synthetic).run).digest
    assert (
        len({half, registry.source(wish.run).digest, registry.source(config(data).run).digest}) == 3
    )


def test_the_scale_is_chosen(data):
    for scales in ((0,), (1,), (0, 1)):
        batch = registry.source(config(data, scales=scales).run).batch(range(30))
        assert set(batch["scale"].tolist()) == set(scales)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"label": ""}, r"classifier.label=\(empty\) is no label .* are: colour, site"),
        ({"label": "grade"}, "classifier.label=grade is no label"),
        ({"label": "site"}, "classifier.label=site is 'A' for all 9 slides"),
        ({"scales": (3,)}, "scale 3"),
        ({"share": 0.0, "synthetic": "there"}, "classifier.share=0.0 must be above 0"),
        ({"network": "resnet1811"}, "resnet1811 is no network of timm"),
        ({"weights": "/nowhere.pt"}, "no weights at /nowhere.pt"),
    ],
)
def test_what_cannot_be_is_refused(data, synthetic, values, said):
    values = values | ({"synthetic": synthetic} if "synthetic" in values else {})
    wish = config(data, **values)
    with pytest.raises(UserError, match=said):
        registry.build(wish.run, registry.source(wish.run).facts)


def test_without_held_out_images_nothing_is_trained(tmp_path):
    wish = config(write(tmp_path))
    with pytest.raises(UserError, match="is of the split 'val' at scales"):
        registry.build(wish.run, registry.source(wish.run).facts)


def test_slides_without_the_label_are_refused(tmp_path):
    root = write(tmp_path)
    parts = storage.read_json(f"{root}/shard.json")["parts"]
    rows = storage.read_table(f"{root}/{parts[0]['part']}").to_pylist()
    for row in rows:
        row["labels"] = [] if row["slide_id"] == "train-2" else row["labels"]
    other = toy.write(str(tmp_path / "b"), "examples", rows, schema.EXAMPLES, "train")
    with pytest.raises(UserError, match="colour: 1 of the 3 slides"):
        registry.source(config(other).run)


@pytest.mark.parametrize(
    ("classes", "side", "said"),
    [(("x", "w"), 8, "has images of 'w', which no real"), (("x", "y"), 9, "images of 9 px")],
)
def test_folders_that_do_not_go_together_are_refused(classes, side, said):
    with pytest.raises(UserError, match=said):
        Mixed(Fake("a", ("x", "y")), Fake("bb", classes, side), 0.5)
