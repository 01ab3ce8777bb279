"""What the driver of a training says when Ray itself ends."""

import pytest

from raylarge.errors import UserError
from raylarge.train.ray_trainer import _watched


@pytest.mark.parametrize("code", [None, 1])
def test_a_ray_that_ends_is_a_sentence_and_no_silent_exit(tmp_path, code):
    def work():
        raise SystemExit(code)  # as `ray.get` does when its connection is gone

    with pytest.raises(UserError, match=r"Ray ended while .* the same command goes on from it"):
        _watched(work, str(tmp_path), print)


def test_what_the_work_returns_or_raises_comes_through(tmp_path):
    assert _watched(lambda: 3, str(tmp_path), print) == 3
    with pytest.raises(ZeroDivisionError):
        _watched(lambda: 1 / 0, str(tmp_path), print)
