import numpy as np
import pytest
import tifffile
from PIL import Image

from raylarge import pyramid
from raylarge.errors import UserError
from raylarge.slides import reader
from raylarge.slides.image_reader import LIMIT_PX
from raylarge.slides.openslide_reader import _mpp_hints
from raylarge.slides.reader import Slide, open_slide, resolve_mpp


class Levels:
    """A pyramid in memory."""

    def __init__(self, *levels):
        self.levels = levels
        self.sizes = [level.shape[:2] for level in levels]
        self.mpp_hints = []
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


def test_the_first_plausible_source_of_mpp_wins():
    properties = {
        "tiff.XResolution": "20000",
        "tiff.ResolutionUnit": "centimeter",
        "openslide.objective-power": "40",
        "aperio.MPP": "0.26",
        "openslide.mpp-x": "0.27",
    }
    expected = [0.27, 0.26, 0.5, 0.25]
    for name in ("openslide.mpp-x", "aperio.MPP", "tiff.XResolution", None):
        assert resolve_mpp("a", None, _mpp_hints(properties)) == pytest.approx(expected.pop(0))
        properties.pop(name, None)
    assert expected == []
    assert resolve_mpp("a", 0.7, _mpp_hints(properties)) == 0.7
    assert _mpp_hints({"aperio.AppMag": "20", "openslide.mpp-x": "?"}) == [("aperio.AppMag", 0.5)]


def test_a_screen_resolution_is_no_mpp():
    hints = _mpp_hints({"tiff.XResolution": "72", "tiff.ResolutionUnit": "inch"})
    assert hints == [("TIFF resolution", pytest.approx(352.8, abs=0.1))]
    with pytest.raises(
        UserError, match=r"slide s\.tif only says TIFF resolution 352.8.*tile\.mpp="
    ):
        resolve_mpp("s.tif", None, hints)
    with pytest.raises(UserError, match=r"slide s\.png does not say its resolution.*tile\.mpp="):
        resolve_mpp("s.png", None, [])
    with pytest.raises(UserError, match=r"tile\.mpp=0\.0 for slide s: it must be above 0"):
        resolve_mpp("s", 0.0, [])


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
    monkeypatch.setattr(reader, "_STRIP_PX", 64)
    levels = Levels(smooth)
    thumbnail = Slide("s", levels, 0.5, 0.5).thumbnail(8)
    assert thumbnail.shape == (50, 65, 3)
    assert len(levels.read) == 7
    means = smooth.reshape(50, 8, 65, 8, 3).mean(axis=(1, 3))
    assert np.abs(thumbnail - means).mean() < 1.5


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


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_plain_images_are_slides_of_one_level(tmp_path, smooth, suffix):
    path = str(tmp_path / f"plain.{suffix}")
    Image.fromarray(smooth).save(path, **({"quality": 95} if suffix == "jpg" else {}))
    with open_slide(path, mpp_override=0.5) as slide:
        assert slide.size_l0 == (400, 520)
        error = np.abs(slide.read(10, 20, 64, 64).astype(int) - smooth[10:74, 20:84])
    assert error.max() <= (12 if suffix == "jpg" else 0)


@pytest.mark.parametrize("bands", [1, 4])
def test_other_bands_become_rgb(tmp_path, smooth, bands):
    planes = np.dstack([smooth, smooth[..., :1]])[..., :bands].squeeze()
    kind = "rgb" if bands == 4 else "minisblack"
    tifffile.imwrite(tmp_path / "bands.tif", planes, photometric=kind)
    with open_slide(str(tmp_path / "bands.tif"), mpp_override=0.5) as slide:
        region = slide.read(0, 0, 64, 64)
    expected = smooth[:64, :64, :3] if bands == 4 else smooth[:64, :64, :1].repeat(3, axis=2)
    assert (region == expected).all()


def test_a_transparent_png_lies_on_white(tmp_path):
    Image.new("RGBA", (64, 64), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    with open_slide(str(tmp_path / "clear.png"), mpp_override=0.5) as slide:
        assert (slide.read(0, 0, 64, 64) == 255).all()


def test_the_resolution_of_an_image_file_counts_where_plausible(tmp_path, smooth):
    Image.fromarray(smooth).save(tmp_path / "fine.png", dpi=(101_600, 101_600))
    with open_slide(str(tmp_path / "fine.png")) as slide:
        assert slide.mpp == pytest.approx(0.25, rel=1e-3)


def broken_files(tmp_path, smooth):
    pyramid.write_image(str(tmp_path / "whole.tif"), smooth, 0.5)
    content = (tmp_path / "whole.tif").read_bytes()
    Image.fromarray(smooth).save(tmp_path / "whole.jpg")
    photo = (tmp_path / "whole.jpg").read_bytes()
    return {
        "empty.svs": b"",
        "noise.svs": bytes(range(256)) * 8,
        "cut.tif": content[: len(content) // 2],
        "cut.jpg": photo[: len(photo) // 2],
    }


@pytest.mark.parametrize("name", ["empty.svs", "noise.svs", "cut.tif", "cut.jpg"])
def test_a_broken_file_is_one_sentence_with_the_cure(tmp_path, smooth, name):
    (tmp_path / name).write_bytes(broken_files(tmp_path, smooth)[name])
    message = rf"slide .*{name} .*leave it out\."
    path = str(tmp_path / name)
    with pytest.raises(UserError, match=message) as caught, open_slide(path, 0.5) as slide:
        slide.read(0, 0, *slide.size_px)
    assert "\n" not in str(caught.value)


def test_missing_coarse_and_huge_slides_are_refused(tmp_path, smooth, monkeypatch):
    with pytest.raises(UserError, match=r"nowhere\.svs does not exist"):
        open_slide(str(tmp_path / "nowhere.svs"))
    pyramid.write_image(str(tmp_path / "coarse.tif"), smooth, 0.7)
    with pytest.raises(UserError, match=r"has 0\.7 um/px, coarser .*tile\.base_mpp=0\.7"):
        open_slide(str(tmp_path / "coarse.tif"))
    tifffile.imwrite(tmp_path / "huge.tif", smooth, rowsperstrip=400)
    monkeypatch.setattr("raylarge.slides.image_reader.LIMIT_PX", 1000)
    with pytest.raises(UserError, match=r"huge\.tif has more than 1,000 pixels.*pyramidal TIFF"):
        open_slide(str(tmp_path / "huge.tif"), mpp_override=0.5)
    assert LIMIT_PX > 1e8


def test_real_slides(shared_data):
    with open_slide(str(shared_data / "wsi/CMU-1-Small-Region.svs")) as slide:
        assert (slide.mpp, slide.zoom, slide.size_px) == (0.499, 1.0, (2967, 2220))
        nuclei, glass = slide.read(1500, 1000, 64, 64), slide.read(0, 0, 64, 64)
        assert nuclei.mean() < 200 < glass.mean()
    odd = str(shared_data / "wsi/TCGA-CR-7395.svs")
    with pytest.raises(UserError, match=r"TCGA-CR-7395.*does not say its resolution.*tile\.mpp="):
        open_slide(odd)
    with open_slide(odd, mpp_override=0.25) as slide:
        assert slide.size_px == (1783, 2221)
        assert slide.read(800, 1000, 64, 64).std() > 10
    with pytest.raises(UserError, match=r"broken\.svs is neither .*fetch it again or leave it out"):
        open_slide(str(shared_data / "wsi/broken.svs"))


@pytest.mark.s3
def test_an_object_is_fetched_once_per_version(s3_bucket, smooth, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    url = f"{s3_bucket}/slides/made.tif"
    pyramid.write_image(url, smooth, 0.5)
    first = reader.local_copy(url)
    before = [(file.name, file.stat().st_mtime_ns) for file in tmp_path.rglob("*.tif")]
    with open_slide(url) as slide:
        assert (slide.read(0, 0, *slide.size_px) == smooth).all()
    assert [(file.name, file.stat().st_mtime_ns) for file in tmp_path.rglob("*.tif")] == before
    pyramid.write_image(url, smooth[::-1], 0.5)
    second = reader.local_copy(url)
    assert second != first
    with open_slide(url) as slide:
        assert (slide.read(0, 0, *slide.size_px) == smooth[::-1]).all()
    with pytest.raises(UserError, match="does not exist"):
        open_slide(f"{s3_bucket}/slides/other.tif")
