"""Task `classifier`: what an image is, learned from real images and, by choice, synthetic ones.

    OUT/classifier/        the network        OUT/classifier.json    held-out real images, scored

EXAMPLES of one folder, with a label of their slides; a share of each batch may come from a second
folder. Held-out images are real. So two runs tell whether synthetic images help. Loss:
cross-entropy; images are mirrored at random.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from raylarge import images, storage
from raylarge.diffusion.noise import generator, split_64
from raylarge.errors import UserError
from raylarge.metrics import classification
from raylarge.models.classifier import Classifier
from raylarge.models.classifier import build as build_classifier
from raylarge.train.ingest import Ingest, Label
from raylarge.train.labels import labelled
from raylarge.train.task import Batch, DataFacts, Run, SampleSource

_AT_ONCE = 32  # held-out images
_SHOWN = 8  # images of a class on a sheet


@dataclass(frozen=True)
class ClassifierConfig:
    """What is told apart, by which network, from which images.

    Attributes:
        network: its name in timm.
        weights: a file of its weights to start from; empty: random ones, nothing is fetched.
            Example: resnet18.safetensors.
        label: which of the slides' labels (`tile.labels`). Example: grade.
        scales: of the images.
        synthetic: a second data folder, of synthetic images under the same label. Example: data2.
        share: of the samples that come from there.
        held_out: the most held-out images that are scored at the end, spread evenly; 0: all.
    """

    network: str = "resnet18"
    weights: str = ""
    label: str = ""
    scales: tuple[int, ...] = (0,)
    synthetic: str = ""
    share: float = 0.5
    held_out: int = 10000


class Mixed:
    """Samples of two sources: of any run of indices the second has its share, give or take one.

    Each source is asked for its own samples 0, 1, 2, … without gaps, so what a real image's
    neighbours are does not thin out the epochs of either.
    """

    def __init__(self, first: SampleSource, second: SampleSource, share: float) -> None:
        """Join them.

        Raises:
            UserError: images of another size, or a class that the first does not have.
        """
        mine, other = first.facts, second.facts
        if unknown := sorted(set(other.classes) - set(mine.classes)):
            raise UserError(
                f"classifier.synthetic has images of '{unknown[0]}', which no real image is; the "
                f"classes are {', '.join(mine.classes)}."
            )
        if mine.image != other.image:
            raise UserError(
                f"classifier.synthetic has images of {other.image[-1]} px, the real ones have "
                f"{mine.image[-1]} px; make them of one size."
            )
        self._first, self._second, self._share = first, second, share
        self._classes = torch.tensor([mine.classes.index(name) for name in other.classes])
        self.facts = mine
        said = f"{first.digest} {second.digest} {share}"
        self.digest = storage.digest(said.encode())

    def before(self, sample: int) -> int:
        """How many samples with smaller indices are the second source's."""
        return math.floor(sample * self._share)

    def batch(self, samples: Sequence[int]) -> Batch:
        """Some samples, in the order of the indices given."""
        theirs = [self.before(sample + 1) > self.before(sample) for sample in samples]
        split: list[list[int]] = [[], []]
        for sample, second in zip(samples, theirs, strict=True):
            count = self.before(sample)
            split[second].append(count if second else sample - count)
        found = [
            source.batch(some)
            for source, some in zip((self._first, self._second), split, strict=True)
            if some
        ]
        if split[1]:
            found[-1] = {**found[-1], "label": self._classes[found[-1]["label"]]}
        # Where each sample stands once the second source's are behind the first's.
        order = torch.from_numpy(np.argsort(np.argsort(theirs, kind="stable"), kind="stable"))
        joined = {name: torch.cat([one[name] for one in found])[order] for name in found[0]}
        return {**joined, "sample": torch.tensor(list(samples), dtype=torch.int64)}


class ClassifierLoss(nn.Module):
    """The classifier and its loss per image."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, batch: Batch) -> Float[Tensor, " B"]:
        """The loss of each image."""
        logits = self.classifier(batch["image"])
        return nn.functional.cross_entropy(logits.float(), batch["label"], reduction="none")


class ClassifierTask:
    """Trains a classifier of images."""

    averaged = None

    def __init__(self, classifier: Classifier, config: ClassifierConfig, run: Run) -> None:
        self.network = ClassifierLoss(classifier)
        self._config, self._root, self._seed = config, run.data, run.recipe.seed
        self._classes = tuple(classifier.config.classes)

    def draw(self, batch: Batch) -> Batch:
        """The batch with each image mirrored along rows, columns, both or neither."""
        addresses = [split_64(n) for n in batch["sample"].tolist()]
        coins = [generator(self._seed, "classifier", *one).random(2) < 0.5 for one in addresses]
        image = batch["image"]
        for axis, flip in zip((2, 3), torch.from_numpy(np.array(coins)).T, strict=True):
            image = torch.where(flip[:, None, None, None], image.flip(axis), image)
        return {**batch, "image": image}

    @torch.no_grad()
    def sheet(self, batch: Batch) -> UInt8[np.ndarray, "H W 3"]:
        """Held-out images in a row for each class that they are taken for."""
        taken = self._logits(batch["image"]).argmax(dim=1)
        pixels, right = images.to_uint8(batch["image"]), taken == batch["label"].cpu()
        rows, names = [], []
        for index, name in enumerate(self._classes):
            here = torch.nonzero(taken == index)[:, 0]
            if len(here):
                rows.append([pixels[i] for i in here[:_SHOWN].tolist()])
                names.append(f"{name} ({int(right[here].sum())} of {len(here)} right)")
        return images.sheet(rows, names)

    def finish(
        self,
        bundle: str,
        averaged: dict[str, Tensor] | None,
        facts: dict[str, Any],
        batch: Batch,
    ) -> None:
        """Score held-out images; write the network and its figures."""
        classifier = self.network.classifier.eval()
        labelled.keep(classifier, storage.join(bundle, "classifier"))
        logits, labels = self._scored()
        known = {
            "of": {"label": self._config.label, "network": self._config.network},
            "synthetic_share": self._config.share if self._config.synthetic else 0.0,
            "training": facts,
        }
        figures = classification.classification_metrics(logits, labels, self._classes)
        storage.write_json(storage.join(bundle, "classifier.json"), {**known, **figures})

    @torch.no_grad()
    def _logits(self, image: Float[Tensor, "B 3 P P"]) -> Float[Tensor, "B classes"]:
        classifier = self.network.classifier
        found: Tensor = classifier(image.to(classifier.mean.device)).float().cpu()
        return found

    def _scored(self) -> tuple[Float[np.ndarray, "n classes"], Int[np.ndarray, " n"]]:
        """Logits and labels of held-out images."""
        pixels: list[np.ndarray] = []
        logits, labels = [], []
        for image, label in _held_out(self._root, self._config):
            pixels.append(image)
            labels.append(self._classes.index(label))
            if len(pixels) == _AT_ONCE:
                logits.append(self._logits(images.to_float(np.stack(pixels))))
                pixels = []
        if pixels:
            logits.append(self._logits(images.to_float(np.stack(pixels))))
        return torch.cat(logits).numpy(), np.array(labels)


def source(config: ClassifierConfig, run: Run, split: str = "train") -> SampleSource:
    """The images of a split; of `train`, synthetic ones among them where the config says so.

    Raises:
        UserError: no label, one that rows lack, one class alone, a share that is none, or folders
            that do not go together.
    """
    columns = {"examples": ("image",)}
    values = labelled.classes(run.data, config.label, "classifier.label")
    scales = tuple(config.scales) or None
    real = Ingest(run.data, columns, run.recipe, split, scales, Label(config.label, values))
    if not config.synthetic or split != "train":
        return real
    if not 0 < config.share <= 1:
        raise UserError(f"classifier.share={config.share} must be above 0 and at most 1.")
    said = labelled.slide_labels(config.synthetic, config.label, "classifier.label")
    theirs = tuple(sorted({value for value in said.values() if value}))
    made = Ingest(
        config.synthetic, columns, run.recipe, "train", scales, Label(config.label, theirs)
    )
    return Mixed(real, made, config.share)


def build(config: ClassifierConfig, run: Run, facts: DataFacts) -> ClassifierTask:
    """The task, its weights drawn from the training's seed.

    Raises:
        UserError: nothing is held out, or a network or weights that do not fit.
    """
    if not labelled.count(run.data, _where(config)):
        raise UserError(
            f"no image in {run.data} is of the split 'val' at scales {list(config.scales)}, so "
            f"nothing would tell how good the classifier is; hold some out (tile.val_fraction=)."
        )
    torch.manual_seed(run.recipe.seed)
    classifier = build_classifier(config.network, facts.classes, facts.image[-1], config.weights)
    return ClassifierTask(classifier, config, run)


def _where(config: ClassifierConfig) -> labelled.Where:
    return ("examples", tuple(config.scales), ("val",))


def _held_out(root: str, config: ClassifierConfig) -> Iterator[tuple[np.ndarray, str]]:
    """Held-out images and their labels, each once."""
    where = _where(config)
    stride = math.ceil(labelled.count(root, where) / (config.held_out or math.inf)) or 1
    number = 0
    for table in labelled.pieces(root, where, ("image", "labels"), at_once=1):
        rows = range(-number % stride, table.num_rows, stride)
        number += table.num_rows
        for row in rows:
            said = dict(table["labels"][row].as_py())
            yield images.from_bytes(table["image"][row].as_py()), said[config.label]
