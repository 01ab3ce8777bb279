import json
import subprocess
import sys
import threading
import tracemalloc
from fractions import Fraction

import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from raylarge import pyramid
from raylarge.errors import UserError
from raylarge.slides.reader import open_slide

MARKS = {"Order": json.dumps({"size": [700, 900]}), "OrderDigest": "0a1b", "Origin": "novel"}


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (300, 700, 3), dtype=np.uint8)


def scene(rows, columns):
    """A smooth picture: JPEG keeps it."""
    y, x = np.mgrid[0:rows, 0:columns] / 90.0
    waves = [np.sin(2 * y + x), np.cos(x - y), np.sin(x + y / 3)]
    return (127.5 + 90 * np.stack(waves, axis=-1)).round().astype(np.uint8)


def cut(image, heights):
    """The image in bands whose heights are taken in turn."""
    top, k = 0, 0
    while top < len(image):
        yield image[top : top + heights[k % len(heights)]]
        top, k = top + heights[k % len(heights)], k + 1


def halves(image):
    """All levels below an image, by the definition."""
    while max(image.shape[:2]) > pyramid.TILE_PX and min(image.shape[:2]) >= 2:
        rows, columns = (side // 2 for side in image.shape[:2])
        cells = image[: 2 * rows, : 2 * columns].astype(int).reshape(rows, 2, columns, 2, 3)
        image = ((cells.sum(axis=(1, 3)) + 2) // 4).astype(np.uint8)
        yield image


def levels(path):
    with tifffile.TiffFile(path) as file:
        return [page.asarray() for page in file.pages]


def test_a_pyramid_opens_in_openslide(tmp_path, picture):
    path = str(tmp_path / "deep" / "made.tif")
    pyramid.write_image(path, picture, 0.5, MARKS)
    with openslide.OpenSlide(path) as slide:
        assert slide.properties["openslide.vendor"] == "generic-tiff"
        assert slide.level_dimensions == ((700, 300), (350, 150), (175, 75))
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.5)
        assert float(slide.properties["openslide.mpp-y"]) == pytest.approx(0.5)
        assert slide.properties["tiff.ImageDescription"].startswith("Synthetic image made by")
        assert "sRGB" in slide.color_profile.profile.profile_description
        found = [
            np.asarray(slide.read_region((0, 0), level, size))[..., :3]
            for level, size in enumerate(slide.level_dimensions)
        ]
    for mine, expected in zip(found, [picture, *halves(picture)], strict=True):
        assert (mine == expected).all()
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["made.tif"]


def test_jpeg_is_the_default_and_keeps_what_matters(tmp_path):
    path, image = str(tmp_path / "made.tif"), scene(700, 900)
    pyramid.write(path, cut(image, [64]), (700, 900), 0.25, MARKS)
    with tifffile.TiffFile(path) as file:
        first, second = file.pages[0], file.pages[1]
        assert first.compression == tifffile.COMPRESSION.JPEG
        assert first.tags["YCbCrSubSampling"].value == (2, 2)
        assert first.tile == (256, 256)
        assert not first.is_reduced
        assert second.is_reduced
        # Each level tells its own resolution, in pixels per centimetre.
        assert first.tags["ResolutionUnit"].value == 3
        assert Fraction(*first.tags["XResolution"].value) == 40_000
        assert Fraction(*second.tags["XResolution"].value) == 20_000
    for mine, expected in zip(levels(path), [image, *halves(image)], strict=True):
        assert np.abs(mine.astype(int) - expected).max() < 12
        assert np.abs(mine.astype(int) - expected).mean() < 1.5
    with open_slide(path) as slide:
        assert slide.mpp == pytest.approx(0.25)
        assert slide.size_px == (350, 450)
        assert np.abs(slide.read(0, 0, 350, 450).astype(int) - next(halves(image))).mean() < 1.5


def test_it_says_in_itself_that_it_is_synthetic_and_from_which_order(tmp_path, picture):
    path = tmp_path / "made.tif"
    pyramid.write_image(str(path), picture, 0.5, {**MARKS, "Synthetic": "false", "Note": "Drüse"})
    fields = {"Software": "raylarge", "Synthetic": "true", "Note": "Drüse"}
    assert pyramid.read_text(path) == {**MARKS, **fields}
    tifffile.imwrite(tmp_path / "other.tif", picture)
    with pytest.raises(UserError, match=r"other\.tif is not a pyramid that raylarge wrote"):
        pyramid.read_text(tmp_path / "other.tif")


def test_without_a_resolution_none_is_told(tmp_path, picture):
    path = str(tmp_path / "made.tif")
    pyramid.write_image(path, picture, None)
    with openslide.OpenSlide(path) as slide:
        assert "openslide.mpp-x" not in slide.properties
    with pytest.raises(UserError, match="does not say its resolution"):
        open_slide(path)


@settings(max_examples=12, deadline=None)
@given(
    heights=st.lists(st.integers(1, 400), min_size=1, max_size=6),
    size=st.tuples(st.integers(1, 800), st.integers(1, 600)),
    compression=st.sampled_from(["jpeg", "deflate"]),
)
def test_the_bytes_do_not_depend_on_how_the_bands_are_cut(
    tmp_path_factory, heights, size, compression
):
    folder = tmp_path_factory.mktemp("cuts")
    image = np.random.default_rng(size).integers(0, 256, (*size, 3), dtype=np.uint8)
    for name, bands in (("whole", [image]), ("cut", cut(image, heights))):
        pyramid.write(str(folder / name), bands, size, 0.5, {}, compression)
    assert (folder / "whole").read_bytes() == (folder / "cut").read_bytes()
    if compression == "deflate":
        found = levels(folder / "cut")
        for mine, expected in zip(found, [image, *halves(image)], strict=True):
            assert (mine == expected).all()


@pytest.mark.parametrize(
    ("bands", "message"),
    [
        ([(100, 700), (199, 700)], "end after 299 rows"),
        ([(100, 700), (201, 700)], "ends in row 301"),
        ([(100, 700), (200, 699)], r"a band of \(200, 699, 3\)"),
    ],
)
def test_bands_that_do_not_fit_leave_nothing_behind(tmp_path, bands, message):
    pieces = [np.zeros((*shape, 3), np.uint8) for shape in bands]
    with pytest.raises(ValueError, match=message):
        pyramid.write(str(tmp_path / "made.tif"), pieces, (300, 700), 0.5, {})
    assert list(tmp_path.iterdir()) == []


def test_a_row_too_many_is_seen_behind_full_strips(tmp_path):
    pieces = [np.zeros((256, 32, 3), np.uint8), np.zeros((1, 32, 3), np.uint8)]
    with pytest.raises(ValueError, match="ends in row 257"):
        pyramid.write(str(tmp_path / "made.tif"), pieces, (256, 32), 0.5, {})


def test_a_failure_keeps_the_old_file(tmp_path, picture):
    path = tmp_path / "made.tif"
    pyramid.write_image(str(path), picture, 0.5)
    before = path.read_bytes()

    def failing():
        yield picture[:280]
        raise RuntimeError("the worker is gone")

    with pytest.raises(RuntimeError, match="the worker is gone"):
        pyramid.write(str(path), failing(), (300, 700), 0.5, {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("mpp", "compression", "message"),
    [(0.5, "webp", r"compression 'webp' is not jpeg or deflate\."), (0.0, "jpeg", "above 0")],
)
def test_what_cannot_be_is_refused(tmp_path, picture, mpp, compression, message):
    with pytest.raises(UserError, match=message):
        pyramid.write(str(tmp_path / "made.tif"), [picture], (300, 700), mpp, {}, compression)


def test_offsets_of_64_bits_where_they_may_be_needed(tmp_path, picture, monkeypatch):
    for name, limit in (("small", picture.nbytes), ("big", picture.nbytes - 1)):
        monkeypatch.setattr(pyramid, "_BIG_BYTES", limit)
        pyramid.write_image(str(tmp_path / name), picture, 0.5)
        with tifffile.TiffFile(tmp_path / name) as file:
            assert file.is_bigtiff == (name == "big")
        with openslide.OpenSlide(tmp_path / name) as slide:
            assert slide.level_count == 3


def test_two_files_may_be_written_at_once(tmp_path, picture):
    """The codec's options are not shared: tifffile writes into them."""
    paths = [tmp_path / f"{k}.tif" for k in range(4)]
    writers = [
        threading.Thread(target=pyramid.write, args=(str(path), [picture], (300, 700), 0.5, {}))
        for path in paths
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len({path.read_bytes() for path in paths}) == 1


@pytest.mark.s3
def test_a_pyramid_in_an_object_store(s3_bucket, tmp_path, picture, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    pyramid.write(f"{s3_bucket}/made/image.tif", cut(picture, [100]), (300, 700), 0.5, {})
    assert list(tmp_path.iterdir()) == []
    with open_slide(f"{s3_bucket}/made/image.tif") as slide:
        assert (slide.size_px, slide.mpp) == ((300, 700), pytest.approx(0.5))


def peak_bytes(path, rows, columns):
    band = scene(64, columns)
    bands = (band for _ in range(rows // 64))
    tracemalloc.start()
    pyramid.write(str(path), bands, (rows, columns), 0.5, {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_does_not_grow_with_the_height(tmp_path, monkeypatch):
    monkeypatch.setattr(pyramid, "_ENCODE_BYTES", 1 << 20)
    peak_bytes(tmp_path / "warm.tif", 256, 512)
    low, high = (peak_bytes(tmp_path / "made.tif", rows, 512) for rows in (8192, 32_768))
    assert high < 1.1 * low + 200_000  # offsets and lengths of the tiles are all that grows
    assert high < 32_768 * 512 * 3 / 2


MEASURE = """
import resource, sys
import numpy as np
from pathlib import Path
from raylarge import pyramid
def mib(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) // 1024
path, rows, columns = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
band = np.random.default_rng(0).integers(0, 256, (64, columns, 3), dtype=np.uint8)
pyramid.write(path, [band[:, :256]] * 8, (512, 256), 0.5, {})
Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
before = mib("VmRSS")
pyramid.write(path, (band for _ in range(rows // 64)), (rows, columns), 0.5, {})
whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
print(mib("VmHWM") - before, whole)
"""


@pytest.mark.slow
def test_peak_memory_of_very_large_images(tmp_path):
    """The process grows by a few strips of 256 rows: not by the image, whatever its height."""
    grown = {}
    for rows, columns in ((4096, 4096), (16_384, 4096), (16_384, 16_384)):
        path = str(tmp_path / "made.tif")
        command = [sys.executable, "-c", MEASURE, path, str(rows), str(columns)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        grown[rows, columns], peak = (int(word) for word in done.stdout.split())
        with openslide.OpenSlide(path) as slide:
            assert slide.dimensions == (columns, rows)
        print(f"{rows} x {columns}: grew by {grown[rows, columns]} MiB to {peak} MiB")
    strip_mib = 256 * 16_384 * 3 / 2**20  # 12; the image has 768
    assert grown[16_384, 4096] < grown[4096, 4096] + 16
    assert grown[16_384, 16_384] < 8 * strip_mib
