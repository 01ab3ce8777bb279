"""A view of a slide shows the slide's own pixels, shifted, turned and mirrored."""

import numpy as np
import pytest

from raylarge.slides.reader import open_slide
from raylarge.slides.view import View

SLIDE = "0123456789abcdef"
SIZE = (70, 50)


def views(count=17):
    return [View.of(number, SLIDE, 16, 2, seed=3) for number in range(count)]


def test_view_0_is_the_slide():
    assert View.of(0, SLIDE, 16, 2, seed=3).is_identity
    assert not any(view.is_identity for view in views()[1:])


def test_eight_views_show_the_eight_symmetries():
    pixels = np.arange(12).reshape(3, 4)
    seen = {view.turned(pixels).tobytes() + bytes(view.turned(pixels).shape) for view in views(8)}
    assert len(seen) == 8


def test_shifts_are_multiples_of_the_unit_and_smaller_than_a_tile():
    shifts = np.array([view.shift_px for view in views(200)])
    assert (shifts % 2 == 0).all()
    assert shifts.min() == 0
    assert shifts.max() == 14


@pytest.mark.parametrize("number", range(9))
def test_a_box_of_a_view_is_a_box_of_the_slide(number):
    pixels = np.random.default_rng(0).integers(0, 255, (*SIZE, 3))
    view = views()[number]
    top, left = view.shift_px
    whole = view.turned(pixels[top:, left:])
    assert whole.shape[:2] == view.size(SIZE)
    for box in [(0, 0, 8, 8), (5, 9, 20, 3), (30, 10, 1, 30)]:
        y, x, rows, columns = view.source(box, SIZE)
        shown = view.turned(pixels[y : y + rows, x : x + columns])
        r, c = box[:2]
        np.testing.assert_array_equal(shown, whole[r : r + box[2], c : c + box[3]])


@pytest.mark.parametrize("number", [1, 6, 7])
def test_a_slide_is_read_through_its_view(number, tiny_slide):
    view = View.of(number, SLIDE, 64, 8, seed=3)
    with open_slide(str(tiny_slide)) as slide, open_slide(str(tiny_slide), view=view) as viewed:
        pixels = slide.read(0, 0, *slide.size_px)
        top, left = view.shift_px
        whole = view.turned(pixels[top:, left:])
        assert viewed.size_px == whole.shape[:2]
        np.testing.assert_array_equal(viewed.read(10, 20, 40, 30), whole[10:50, 20:50])
        rows, columns = viewed.size_px
        corner = viewed.read(rows - 8, columns - 8, 8 + 64, 8 + 64)  # past the view and the slide
        np.testing.assert_array_equal(corner[:8, :8], whole[-8:, -8:])
        assert (corner[-1, -1] == 255).all()
        assert viewed.thumbnail(8).shape == (-(-rows // 8), -(-columns // 8), 3)


def test_a_mask_turns_with_its_slide():
    mask = np.random.default_rng(0).random((9, 7)) > 0.5  # of 70 x 50 base pixels, 8 a cell
    for number in range(9):
        view = View.of(number, SLIDE, 16, 8, seed=3)
        rows, columns = view.size((70, 50))
        shown = view.of_whole(mask, 8, (70, 50))
        assert shown.shape == (-(-rows // 8), -(-columns // 8))
        top, left = (side // 8 for side in view.shift_px)
        np.testing.assert_array_equal(shown, view.turned(mask[top:, left:]))
