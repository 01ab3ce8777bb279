"""What losses under true, shuffled and no conditions mean, in words that claim no more."""

from dataclasses import replace

import pytest
import torch
import toy

from raylarge.evaluate.conditioning import loss_rows, shuffled_loss, summarize_losses
from raylarge.geometry import Patch
from raylarge.models import bundle as bundles

LOSSES = {
    0: {"rows": 64, "true": 0.80, "shuffled": 0.88, "null": 0.84},
    1: {"rows": 64, "true": 0.70, "shuffled": 0.70, "null": 0.84},
    3: {"rows": 64, "true": 0.5766, "shuffled": 0.6573, "null": 0.5675},
}


def test_a_condition_that_is_worse_than_none_does_not_help():
    """Shuffling costs 14 % at scale 3, and still no condition is better than the true one."""
    lines = summarize_losses(LOSSES).split("; ")
    assert lines == [
        "scale 0: the true condition gives the lowest loss, so it helps",
        "scale 3: no condition at all does better than the true one, so it does not help yet",
        "scale 1: another image's condition does as well as the true one, so it is ignored",
    ]
    assert "scales 0, 2: the true" in summarize_losses({0: LOSSES[0], 2: LOSSES[0]})


def test_all_three_losses_are_in_the_table():
    assert loss_rows({"3": LOSSES[3]}) == [["3", "0.5766", "0.6573 (+14.0%)", "0.5675 (-1.6%)"]]


def test_the_three_losses_of_a_bundle_differ(tiny_bundle, tmp_path):
    """Each condition is used as it is called: none is the conditioner's null tokens."""
    bundle = bundles.load(tiny_bundle)
    toy.write_latents(tmp_path, counts=(4, 4), split="val")
    bundle.summarizer.forward = lambda grid, k: torch.ones(len(grid), 1, 64)
    bundle.summarizer.null = lambda count: torch.zeros(count, 1, 64)
    small = replace(bundle, patch=Patch(side_px=16, factor=4, channels=3, scales=4))
    losses = shuffled_loss(small, str(tmp_path), "latents-0", repeats=2)
    assert losses.keys() == {0, 1}
    for loss in losses.values():
        assert loss["shuffled"] == pytest.approx(loss["true"])  # all have one and the same
        assert loss["null"] != pytest.approx(loss["true"], rel=1e-6)
