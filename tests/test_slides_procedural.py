import numpy as np
import pytest

from raylarge.slides import procedural
from raylarge.slides.procedural import Scene
from raylarge.slides.reader import open_slide


@pytest.fixture(scope="module")
def scene():
    return Scene(7, (300.0, 320.0))


@pytest.fixture(scope="module")
def whole(scene):
    return scene.region(0, 0, 600, 640, 0.5)


@pytest.mark.parametrize(("top", "left", "rows", "columns"), [(0, 0, 64, 64), (201, 333, 130, 77)])
def test_a_region_is_a_pure_function_of_its_place(scene, whole, top, left, rows, columns):
    region = scene.region(top, left, rows, columns, 0.5)
    assert (region == whole[top : top + rows, left : left + columns]).all()


def test_seeds_differ_and_repeat(scene, whole):
    assert (Scene(7, (300.0, 320.0)).region(200, 200, 64, 64, 0.5) == whole[200:264, 200:264]).all()
    other = Scene(8, (300.0, 320.0)).region(200, 200, 64, 64, 0.5)
    assert (other != whole[200:264, 200:264]).mean() > 0.5


def test_it_looks_like_he(whole):
    r, g, b = (whole[..., i].astype(int) for i in range(3))
    glass = (whole.min(axis=-1) > 225).mean()
    purple = ((b > r + 10) & (r < 150)).mean()
    pink = ((r > g + 40) & (r > b) & (r > 190)).mean()
    assert 0.2 < glass < 0.7
    assert 0.03 < purple < 0.3
    assert 0.1 < pink < 0.6
    assert whole[:8].min() > 225  # glass at the borders
    assert whole[:, :8].min() > 225


def test_the_written_slide_is_the_scene(tmp_path, monkeypatch, whole):
    monkeypatch.setattr(procedural, "_BLOCK_PX", 256)
    procedural.write(str(tmp_path / "made.tif"), (600, 640), 7)
    with open_slide(str(tmp_path / "made.tif")) as slide:
        assert slide.mpp == pytest.approx(0.5)
        assert (slide.read(0, 0, 600, 640) == whole).all()


def test_the_same_slide_at_twice_the_power_gives_the_same_tiles(tmp_path, whole):
    """Tolerance: shrinking a sharper drawing is not drawing at half the resolution, so edges of
    a pixel's width differ; on average by less than 2.5 levels of 255."""
    procedural.write(str(tmp_path / "40x.tif"), (1200, 1280), 7, mpp=0.25)
    with open_slide(str(tmp_path / "40x.tif")) as slide:
        assert (slide.zoom, slide.size_px) == (2.0, (600, 640))
        tiles = slide.read(0, 0, 600, 640)
    difference = np.abs(tiles.astype(int) - whole)
    assert difference.mean() < 2.5
    assert np.percentile(difference, 99) < 30
    shifted = np.abs(np.roll(tiles, 2, axis=0).astype(int) - whole).mean()
    assert shifted > 2 * difference.mean()  # the tolerance tells a shift of two pixels
