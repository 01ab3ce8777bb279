"""Figures of a classifier: accuracy, balanced accuracy, and the area under the ROC curve (AUC).

logits [n, classes], labels [n] -> {"accuracy": …, "balanced_accuracy": …, "auc": …, …}
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import logsumexp


def auc(scores: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"]) -> float:
    """Return the area under the ROC curve; higher scores should mean positive.

    Raises:
        ValueError: a score that is not a number, or samples of one kind only.
    """
    from sklearn.metrics import roc_auc_score  # takes a second to import

    count = int(positive.sum())
    if count in (0, len(positive)):
        raise ValueError(
            f"{count} positives and {len(positive) - count} negatives; an AUC needs one of each"
        )
    if np.isnan(scores).any():
        raise ValueError("the scores of an AUC must be numbers")
    return float(roc_auc_score(positive, scores))


def one_vs_rest_aucs(
    scores: Float[np.ndarray, "n classes"], labels: Int[np.ndarray, " n"]
) -> list[float | None]:
    """Return the AUC of each class against all others; None for a class with no or all samples."""
    positives = [labels == index for index in range(scores.shape[1])]
    return [
        auc(column, positive) if positive.any() and not positive.all() else None
        for column, positive in zip(scores.T, positives, strict=True)
    ]


def log_odds(logits: Float[np.ndarray, "n classes"]) -> Float[np.ndarray, "n classes"]:
    """Return the log odds log p / (1 - p) of each class: they rank as p does, without rounding.

    That is z_c - log sum exp of the other z.
    """
    z = logits.astype(np.float64)
    others = [logsumexp(np.delete(z, index, axis=1), axis=1) for index in range(z.shape[1])]
    return z - np.stack(others, axis=1)


def classification_metrics(
    logits: Float[np.ndarray, "n classes"], labels: Int[np.ndarray, " n"], classes: tuple[str, ...]
) -> dict[str, object]:
    """Return all figures of a classifier's outputs by name, ready for JSON.

    Returns:
        samples; accuracy; balanced_accuracy (mean recall of the classes that have samples); auc
        (mean over classes; None where no class has both positives and negatives); aucs and counts
        by class.

    Raises:
        ValueError: no samples.
    """
    from sklearn.metrics import accuracy_score, recall_score

    if not len(labels):
        raise ValueError("an accuracy needs at least one sample")
    predicted, present = logits.argmax(axis=1), np.unique(labels)
    aucs = one_vs_rest_aucs(log_odds(logits), labels)
    defined = [value for value in aucs if value is not None]
    return {
        "samples": len(labels),
        "accuracy": float(accuracy_score(labels, predicted)),
        "balanced_accuracy": float(
            recall_score(labels, predicted, labels=present, average="macro")
        ),
        "auc": float(np.mean(defined)) if defined else None,
        "aucs": dict(zip(classes, aucs, strict=True)),
        "counts": {name: int((labels == index).sum()) for index, name in enumerate(classes)},
    }
