"""Aperio slides: the pixels must be OpenSlide's, whoever decodes them."""

import shutil

import numpy as np
import pytest
import tifffile

from raylarge.errors import SlideError
from raylarge.slides.aperio_reader import AperioPyramid
from raylarge.slides.openslide_reader import OpenSlidePyramid
from raylarge.slides.reader import open_slide

SLIDES = ("CMU-1-Small-Region.svs", "TCGA-CR-7395.svs")


@pytest.mark.parametrize("name", SLIDES)
def test_pixels_are_those_of_openslide(shared_data, name):
    path = str(shared_data / "wsi" / name)
    ours, theirs = AperioPyramid(path), OpenSlidePyramid(path)
    assert ours.sizes == theirs.sizes
    assert ours.mpp_hints == theirs.mpp_hints
    rng, spread = np.random.default_rng(0), []
    for level, (rows, columns) in enumerate(ours.sizes):
        for _ in range(4):
            top, left = int(rng.integers(rows - 300)), int(rng.integers(columns - 300))
            for box in ((top, left, 300, 300), (rows - 70, columns - 90, 70, 90)):
                found, expected = (one.read_level(level, *box) for one in (ours, theirs))
                assert (found == expected).all()
                spread.append(found.std())
    assert max(spread) > 40  # not all of it is glass
    ours.close()
    theirs.close()


def test_jpeg_tiles_are_read_by_tifffile_and_others_by_openslide(shared_data, monkeypatch):
    def never(*_):
        raise AssertionError("OpenSlide was asked")

    monkeypatch.setattr(OpenSlidePyramid, "read_level", never)
    jpeg, jpeg_2000 = (AperioPyramid(str(shared_data / "wsi" / name)) for name in SLIDES)
    assert jpeg.read_level(0, 0, 0, 300, 300).shape == (300, 300, 3)
    with pytest.raises(AssertionError, match="OpenSlide was asked"):
        jpeg_2000.read_level(0, 0, 0, 300, 300)


def test_tiles_that_are_left_out_are_openslides_matter(shared_data, tmp_path):
    path = tmp_path / "sparse.svs"
    shutil.copyfile(shared_data / "wsi" / SLIDES[0], path)
    with tifffile.TiffFile(path) as file:
        tag = file.pages[0].tags["TileByteCounts"]
        counts = list(tag.value)
    counts[5] = 0
    with tifffile.TiffFile(path, mode="r+b") as file:
        file.pages[0].tags["TileByteCounts"].overwrite(counts)
    with open_slide(str(path)) as slide:
        region = slide.read(0, 5 * 240, 240, 240)
    assert (region == 255).all()  # the one level has nothing to fill it from
    whole = AperioPyramid(str(path))
    assert whole._tiled == {}
    whole.close()


def test_a_damaged_tile_is_refused(shared_data, tmp_path):
    path = tmp_path / "bad.svs"
    shutil.copyfile(shared_data / "wsi" / SLIDES[0], path)
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        at, size = page.dataoffsets[12], page.databytecounts[12]
    with open(path, "r+b") as stream:
        stream.seek(at)
        stream.write(b"\xff" * size)
    with open_slide(str(path)) as slide:
        slide.read(0, 0, 240, 240)
        with pytest.raises(
            SlideError, match=r"slide .*bad\.svs: the file is damaged or incomplete"
        ):
            slide.read(240, 2 * 240, 240, 240)
