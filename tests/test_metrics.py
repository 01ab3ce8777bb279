import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raylarge.metrics.consistency import WindowError, cross_scale_error, window_error
from raylarge.metrics.seams import SeamRatio, seam_ratio
from raylarge.resample import downsample, upsample

SIDE = 32
SIZES = [(32, 64), (64, 64), (96, 160), (128, 128), (160, 96)]
heights = st.lists(st.integers(1, 150), min_size=1, max_size=6)


def picture(size, seed=0):
    return torch.rand(3, *size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def fed(metric, image, heights):
    top, k = 0, 0
    while top < image.shape[1]:
        metric.add(image[:, top : top + heights[k % len(heights)]])
        top, k = top + heights[k % len(heights)], k + 1
    return metric.value


def window_error_by_definition(image, guide, factor):
    """Patch by patch, each made small by itself."""
    q = SIDE // factor
    squares, blocks = [], []
    for r in range(image.shape[1] // SIDE):
        for c in range(image.shape[2] // SIDE):
            patch = image[:, r * SIDE : (r + 1) * SIDE, c * SIDE : (c + 1) * SIDE]
            block = guide[:, r * q : (r + 1) * q, c * q : (c + 1) * q]
            squares.append((downsample(patch, factor) - block).square().sum())
            blocks.append(block.flatten(1))
    covered = torch.cat(blocks, dim=1)
    spread = (covered - covered.mean(dim=1, keepdim=True)).norm()
    return float(sum(squares).sqrt() / spread)


def seam_ratio_by_definition(image, side):
    border, inside = [], []
    for axis in (1, 2):
        steps = image.diff(dim=axis).abs().mean(dim=0).movedim(axis - 1, 0)
        for i, line in enumerate(steps):
            place = (i + 1) % side
            if place == 0:
                border.append(line.mean())
            elif 2 <= place <= side - 2:
                inside.append(line.mean())
    return float(sum(border) / len(border) / (sum(inside) / len(inside)))


@pytest.mark.parametrize("size", SIZES)
@settings(max_examples=10, deadline=None)
@given(heights=heights)
def test_the_window_error_does_not_depend_on_the_bands(size, heights):
    factor = 1 << math.ceil(math.log2(max(size) / SIDE))
    image, guide = picture(size), picture((SIDE, SIDE), seed=1)
    expected = window_error_by_definition(image, guide, factor)
    assert window_error(image, guide) == pytest.approx(expected, rel=1e-6)
    assert fed(WindowError(guide, size), image, heights) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("size", SIZES)
@settings(max_examples=10, deadline=None)
@given(heights=heights)
def test_the_seam_ratio_does_not_depend_on_the_bands(size, heights):
    image = picture(size)
    expected = seam_ratio_by_definition(image, SIDE)
    assert seam_ratio(image, SIDE) == pytest.approx(expected, rel=1e-6)
    assert fed(SeamRatio(SIDE), image, heights) == pytest.approx(expected, rel=1e-6)


def test_the_two_cross_scale_errors_differ_only_at_borders():
    guide = upsample(picture((8, 8)), 4)
    image = upsample(guide, 4)
    window, mosaic = window_error(image, guide), cross_scale_error(image, guide)
    assert window != mosaic
    assert window == pytest.approx(mosaic, abs=0.05)
    whole = picture((SIDE, SIDE))  # one patch is a mosaic of one
    assert window_error(whole, guide) == pytest.approx(cross_scale_error(whole, guide), rel=1e-6)


def test_values_that_are_known():
    blocks = picture((4, 4))
    guide = blocks.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)
    agreeing = blocks.repeat_interleave(SIDE, dim=1).repeat_interleave(SIDE, dim=2)
    assert window_error(agreeing, guide) == pytest.approx(0, abs=1e-6)
    assert cross_scale_error(agreeing, guide) > 0.05  # A reaches across the borders of patches
    flat = guide.mean(dim=(1, 2), keepdim=True).expand(3, 128, 128)
    assert window_error(flat, guide) == pytest.approx(1, abs=1e-5)
    ramp = torch.arange(96.0).expand(3, 96, 96) / 96
    assert seam_ratio(ramp, SIDE) == pytest.approx(1, abs=1e-4)


def test_memory_is_rows_of_one_patch():
    """What is kept between bands does not grow with the rows that went by."""

    def kept(metric):
        return sum(x.numel() for x in vars(metric).values() if isinstance(x, torch.Tensor))

    error, ratio, guide = WindowError(picture((SIDE, SIDE)), (512, 256)), SeamRatio(SIDE), []
    for _ in range(16):
        for metric in (error, ratio):
            metric.add(picture((SIDE, 256)))
        guide.append((kept(error), kept(ratio)))
    assert len(set(guide)) == 1
    assert kept(error) + kept(ratio) < 3 * SIDE * 256


def test_rows_that_do_not_fit_are_refused():
    guide = picture((SIDE, SIDE))
    error = WindowError(guide, (64, 64))
    with pytest.raises(ValueError, match="0 rows of 64 were added"):
        _ = error.value
    with pytest.raises(ValueError, match="do not fit"):
        error.add(picture((8, 32)))
    error.add(picture((60, 64)))
    with pytest.raises(ValueError, match="do not fit"):
        error.add(picture((5, 64)))
    with pytest.raises(ValueError, match="not made of patches"):
        WindowError(guide, (64, 60))
    ratio = SeamRatio(SIDE)
    ratio.add(picture((SIDE, SIDE)))
    with pytest.raises(ValueError, match="no borders"):
        _ = ratio.value
    with pytest.raises(ValueError, match="rows of 64 px after rows of 32 px"):
        ratio.add(picture((4, 64)))
