"""Task `mil`: what a slide is, from FEATURES of its patches, by attention (`models/mil.py`).

    OUT/mil/fold-<n>/   the network of a fold       OUT/mil/fold-<n>.json   held-out slides, scored
    OUT/mil.json        means over the folds that have been trained

Loss: cross-entropy of a bag. The weights of the last step are kept: held-out slides choose
nothing. Source: ZoomLDM, section 4.5 and Table 4 (ABMIL; 10 folds for subtyping, 5 and a test
split for HRD); its settings of ABMIL are not told.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from raylarge import storage
from raylarge.errors import UserError
from raylarge.metrics import classification
from raylarge.models.mil import ABMIL
from raylarge.train.labels import bags, labelled
from raylarge.train.labels.bags import BagSource, FeatureTable, Fold
from raylarge.train.task import Batch, DataFacts, Run

_AT_ONCE = 4096  # instances of a held-out slide
_FIGURES = ("auc", "balanced_accuracy", "accuracy")


@dataclass(frozen=True)
class MilConfig:
    """What is told apart, from which features, and how slides are held out.

    Attributes:
        features: the table, `features-<digest>`; empty: the only one. Example: features-0123abcd.
        label: which of the slides' labels (`tile.labels`). Example: subtype.
        scales: the patches of the first are the instances; features of the patches that cover
            them at the others are put end to end with theirs.
        folds: patients are dealt to so many.
        fold: the one that is held out.
        instances: the most of a bag in training; of more, so many are drawn for each sample.
        width: of a patch's hidden vector.
        attention: of the space in which patches are weighed.
        gated: Eq. 9 of Ilse et al. and not Eq. 8.
        memory_gib: the most that the features may take in each worker.
    """

    features: str = ""
    label: str = ""
    scales: tuple[int, ...] = (0,)
    folds: int = 5
    fold: int = 0
    instances: int = 4096
    width: int = 256
    attention: int = 128
    gated: bool = True
    memory_gib: float = 32.0

    def check(self) -> None:
        """Refuse values that make no sense.

        Raises:
            UserError: naming the key, its value and what it may be.
        """
        if not 0 <= self.fold < self.folds or self.folds < 2:
            raise UserError(
                f"mil.fold={self.fold} is none of mil.folds={self.folds}; give 2 folds or more, "
                f"and one from 0 to {max(1, self.folds - 1)}."
            )
        if self.instances < 1:
            raise UserError(f"mil.instances={self.instances} must be 1 or more.")
        if not self.scales or list(self.scales) != sorted(set(self.scales)):
            raise UserError(
                f"mil.scales={list(self.scales)} must be ascending scales, the finest first."
            )


class MilLoss(nn.Module):
    """ABMIL and its loss per bag."""

    def __init__(self, mil: ABMIL) -> None:
        super().__init__()
        self.mil = mil

    def forward(self, batch: Batch) -> Float[Tensor, " B"]:
        """The loss of each bag."""
        logits = self.mil(batch["instances"], batch["mask"])
        return nn.functional.cross_entropy(logits.float(), batch["label"], reduction="none")


class MilTask:
    """Trains ABMIL on one fold."""

    averaged = None

    def __init__(self, config: MilConfig, fold: Fold, told: Mapping[str, Any]) -> None:
        """Draw the weights.

        Args:
            config: sizes.
            fold: who trains.
            told: what folds of one cross-validation have in common.
        """
        self._fold, self._told = fold, dict(told)
        classes = list(fold.bags.classes)
        channels = fold.bags.facts.channels
        mil = ABMIL(channels, config.width, config.attention, classes, config.gated)
        mil.standardise(*map(torch.from_numpy, fold.statistics))
        self.network = MilLoss(mil)

    def draw(self, batch: Batch) -> Batch:
        """The batch: what is random about a bag, its instances, the source has drawn."""
        return batch

    def sheet(self, batch: Batch) -> None:
        """No picture: there are features alone."""
        return None

    def finish(
        self,
        bundle: str,
        averaged: dict[str, Tensor] | None,
        facts: dict[str, Any],
        batch: Batch,
    ) -> None:
        """Score the slides that did not train; write the network, its figures, the means."""
        fold, mil = self._fold, self.network.mil.eval()
        figures = _figures(mil, fold, "val")
        if len(fold.slides("test")):
            figures["test"] = _figures(mil, fold, "test")
        path = storage.join(bundle, "mil", f"fold-{fold.number}")
        labelled.keep(mil, path)
        known = {"fold": fold.number, "of": self._told, "training": facts}
        storage.write_json(f"{path}.json", {**known, **figures})
        storage.write_json(storage.join(bundle, "mil.json"), summary(bundle, self._told))


def summary(out: str, of: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Means and standard deviations (n - 1) of the figures over the folds there are.

    Args:
        out: where folds were trained.
        of: which cross-validation's; absent: that of the lowest fold there is.

    Returns:
        of, folds (those trained); auc, balanced_accuracy and accuracy, each with mean, deviation
        (None for one fold) and the figure of each fold; the same under `test`, of the test split.
    """
    paths = storage.children(storage.join(out, "mil"), "fold-*.json")
    found = sorted((storage.read_json(path) for path in paths), key=lambda one: one["fold"])
    of = of if of is not None or not found else found[0]["of"]
    found = [one for one in found if one["of"] == of]
    tested = [{**one["test"], "fold": one["fold"]} for one in found if "test" in one]
    test = {"test": _means(tested)} if tested else {}
    return {"of": of, "folds": [one["fold"] for one in found], **_means(found), **test}


def source(config: MilConfig, run: Run, split: str = "train") -> BagSource:
    """The bags of a side of the fold: `train`, or those held out, `val`.

    Raises:
        UserError: as `fold_of`.
    """
    return BagSource(fold_of(config, run), split, config.instances, run.recipe.seed)


def build(config: MilConfig, run: Run, facts: DataFacts) -> MilTask:
    """The task, its weights drawn from the training's seed.

    Raises:
        UserError: as `fold_of`.
    """
    fold = fold_of(config, run)
    shared = ("label", "folds", "instances", "width", "attention", "gated")
    told = {name: getattr(config, name) for name in shared}
    told |= {"scales": list(config.scales), "seed": run.recipe.seed, "data": fold.bags.digest}
    torch.manual_seed(run.recipe.seed)
    return MilTask(config, fold, told)


def fold_of(config: MilConfig, run: Run) -> Fold:
    """Return the fold that is held out; once per process, and the features on first use.

    Raises:
        UserError: values that make no sense, or as `bags.load`.
    """
    config.check()
    features = FeatureTable(
        run.data, config.features, tuple(config.scales), config.label, float(config.memory_gib)
    )
    return bags.load(features, config.folds, config.fold, run.recipe.seed)


@torch.inference_mode()
def logits(mil: ABMIL, instances: Float32[np.ndarray, "n F"]) -> Float32[np.ndarray, " classes"]:
    """A slide's logits from all of its patches, which are embedded some at a time."""
    device = mil.mean.device
    pieces = torch.from_numpy(instances).split(_AT_ONCE)
    hidden = torch.cat([mil.hidden(piece.to(device)) for piece in pieces])[None]
    mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=device)
    found: np.ndarray = mil.pooled(hidden, mask)[0][0].float().cpu().numpy()
    return found


def _figures(mil: ABMIL, fold: Fold, split: str) -> dict[str, Any]:
    """How well slides that did not train are told apart, and the scores of each."""
    slides, classes = fold.slides(split), fold.bags.classes
    scores = np.stack([logits(mil, fold.instances(int(slide))) for slide in slides])
    labels = fold.bags.labels[slides]
    shares = torch.from_numpy(scores).double().softmax(dim=1).tolist()
    each = {
        fold.bags.found.slides[slide]: {
            "label": classes[label],
            "scores": dict(zip(classes, share, strict=True)),
        }
        for slide, label, share in zip(slides, labels, shares, strict=True)
    }
    return {**classification.classification_metrics(scores, labels, classes), "slides": each}


def _means(folds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Each figure's mean and deviation over the folds that have it."""
    found = {}
    for name in _FIGURES:
        by = {str(one["fold"]): one[name] for one in folds if one[name] is not None}
        values = list(by.values())
        found[name] = {
            "mean": statistics.fmean(values) if values else None,
            "deviation": statistics.stdev(values) if len(values) > 1 else None,
            "folds": by,
        }
    return found
