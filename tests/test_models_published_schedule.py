"""Schedules of checkpoints in any precision: the decimals that their authors wrote come back."""

import pytest
import torch

from raylarge.diffusion.schedule import Schedule
from raylarge.errors import UserError
from raylarge.models.published_schedule import schedule_from_published

KINDS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "schedule",
    [
        Schedule(),
        Schedule("scaled_linear", 1000, 0.00085, 0.012),
        Schedule("linear", 1000, 0.0015, 0.0195),
        Schedule("linear", 1000, 0.0001, 0.02),
        Schedule("linear", 4000, 0.0001, 0.02),
    ],
)
def test_rounded_betas_are_recognised(schedule, kind):
    stored = {"betas": schedule.betas.to(kind)}
    assert schedule_from_published(stored) == schedule
    assert schedule_from_published({"state_dict": stored}) == schedule


@pytest.mark.parametrize("kind", KINDS)
def test_other_betas_are_refused_in_any_precision(kind):
    betas = Schedule().betas
    slightly = betas.clone()
    slightly[500] *= 1.05
    for other in (Schedule("squaredcos").betas, slightly, betas * float("nan")):
        with pytest.raises(UserError, match="are neither scaled_linear nor linear"):
            schedule_from_published({"betas": other.to(kind)})


def test_betas_that_are_whole_numbers_are_refused():
    with pytest.raises(UserError, match=r"betas or scale_factor are torch\.int64, not fractions"):
        schedule_from_published({"betas": torch.arange(1, 1001)})
