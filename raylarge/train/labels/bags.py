"""Slides as bags of FEATURES: which slide and which of its patches a sample is, and the folds.

    sample -> slide:     the epoch's permutation, drawn at (seed, epoch)
           -> instances: all of the slide's, or so many drawn at (seed, sample)
    patient -> fold:     dealt in the order of a hash of (seed, patient), label by label

An instance is a patch of the finest scale asked for, and end to end with its feature stand those
of the patches that cover it at the coarser scales. ZoomLDM (section 4.5) fuses 20x with 5x and
does not say how.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int

from raylarge import storage, tables
from raylarge.diffusion.noise import generator, split_64
from raylarge.errors import UserError
from raylarge.train.labels import fused, labelled
from raylarge.train.labels.fused import Fused
from raylarge.train.task import Batch, DataFacts

TEST = -1
"""The fold of slides of the split `test`: they never train, whatever the fold."""


class FeatureTable(NamedTuple):
    """Which features are read.

    Attributes:
        root: the data folder.
        name: of the table; empty: the only one there is.
        scales: the finest, whose patches are the instances, and those that go with it.
        label: of slides.
        memory_gib: the most memory that the features may take.
    """

    root: str
    name: str
    scales: tuple[int, ...]
    label: str
    memory_gib: float


@dataclass(frozen=True)
class Bags:
    """All labelled slides that have features."""

    found: Fused
    labels: Int[np.ndarray, " slides"]
    classes: tuple[str, ...]
    facts: DataFacts
    digest: str

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Fold:
    """One way to hold slides out.

    Attributes:
        of: the fold of each slide; `TEST` where it is of the split `test`.
        number: which fold is held out.
    """

    bags: Bags
    of: Int[np.ndarray, "slides"]
    number: int

    def slides(self, split: str) -> Int[np.ndarray, " some"]:
        """Slides that train, that are held out (`val`) or that no fold trains on (`test`)."""
        held = self.of == self.number
        return np.flatnonzero(
            {"train": ~held & (self.of != TEST), "val": held, "test": self.of == TEST}[split]
        )

    def instances(
        self, slide: int, rows: Int[np.ndarray, " some"] | slice = slice(None)
    ) -> Float32[np.ndarray, "some F"]:
        """FeatureTable of a slide's patches; where no patch of a scale covers one, the mean."""
        own = slice(*self.bags.found.starts[slide : slide + 2])
        found = self.bags.found.features[own][rows].astype(np.float32)
        gaps = self.bags.found.lacking[own][rows]
        wide = np.repeat(gaps, self.bags.found.width, axis=1)
        return np.where(wide, self.statistics[0], found)

    @cached_property
    def statistics(self) -> tuple[Float32[np.ndarray, " F"], Float32[np.ndarray, " F"]]:
        """Mean and deviation of each channel over the patches that train, where they have it."""
        found = self.bags.found
        width, scales = found.width, found.lacking.shape[1]
        count = np.zeros((scales, 1))
        total, square = np.zeros((2, scales, width))
        for slide in self.slides("train"):
            rows = slice(*found.starts[slide : slide + 2])
            there = ~found.lacking[rows][..., None]
            x = found.features[rows].astype(np.float64).reshape(-1, scales, width) * there
            count += there.sum(axis=0)
            total += x.sum(axis=0)
            square += (x * x).sum(axis=0)
        mean = total / count.clip(min=1)
        deviation = np.sqrt((square / count.clip(min=1) - mean**2).clip(min=0))
        return mean.ravel().astype(np.float32), deviation.ravel().astype(np.float32)


class BagSource:
    """The bags of one side of a fold."""

    def __init__(self, fold: Fold, split: str, instances: int, seed: int) -> None:
        """Take a side.

        Args:
            fold: of which slides.
            split: `train` or `val`.
            instances: the most of a bag.
            seed: of all draws.
        """
        self._fold, self._seed = fold, seed
        self.facts, self.digest = fold.bags.facts, fold.bags.digest
        self._slides = fold.slides(split)
        # One shape for all batches: sums then do not depend on who shares a batch with whom.
        self._side = min(instances, int(np.diff(fold.bags.found.starts).max()))
        self._epoch: tuple[int, Int[np.ndarray, " slides"]] = (-1, self._slides)

    def slide(self, sample: int) -> int:
        """The slide that a global sample index stands for."""
        epoch, place = divmod(sample, len(self._slides))
        known, order = self._epoch
        if known != epoch:
            draw = generator(self._seed, "bags", *split_64(epoch))
            order = draw.permutation(self._slides)
            self._epoch = (epoch, order)
        return int(order[place])

    def batch(self, samples: Sequence[int]) -> Batch:
        """Some bags.

        Returns:
            sample, label: int64 [b]; instances: float32 [b, n, F], zeros where mask (bool [b, n])
            is false; scale: int64 [b], that of the patches.
        """
        slides = [self.slide(sample) for sample in samples]
        shape = (len(slides), self._side, self.facts.channels)
        instances, mask = np.zeros(shape, np.float32), np.zeros(shape[:2], bool)
        for i, (sample, slide) in enumerate(zip(samples, slides, strict=True)):
            rows = self._rows(sample, slide)
            instances[i, : len(rows)] = self._fold.instances(slide, rows)
            mask[i, : len(rows)] = True
        return {
            "sample": torch.tensor(list(samples), dtype=torch.int64),
            "scale": torch.full((len(slides),), self.facts.scales[0]),
            "instances": torch.from_numpy(instances),
            "mask": torch.from_numpy(mask),
            "label": torch.from_numpy(self._fold.bags.labels[slides]),
        }

    def _rows(self, sample: int, slide: int) -> Int[np.ndarray, " some"]:
        """Which instances of a slide, in their order: all, or so many without replacement."""
        there = int(np.diff(self._fold.bags.found.starts)[slide])
        if there <= self._side:
            return np.arange(there)
        draw = generator(self._seed, "instances", *split_64(sample))
        return np.sort(draw.permutation(there)[: self._side])


def load(features: FeatureTable, folds: int, number: int, seed: int) -> Fold:
    """Deal slides to folds and hold one fold out; once per process.

    Raises:
        UserError: no features or several, a scale that they lack, no such label, one class only,
            a fold that has nothing to hold out or to learn from, bags larger than the memory.
    """
    features = features._replace(name=features.name or _only(features.root))
    names = (features.name, "examples")
    digests = [str(tables.manifest(features.root, name)["digest"]) for name in names]
    return _fold(features, storage.digest(*map(str.encode, digests)), folds, number, seed)


def deal(
    patients: Sequence[str], labels: Sequence[int], folds: int, seed: int
) -> Int[np.ndarray, " slides"]:
    """The fold of each slide: that of its patient.

    Patients of one label (or set of labels) go round the folds in the order of a hash of (seed,
    patient), and the next label goes on where the last one ended. So folds differ by one
    patient at most, of each label and of all, and no patient is in two.
    """
    of: dict[str, set[int]] = {}
    for patient, label in zip(patients, labels, strict=True):
        of.setdefault(patient, set()).add(int(label))
    order = sorted(of, key=lambda patient: (sorted(of[patient]), _hash(seed, patient)))
    fold = {patient: place % folds for place, patient in enumerate(order)}
    return np.array([fold[patient] for patient in patients], np.int64)


def _hash(seed: int, patient: str) -> str:
    return hashlib.sha256(f"{seed} {patient}".encode()).hexdigest()


def _only(root: str) -> str:
    """The only FEATURES of a folder.

    Raises:
        UserError: there are none, or several.
    """
    found = [path.rsplit("/", 1)[-1] for path in storage.children(root, "features-*.json")]
    names = [name.removesuffix(".json") for name in found]
    if len(names) != 1:
        cure = (
            f"choose one by mil.features=: {', '.join(names)}"
            if names
            else f"run python jobs/prepare.py out={root} verbs=features bundle=... first"
        )
        raise UserError(f"there are {len(names)} tables of features in {root}; {cure}.")
    return names[0]


@lru_cache(maxsize=1)
def _bags(read: FeatureTable, digest: str) -> Bags:
    """The bags of a table; `digest` tells when what was read before is out of date."""
    root, name, scales, label, gib = read
    everybody = labelled.slide_labels(root, label, "mil.label")
    said = {slide: value for slide, value in everybody.items() if value}
    found = fused.read(root, name, scales, said, gib)
    values = [said[slide] for slide in found.slides]
    classes = tuple(sorted(set(values)))
    if len(classes) < 2:
        raise UserError(
            f"mil.label={label} is '{classes[0]}' for all {len(values)} slides that have features; "
            f"there is nothing to tell apart."
        )
    made = tables.manifest(root, name)
    side = int(made["patch_px"])
    facts = DataFacts(
        channels=found.channels,
        counts={scales[0]: len(found)},
        image=(3, side, side),
        latent=None,
        base_mpp=made.get("config", {}).get("tile", {}).get("base_mpp"),
        encoder=dict(made["encoder"]),
        classes=classes,
    )
    labels = np.array([classes.index(value) for value in values])
    return Bags(found, labels, classes, facts, digest)


@lru_cache(maxsize=1)
def _fold(
    read: FeatureTable,
    digest: str,
    folds: int,
    number: int,
    seed: int,
) -> Fold:
    bags = _bags(read, digest)
    patients = bags.found.patients
    free = np.flatnonzero(~bags.found.test)
    of = np.full(len(bags), TEST)
    of[free] = deal([patients[i] for i in free], bags.labels[free].tolist(), folds, seed)
    held, training = of == number, (of != number) & (of != TEST)
    if not held.any():
        raise UserError(
            f"mil.fold={number} holds no slide out: there are {len({patients[i] for i in free})} "
            f"patients for mil.folds={folds}; take fewer folds."
        )
    if len(learned := np.unique(bags.labels[training])) < 2:
        raise UserError(
            f"without mil.fold={number} there are slides of {len(learned)} of the classes "
            f"{', '.join(bags.classes)} to learn from; give another seed=, or more patients."
        )
    return Fold(bags, of, number)
