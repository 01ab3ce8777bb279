import numpy as np
import pytest

from raylarge.metrics import classification as c


def test_auc_of_hand_counted_pairs():
    scores = np.array([0.1, 0.4, 0.35, 0.8])
    positive = np.array([False, False, True, True])
    # Of the pairs (0.35, 0.1), (0.35, 0.4), (0.8, 0.1), (0.8, 0.4) three are in order.
    assert c.auc(scores, positive) == 0.75
    assert c.auc(-scores, positive) == 0.25


def test_a_tie_counts_one_half():
    positive = np.array([True, False, True, False, False])
    # Pairs of 0.5 with (0.5, 0.5, 0.2): 0.5 + 0.5 + 1; of 0.3 with them: 0 + 0 + 1.
    assert c.auc(np.array([0.5, 0.5, 0.3, 0.5, 0.2]), positive) == pytest.approx(3 / 6)
    assert c.auc(np.zeros(5), positive) == 0.5


def test_auc_is_the_share_of_ordered_pairs():
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 6, 60).astype(float), rng.random(60) < 0.3
    pairs = [
        1.0 if yes > no else 0.5 if yes == no else 0.0
        for yes in scores[positive]
        for no in scores[~positive]
    ]
    assert c.auc(scores, positive) == pytest.approx(np.mean(pairs), abs=1e-12)


@pytest.mark.parametrize("positive", [[True, True], [False, False]])
def test_auc_takes_both_kinds(positive):
    with pytest.raises(ValueError, match="one of each"):
        c.auc(np.array([0.1, 0.2]), np.array(positive))


def test_auc_takes_numbers():
    with pytest.raises(ValueError, match="numbers"):
        c.auc(np.array([0.1, np.nan]), np.array([True, False]))


def test_each_class_against_the_rest():
    scores = np.array([[0.9, 0.1, 0.0], [0.2, 0.7, 0.1], [0.6, 0.3, 0.1], [0.5, 0.4, 0.1]])
    labels = np.array([0, 1, 1, 0])
    # Class 0: 0.9 and 0.5 against 0.2 and 0.6, three of four; class 1: 0.7, 0.3 against 0.1, 0.4.
    assert c.one_vs_rest_aucs(scores, labels) == [0.75, 0.75, None]
    assert c.one_vs_rest_aucs(scores[:1], labels[:1]) == [None, None, None]


def test_log_odds_rank_where_probabilities_round_to_one():
    logits = np.array([[0.0, 60.0], [0.0, 80.0], [3.0, 1.0]], np.float32)
    odds = c.log_odds(logits)
    np.testing.assert_allclose(odds[:, 1], [60, 80, -2])
    np.testing.assert_allclose(odds[:, 0], [-60, -80, 2])
    three = np.log(np.array([[0.2, 0.3, 0.5]]))
    p = np.array([0.2, 0.3, 0.5])
    np.testing.assert_allclose(c.log_odds(three)[0], np.log(p / (1 - p)))


def metrics_of(labels, predicted, classes=3):
    return c.classification_metrics(np.eye(classes)[predicted], labels, tuple("abc"[:classes]))


def test_balanced_accuracy_weighs_classes_alike():
    figures = metrics_of(np.array([0] * 8 + [1, 1]), np.array([0] * 9 + [1]), classes=2)
    assert figures["accuracy"] == 0.9
    assert figures["balanced_accuracy"] == 0.75
    # A class that only the predictions name has no recall to count.
    assert metrics_of(np.array([0, 1]), np.array([0, 2]))["balanced_accuracy"] == 0.5
    with pytest.raises(ValueError, match="one sample"):
        metrics_of(np.zeros(0, int), np.zeros(0, int))


def test_all_figures_of_a_classifier():
    logits = np.array([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 3.0]])
    figures = c.classification_metrics(logits, np.array([0, 0, 1, 1]), ("benign", "tumour"))
    assert figures == {
        "samples": 4,
        "accuracy": 0.5,
        "balanced_accuracy": 0.5,
        "auc": 0.75,
        "aucs": {"benign": 0.75, "tumour": 0.75},
        "counts": {"benign": 2, "tumour": 2},
    }
    alone = c.classification_metrics(logits[:2], np.array([0, 0]), ("benign", "tumour"))
    assert alone["auc"] is None
    assert alone["counts"] == {"benign": 2, "tumour": 0}
