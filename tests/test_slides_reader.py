import os
import subprocess
import sys
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from raylarge import pyramid
from raylarge.errors import SlideError
from raylarge.slides import reader
from raylarge.slides.reader import Slide, open_slide


class Levels:
    """A pyramid in memory."""

    def __init__(self, *levels):
        self.levels = levels
        self.sizes = [level.shape[:2] for level in levels]
        self.mpp_hints = []
        self.icc_profile = self.georeference = None
        self.notes = []
        self.read = []

    def read_level(self, level, top, left, rows, columns):
        height, width = self.sizes[level]
        assert 0 <= top <= top + rows <= height
        assert 0 <= left <= left + columns <= width
        self.read.append(level)
        return self.levels[level][top : top + rows, left : left + columns]

    def close(self):
        self.read.append("closed")


@pytest.fixture(scope="module")
def smooth():
    """A picture without aliasing, so that resampling it twice is resampling it once."""
    y, x = np.mgrid[0:400, 0:520] / 60.0
    waves = [np.sin(3 * y + x), np.cos(2 * x - y), np.sin(x * y / 4)]
    return (127.5 + 100 * np.stack(waves, axis=-1)).round().astype(np.uint8)


@pytest.mark.parametrize(("mpp", "zoom"), [(0.5, 1), (0.454, 1), (0.549, 1), (0.25, 2), (0.44, 0)])
def test_ten_percent_around_the_base_count_as_base(smooth, mpp, zoom):
    slide = Slide("s", Levels(smooth), mpp, 0.5)
    assert slide.zoom == pytest.approx(zoom or 0.5 / mpp)
    assert slide.size_px == (int(400 / slide.zoom), int(520 / slide.zoom))


def test_base_pixels_are_read_as_they_are(smooth):
    slide = Slide("s", Levels(smooth), 0.5, 0.5)
    assert (slide.read(17, 40, 64, 32) == smooth[17:81, 40:72]).all()


def test_outside_the_slide_is_white(smooth):
    region = Slide("s", Levels(smooth), 0.5, 0.5).read(380, -10, 64, 32)
    assert (region[:20, 10:] == smooth[380:, :22]).all()
    assert (region[20:] == 255).all()
    assert (region[:, :10] == 255).all()
    assert (Slide("s", Levels(smooth), 0.5, 0.5).read(900, 900, 8, 8) == 255).all()


@pytest.mark.parametrize("mpp", [0.25, 0.2, 0.3137])
def test_a_region_is_the_crop_of_the_whole(smooth, mpp):
    slide = Slide("s", Levels(smooth), mpp, 0.5)
    whole = slide.read(0, 0, *slide.size_px)
    rows = [
        np.concatenate([slide.read(top, left, 32, 32) for left in range(0, 192, 32)], axis=1)
        for top in range(0, 128, 32)
    ]
    tiles = np.concatenate(rows)
    assert np.abs(tiles.astype(int) - whole[:128, :192]).max() <= 1  # fixed-point weights


def test_the_nearest_finer_level_is_read(smooth):
    half = smooth.reshape(200, 2, 260, 2, 3).mean(axis=(1, 3)).round().astype(np.uint8)
    quarter = half.reshape(100, 2, 130, 2, 3).mean(axis=(1, 3)).round().astype(np.uint8)
    levels = Levels(smooth, half, quarter)
    with Slide("s", levels, 0.25, 0.5) as slide:
        assert (slide.read(5, 6, 20, 30) == half[5:25, 6:36]).all()
        small = slide.read(0, 0, 96, 96, downscale=4)
    assert levels.read == [1, 2, "closed"]
    eighth = quarter[:48, :48].reshape(24, 2, 24, 2, 3).mean(axis=(1, 3))
    assert np.abs(small - eighth).mean() < 3


def test_a_thumbnail_is_read_in_strips(smooth, monkeypatch):
    monkeypatch.setattr(reader, "_STRIP_BYTES", 64 * 520 * 3)  # 64 of the file's rows
    levels = Levels(smooth)
    thumbnail = Slide("s", levels, 0.5, 0.5).thumbnail(8)
    assert thumbnail.shape == (50, 65, 3)
    assert len(levels.read) == 7
    means = smooth.reshape(50, 8, 65, 8, 3).mean(axis=(1, 3))
    assert np.abs(thumbnail - means).mean() < 1.5


def test_a_level_that_ends_before_the_last_pixel_of_a_thumbnail(smooth):
    small = np.asarray(Image.fromarray(smooth[:392, :512]).reduce(8))  # 397 rows // 8
    slide = Slide("s", Levels(smooth[:397, :512], small), 0.5, 0.5)
    assert (slide.thumbnail(8) == np.concatenate([small, small[-1:]])).all()


def test_levels_that_do_not_show_one_image_are_refused(smooth):
    sentence = r"^slide s: the file is damaged: its levels have sizes .*leave it out\.$"
    for odd, downscale in ((smooth[:100, :260], 4), (smooth[:100, :260], 3)):
        slide = Slide("s", Levels(smooth, odd), 0.5, 0.5)
        with pytest.raises(SlideError, match=sentence):
            slide.read(372, 0, 24, 24, downscale)


def test_a_40x_file_gives_the_tiles_of_the_20x_file(tmp_path, smooth):
    fine = np.asarray(Image.fromarray(smooth).resize((1040, 800), Image.Resampling.BICUBIC))
    pyramid.write_image(str(tmp_path / "20x.tif"), smooth, 0.5)
    pyramid.write_image(str(tmp_path / "40x.tif"), fine, 0.25)
    with (
        open_slide(str(tmp_path / "20x.tif")) as low,
        open_slide(str(tmp_path / "40x.tif")) as high,
    ):
        assert low.size_px == high.size_px == (400, 520)
        assert high.size_l0 == (800, 1040)
        assert high.zoom == 2
        for top, left in ((0, 0), (100, 200), (336, 456)):
            a, b = low.read(top, left, 64, 64), high.read(top, left, 64, 64)
            assert np.abs(a.astype(int) - b).max() <= 4


def files_that_are_not_right(folder, smooth, slides):
    """Broken and odd files; each must be one sentence of a SlideError."""
    pyramid.write_image(str(folder / "whole.tif"), smooth, 0.5)
    tifffile.imwrite(folder / "strips.tif", smooth, rowsperstrip=16, compression="zlib")
    Image.fromarray(smooth).save(folder / "whole.jpg")
    Image.fromarray(smooth).save(folder / "whole.png")
    for name in ("whole.tif", "strips.tif", "whole.jpg", "whole.png"):
        content = (folder / name).read_bytes()
        (folder / f"cut-{name}").write_bytes(content[: len(content) // 2])
    svs = (slides / "wsi/CMU-1-Small-Region.svs").read_bytes()
    (folder / "cut.svs").write_bytes(svs[: len(svs) // 2])
    (folder / "header.svs").write_bytes(svs[:3000])
    (folder / "empty.svs").write_bytes(b"")
    (folder / "noise.svs").write_bytes(bytes(range(256)) * 8)
    (folder / "text.svs").write_text("This is no slide.\n" * 50)
    (folder / "dangling.svs").symlink_to(folder / "nowhere.svs")
    (folder / "folder.svs").mkdir()
    header = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    check = zlib.crc32(header).to_bytes(4, "big")
    (folder / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n\0\0\0\r" + header + check + b"\0\1\0\0IDAT"
    )
    tifffile.imwrite(folder / "float.tif", smooth.astype(np.float32) / 255, photometric="rgb")
    tifffile.imwrite(folder / "signed.tif", smooth.astype(np.int16), photometric="rgb")
    grey = {"photometric": "minisblack", "planarconfig": "contig"}
    tifffile.imwrite(folder / "two.tif", smooth[..., :2], **grey)
    tifffile.imwrite(folder / "seven.tif", np.dstack([smooth, smooth, smooth[..., 0]]), **grey)
    Image.fromarray(smooth).convert("CMYK").save(folder / "cmyk.jpg")
    tifffile.imwrite(folder / "stack.tif", np.stack([smooth] * 3), photometric="rgb")


NOT_RIGHT = {
    "nowhere.svs": "does not exist; check the path",
    "dangling.svs": "does not exist; check the path",
    "folder.svs": "holds 0 DICOM slides; name a slide's file",
    "empty.svs": "is empty; fetch it again or leave it out",
    "noise.svs": "is neither a slide .* leave it out",
    "text.svs": "is neither a slide .* leave it out",
    "header.svs": "is damaged or incomplete .* leave it out",
    "cut.svs": "is damaged or incomplete .* leave it out",
    "cut-whole.tif": "is damaged or incomplete .* leave it out",
    "cut-strips.tif": "is damaged or incomplete .* leave it out",
    "cut-whole.jpg": "is damaged or incomplete .* leave it out",
    "cut-whole.png": "is damaged or incomplete .* leave it out",
    "bomb.png": "claims 60000 x 60000 pixels, and more than 536,870,912 .*`vips tiffsave",
    "float.tif": r"holds float32 samples, .* or set tile\.value_range=\[low,high\]",
    "signed.tif": r"holds int16 samples, .* or set tile\.value_range=\[low,high\]",
    "two.tif": r"has 2 bands and does not say which are red, green and blue; set tile\.bands=",
    "seven.tif": "has 7 bands and does not say which",
    "cmyk.jpg": "holds CMYK pixels, .*; convert it to 8-bit RGB",
    "stack.tif": r"holds several planes \(axes .*save the one",
}


@pytest.fixture(scope="module")
def not_right(tmp_path_factory, smooth, shared_data):
    folder = tmp_path_factory.mktemp("not-right")
    files_that_are_not_right(folder, smooth, shared_data)
    return folder


@pytest.mark.parametrize("name", NOT_RIGHT)
def test_a_file_that_is_not_right_is_one_sentence_with_the_cure(not_right, name):
    path = str(not_right / name)
    sentence = rf"^slide \S*{name}: the (?:file|folder) (?:{NOT_RIGHT[name]})[^\n]*\.$"
    with pytest.raises(SlideError, match=sentence), open_slide(path, 0.5) as slide:
        slide.read(0, 0, *slide.size_px)


@pytest.mark.parametrize("name", ["whole.tif", "strips.tif", "whole.jpg", "whole.png"])
def test_garbled_bytes_never_leak_a_parsers_exception(not_right, tmp_path, name):
    content = (not_right / name).read_bytes()
    rng = np.random.default_rng(0)
    seen = 0
    for _ in range(40):
        garbled = bytearray(content)
        for place in rng.integers(4, min(len(content), 4096), 12):
            garbled[place] = rng.integers(256)
        (tmp_path / name).write_bytes(garbled)
        try:
            with open_slide(str(tmp_path / name), 0.5) as slide:
                slide.read(0, 0, min(400, slide.size_px[0]), min(520, slide.size_px[1]))
        except SlideError:
            seen += 1
    assert seen > 5


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give its rights away in a test")
def test_a_file_that_may_not_be_read_is_one_sentence(tmp_path, smooth):
    path = tmp_path / "secret.tif"
    pyramid.write_image(str(path), smooth, 0.5)
    path.chmod(0)
    code = f"""
import os
from raylarge.slides.reader import open_slide
from raylarge.errors import SlideError
os.seteuid(65534)
try: open_slide({str(path)!r})
except SlideError as error: print(error)
"""
    for folder in (tmp_path, *list(tmp_path.parents)[:-2]):
        folder.chmod(folder.stat().st_mode | 0o011)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == f"slide {path}: the file may not be read; check its permissions.\n", (
        done.stderr
    )


def test_a_slide_smaller_than_a_tile_is_white_around(tmp_path, smooth):
    pyramid.write_image(str(tmp_path / "small.tif"), smooth[:20, :30], 0.5)
    with open_slide(str(tmp_path / "small.tif")) as slide:
        region = slide.read(0, 0, 256, 256)
        assert slide.thumbnail(8).shape == (3, 4, 3)
    assert (region[:20, :30] == smooth[:20, :30]).all()
    assert (region[20:] == 255).all()
    assert (region[:, 30:] == 255).all()


def test_a_slide_without_any_mpp_and_a_coarse_one_are_refused(tmp_path, smooth, shared_data):
    odd = str(shared_data / "wsi/TCGA-CR-7395.svs")
    with pytest.raises(SlideError, match=r"TCGA-CR-7395.*does not say its resolution.*tile\.mpp="):
        open_slide(odd)
    with open_slide(odd, mpp_override=0.25) as slide:
        assert slide.size_px == (1783, 2221)
        assert slide.read(800, 1000, 64, 64).std() > 10
    pyramid.write_image(str(tmp_path / "coarse.tif"), smooth, 0.7)
    with pytest.raises(SlideError, match=r"has 0\.7 um/px, coarser .*tile\.base_mpp=0\.7"):
        open_slide(str(tmp_path / "coarse.tif"))


def test_a_slide_lets_go_of_everything_at_the_end(tmp_path, smooth):
    pyramid.write_image(str(tmp_path / "made.tif"), smooth, 0.5)
    before = os.listdir("/proc/self/fd")
    with open_slide(str(tmp_path / "made.tif")) as slide:
        slide.read(0, 0, 8, 8)
    with pytest.raises(SlideError):
        open_slide(str(tmp_path / "made.tif"), base_mpp=0.1)
    assert os.listdir("/proc/self/fd") == before
