"""How well scores tell classes apart: AUC by ranks, accuracy, balanced accuracy.

    AUC = (sum of the positives' ranks - n+ (n+ + 1) / 2) / (n+ n-)

with average ranks, so that a tie of a positive and a negative counts one half: the probability
that a positive scores above a negative (Mann & Whitney 1947; Hanley & McNeil 1982). Of several
classes each is told from the rest, and the means are over the classes for which that is possible.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import logsumexp
from scipy.stats import rankdata


def auc(scores: Float[np.ndarray, "n"], positive: Bool[np.ndarray, "n"]) -> float:
    """Area under the ROC curve.

    Args:
        scores: the higher, the more a positive.
        positive: which samples are.

    Raises:
        ValueError: a score that is not a number, or samples all of one kind.
    """
    yes = int(positive.sum())
    no = len(positive) - yes
    if not yes or not no:
        raise ValueError(f"{yes} positives and {no} negatives; an AUC takes one of each")
    if np.isnan(scores).any():
        raise ValueError("an AUC takes scores that are numbers")
    above = rankdata(scores)[positive].sum() - yes * (yes + 1) / 2
    return float(above / (yes * no))


def one_vs_rest_aucs(
    scores: Float[np.ndarray, "n classes"], labels: Int[np.ndarray, "n"]
) -> list[float | None]:
    """The AUC of each class against all others; None of one that has no, or every, sample."""
    found: list[float | None] = []
    for index in range(scores.shape[1]):
        positive = labels == index
        both = positive.any() and not positive.all()
        found.append(auc(scores[:, index], positive) if both else None)
    return found


def log_odds(logits: Float[np.ndarray, "n classes"]) -> Float[np.ndarray, "n classes"]:
    """The log odds of each class, log p / (1 - p): they rank as p does and never round to ties.

    It is z_c - log sum exp of the other z.
    """
    z = logits.astype(np.float64)
    others = [logsumexp(np.delete(z, index, axis=1), axis=1) for index in range(z.shape[1])]
    return z - np.stack(others, axis=1)


def accuracy(predicted: Int[np.ndarray, "n"], labels: Int[np.ndarray, "n"]) -> float:
    """The share of samples whose class is right.

    Raises:
        ValueError: no samples.
    """
    if not len(labels):
        raise ValueError("an accuracy takes a sample at least")
    return float((predicted == labels).mean())


def balanced_accuracy(predicted: Int[np.ndarray, "n"], labels: Int[np.ndarray, "n"]) -> float:
    """The mean, over the classes that have samples, of the share of them that is right.

    Raises:
        ValueError: no samples.
    """
    if not len(labels):
        raise ValueError("an accuracy takes a sample at least")
    recalls = [(predicted[labels == index] == index).mean() for index in np.unique(labels)]
    return float(np.mean(recalls))


def classification_metrics(
    logits: Float[np.ndarray, "n classes"], labels: Int[np.ndarray, "n"], classes: tuple[str, ...]
) -> dict[str, object]:
    """All of these for a classifier's outputs, by name, as JSON holds them.

    Returns:
        samples; accuracy; balanced_accuracy; auc (the mean over classes; None where no class can
        be told from the rest); aucs and counts by class.
    """
    predicted = logits.argmax(axis=1)
    aucs = one_vs_rest_aucs(log_odds(logits), labels)
    known = [one for one in aucs if one is not None]
    return {
        "samples": len(labels),
        "accuracy": accuracy(predicted, labels),
        "balanced_accuracy": balanced_accuracy(predicted, labels),
        "auc": float(np.mean(known)) if known else None,
        "aucs": dict(zip(classes, aucs, strict=True)),
        "counts": {name: int((labels == index).sum()) for index, name in enumerate(classes)},
    }
