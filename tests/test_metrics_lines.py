"""Window lines: planted grids of every kind are seen, pictures without a grid are not."""

import numpy as np
import pytest
import torch
from PIL import Image

from raylarge import images
from raylarge.metrics.lines import WindowLines, window_lines

SIDE, COUNT = 32, 8
SIZE = SIDE * COUNT
NONE, GRID = 2.5, 3.0
"""At most this without a grid, at least that with one."""


def floats(pixels):
    return images.to_float(np.clip(np.round(pixels), 0, 255).astype(np.uint8))


def texture(seed, size=(SIZE, SIZE), slope=1.5):
    """Coloured noise whose power falls as the frequency to the power of 2 slope, as tissue's."""
    rng = np.random.default_rng(seed)
    spectrum = np.fft.fft2(rng.standard_normal((3, *size)))
    y, x = np.meshgrid(np.fft.fftfreq(size[0]), np.fft.fftfreq(size[1]), indexing="ij")
    filtered = np.fft.ifft2(spectrum / np.hypot(np.hypot(y, x), 1 / max(size)) ** slope).real
    spread = filtered.std(axis=(1, 2), keepdims=True)
    return np.moveaxis(150 + 35 * filtered / spread, 0, -1)


def blocks(values):
    """One value per window, spread over its pixels."""
    return np.kron(values, np.ones((SIDE, SIDE)))[..., None]


def lines(picture, amount, rows=True, columns=True, offset=0):
    changed = picture.copy()
    if rows:
        changed[offset::SIDE] += amount
    if columns:
        changed[:, offset::SIDE] += amount
    return changed


def soft(picture, amount):
    """Seams that fade over a quarter of a window."""
    from_border = (np.arange(SIZE) + SIDE // 2) % SIDE - SIDE // 2
    fade = amount * np.exp(-0.5 * (from_border / (SIDE / 10)) ** 2)
    return picture + fade[:, None, None] + fade[None, :, None]


def contrast(picture, amount):
    gain = 1 + np.random.default_rng(0).uniform(-amount, amount, (COUNT, COUNT))
    return 150 + (picture - 150) * blocks(gain)


def steps(picture, amount):
    return picture + blocks(np.random.default_rng(0).normal(0, amount, (COUNT, COUNT)))


GRIDS = {
    "brighter lines": lambda x: lines(x, 8),
    "darker lines": lambda x: lines(x, -8),
    "lines of another colour": lambda x: lines(x, np.array([8, -8, 0])),
    "rows alone": lambda x: lines(x, 8, columns=False),
    "columns alone": lambda x: lines(x, 8, rows=False),
    "a grid with an offset": lambda x: lines(x, 8, offset=11),
    "steps between windows": lambda x: steps(x, 20),
    "another contrast in each window": lambda x: contrast(x, 0.6),
    "soft seams": lambda x: soft(x, 16),
}


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_planted_grid_is_seen(name, seed):
    picture = texture(seed)
    assert window_lines(floats(picture), SIDE) < NONE
    assert window_lines(floats(GRIDS[name](picture)), SIDE) > GRID


def test_a_stronger_grid_gives_a_larger_figure():
    picture = texture(2)
    found = [window_lines(floats(lines(picture, amount)), SIDE) for amount in (0, 6, 12, 24)]
    assert found == sorted(found)
    assert found[-1] > 3 * found[1]


def test_smooth_pictures_have_no_lines():
    y, x = np.mgrid[:SIZE, :SIZE]
    rng = np.random.default_rng(0)
    waves = 128 + 60 * np.sin(np.stack([y / 50, x / 70, (x + y) / 90], axis=-1))
    for picture in (
        np.full((SIZE, SIZE, 3), 90.0),
        np.stack([y / 4, x / 4, (x + y) / 8], axis=-1),
        waves,
        waves + rng.normal(0, 3, waves.shape),
    ):
        assert 0.4 < window_lines(floats(picture), SIDE) < NONE


def test_pictures_without_a_grid_give_about_one():
    found = [window_lines(floats(texture(seed)), SIDE) for seed in range(20)]
    assert 0.8 < np.median(found) < 1.5
    assert max(found) < GRID


def test_another_period_than_that_of_the_windows_does_not_count():
    """Neither lines of other windows nor the blocks of a JPEG."""
    picture = texture(3)
    other = picture.copy()
    other[::44] += 12
    other[:, ::44] += 12
    assert window_lines(floats(other), SIDE) < NONE
    blocky = picture.copy()
    blocky[::8] += 8
    blocky[:, ::8] += 8
    assert window_lines(floats(blocky), 2 * SIDE) < NONE


@pytest.mark.parametrize("size", [(SIZE, SIZE), (SIZE, 2 * SIDE), (3 * SIDE, SIZE + 7)])
@pytest.mark.parametrize("heights", [[1], [5, 32, 3], [64], [1000]])
def test_lines_do_not_depend_on_the_bands(size, heights):
    image = floats(texture(4, size))
    streamed, top, i = WindowLines(SIDE), 0, 0
    while top < size[0]:
        height = heights[i % len(heights)]
        streamed.add(image[:, top : top + height])
        top, i = top + height, i + 1
    assert streamed.value == pytest.approx(window_lines(image, SIDE), rel=1e-9)


def test_too_few_windows_and_other_widths_are_refused():
    with pytest.raises(ValueError, match="fewer than 4 windows of 32 px"):
        window_lines(torch.zeros(3, 3 * SIDE, 3 * SIDE), SIDE)
    with pytest.raises(ValueError, match="fewer than 4 windows"):
        _ = WindowLines(SIDE).value
    measure = WindowLines(SIDE)
    measure.add(torch.zeros(3, 4, 128))
    with pytest.raises(ValueError, match="rows of 64 px after rows of 128 px"):
        measure.add(torch.zeros(3, 4, 64))


def test_real_tissue_has_no_lines_until_they_are_planted(shared_data):
    Image.MAX_IMAGE_PIXELS = None
    section = Image.open(shared_data / "he_large" / "5714_HE_BT_D1.jpg")
    for y, x in [(4000, 3000), (4600, 5200), (5200, 4100), (3600, 4600)]:
        crop = np.asarray(section.crop((x, y, x + 512, y + 512)).convert("RGB")).astype(float)
        assert crop.std() > 20, "a crop without tissue proves nothing"
        for side in (32, 64, 128):
            assert window_lines(floats(crop), side) < GRID
        crop[::64] += 8
        assert window_lines(floats(crop), 64) > GRID
