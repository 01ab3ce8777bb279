import numpy as np
import pytest

from raylarge.slides.procedural import Scene
from raylarge.slides.reader import open_slide
from raylarge.slides.tissue import otsu, tissue_fraction, tissue_mask


def page(colour, rows=60, columns=80):
    grain = np.random.default_rng(0).integers(-3, 4, (rows, columns, 3))
    return np.clip(np.array(colour) + grain, 0, 255).astype(np.uint8)


GLASS, PINK, PURPLE = (243, 241, 243), (225, 150, 190), (110, 70, 150)


def test_a_patch_of_tissue_is_found():
    slide = page(GLASS)
    slide[20:40, 30:60] = page(PINK, 20, 30)
    slide[25:30, 35:40] = page(PURPLE, 5, 5)
    mask = tissue_mask(slide)
    inside = np.zeros(mask.shape, bool)
    inside[20:40, 30:60] = True
    assert (mask & inside).sum() / (mask | inside).sum() > 0.85


@pytest.mark.parametrize("colour", [GLASS, (255, 255, 255), (0, 0, 0), (128, 128, 128)])
def test_a_slide_without_tissue_has_none(colour):
    assert not tissue_mask(page(colour)).any()


@pytest.mark.parametrize("colour", [PINK, PURPLE])
def test_a_slide_full_of_tissue_is_full(colour):
    assert tissue_mask(page(colour)).all()


def test_two_stains_without_glass_are_both_tissue():
    slide = page(PINK)
    slide[:, 40:] = page((90, 30, 140), 60, 40)
    assert tissue_mask(slide).all()


def test_otsu_splits_two_heaps():
    values = np.concatenate([np.full((5, 20), 20.0), np.full((5, 20), 120.0)])
    assert 20 < otsu(values) < 120


def test_shares_of_cells():
    mask = np.zeros((10, 10), bool)
    mask[:4, :6] = True
    shares = tissue_fraction(mask, 4.0, (3, 3))
    assert shares[:, 0] == pytest.approx([1.0, 0.0, 0.0])
    assert shares[0] == pytest.approx([1.0, 0.5, 0.0])
    full = tissue_fraction(np.ones((10, 10), bool), 4.0, (3, 3))
    assert full[2, 2] == pytest.approx(0.25)  # the cell's rest lies beyond the slide
    assert full[:2, :2] == pytest.approx(1.0)
    uneven = tissue_fraction(mask, 2.5, (4, 4))
    assert uneven.sum() * 2.5**2 == pytest.approx(mask.sum())


def test_the_procedural_outline_is_found():
    scene = Scene(5, (400.0, 400.0))
    picture = scene.region(0, 0, 800, 800, 0.5)
    small = picture.reshape(100, 8, 100, 8, 3).mean(axis=(1, 3)).astype(np.uint8)
    y, x = (np.arange(100)[:, None] + 0.5) * 4, (np.arange(100)[None] + 0.5) * 4
    outline = scene.depth_um(y, x) > 0
    mask = tissue_mask(small)
    assert (mask & ~outline).sum() < 0.03 * outline.sum()
    assert (mask & outline).sum() > 0.6 * outline.sum()  # fat and lumina are no tissue


def test_a_real_slide(shared_data):
    with open_slide(str(shared_data / "wsi/CMU-1-Small-Region.svs")) as slide:
        mask = tissue_mask(slide.thumbnail(8))
    assert 0.25 < mask.mean() < 0.45  # about 60 % of it is blank
    assert mask[180:, 120:160].mean() > 0.9
    assert mask[:100, :60].mean() < 0.02
