import subprocess
import sys

import imagecodecs
import numpy as np
import pytest
from PIL import Image

from raylarge.errors import SlideError
from raylarge.slides import image_reader, tiff_reader
from raylarge.slides.protocol import ReadOptions
from raylarge.slides.reader import open_slide


@pytest.fixture(scope="module")
def smooth():
    y, x = np.mgrid[0:400, 0:520] / 60.0
    waves = [np.sin(3 * y + x), np.cos(2 * x - y), np.sin(x * y / 4)]
    return (127.5 + 100 * np.stack(waves, axis=-1)).round().astype(np.uint8)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYLARGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def whole(path):
    with open_slide(str(path), 0.5) as slide:
        return slide.read(0, 0, *slide.size_px)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_images_are_slides_of_one_level(tmp_path, smooth, suffix):
    path = tmp_path / f"plain.{suffix}"
    Image.fromarray(smooth).save(path, **({"quality": 95} if suffix == "jpg" else {}))
    with open_slide(str(path), mpp_override=0.5) as slide:
        assert slide.size_l0 == (400, 520)
        error = np.abs(slide.read(10, 20, 64, 64).astype(int) - smooth[10:74, 20:84])
    assert error.max() <= (12 if suffix == "jpg" else 0)


def test_grey_palette_bits_and_alpha_become_rgb(tmp_path, smooth):
    picture = Image.fromarray(smooth)
    for mode in ("1", "L", "P"):
        stored = picture.convert(mode)
        stored.save(tmp_path / f"{mode}.png")
        assert (whole(tmp_path / f"{mode}.png") == np.asarray(stored.convert("RGB"))).all()
    share = np.linspace(0, 1, 400 * 520).reshape(400, 520, 1)
    for mode, bands in (("RGBA", smooth), ("LA", smooth[..., :1])):
        alpha = (255 * share).astype(np.uint8)
        Image.fromarray(np.concatenate([bands, alpha], axis=-1), mode).save(tmp_path / "a.png")
        expected = bands * (alpha / 255) + 255 * (1 - alpha / 255)
        assert np.abs(whole(tmp_path / "a.png") - expected).max() <= 1


def test_deep_images_are_scaled(tmp_path, smooth):
    grey = smooth[..., 0].astype(np.uint16)
    Image.fromarray(grey * 257).save(tmp_path / "grey.png")
    assert (whole(tmp_path / "grey.png") == smooth[..., :1]).all()
    options = ReadOptions(value_range=(0.0, 255.0))
    Image.fromarray(grey).save(tmp_path / "dark.png")
    with open_slide(str(tmp_path / "dark.png"), 0.5, options=options) as slide:
        assert (slide.read(0, 0, *slide.size_px) == smooth[..., :1]).all()
        assert slide.notes == ["uint16 samples: 0 became 0, and 255 became 255"]
    deep = imagecodecs.png_encode(smooth.astype(np.uint16) * 257)
    (tmp_path / "colour.png").write_bytes(deep)
    assert (whole(tmp_path / "colour.png") == smooth).all()
    with pytest.raises(SlideError, match=r"16-bit colours in a PNG, .* convert it to a 16-bit RGB"):
        open_slide(str(tmp_path / "colour.png"), 0.5, options=options)


@pytest.mark.parametrize("options", [ReadOptions(scene="1"), ReadOptions(bands=(3, 2, 1))])
def test_options_that_an_image_does_not_have_are_refused(tmp_path, smooth, options):
    Image.fromarray(smooth).save(tmp_path / "plain.png")
    with pytest.raises(SlideError, match=r"tile\.(scene|bands)="):
        open_slide(str(tmp_path / "plain.png"), 0.5, options=options)


def test_rows_and_columns_are_the_stored_ones(tmp_path, smooth):
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(smooth).save(tmp_path / "turned.png", exif=turned)
    assert (whole(tmp_path / "turned.png") == smooth).all()


def test_the_resolution_of_an_image_file_counts_where_plausible(tmp_path, smooth):
    Image.fromarray(smooth).save(tmp_path / "fine.png", dpi=(101_600, 101_600))
    with open_slide(str(tmp_path / "fine.png")) as slide:
        assert slide.mpp == pytest.approx(0.25, rel=1e-3)
    Image.fromarray(smooth).save(tmp_path / "screen.png", dpi=(72, 72))
    with pytest.raises(SlideError, match=r"image resolution 352\.7 um/px, which no slide has"):
        open_slide(str(tmp_path / "screen.png"))


@pytest.mark.parametrize("kind", ["RGB.png", "RGB.jpg", "RGBA.png", "P.png", "strips.tif"])
def test_a_large_image_is_converted_once_and_keeps_its_pixels(
    tmp_path, smooth, monkeypatch, cache, kind
):
    path = tmp_path / kind
    mode = kind.split(".")[0]
    picture = Image.fromarray(smooth).convert(mode if mode != "strips" else "RGB")
    picture.save(path)
    expected = whole(path)
    monkeypatch.setattr(image_reader, "WHOLE_PX", 100_000)
    monkeypatch.setattr(tiff_reader, "WHOLE_PX", 100_000)
    assert not cache.exists()
    with open_slide(str(path), 0.5) as slide:
        assert slide._pyramid.sizes == [(400, 520), (200, 260), (100, 130)]
        assert (slide.read(0, 0, 400, 520) == expected).all()
        assert (slide.read(255, 250, 20, 30) == expected[255:275, 250:280]).all()
        half = expected.reshape(200, 2, 260, 2, 3).mean(axis=(1, 3))
        assert np.abs(slide.read(0, 0, 400, 520, downscale=2) - half).max() <= 0.5
    before = {file: file.stat().st_mtime_ns for file in cache.rglob("tiles.tif")}
    assert len(before) == 1
    assert (whole(path) == expected).all()
    assert {file: file.stat().st_mtime_ns for file in cache.rglob("tiles.tif")} == before
    picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(path)
    assert (whole(path) != expected).any()


def test_a_truncated_large_image_leaves_nothing_behind(tmp_path, smooth, monkeypatch, cache):
    monkeypatch.setattr(image_reader, "WHOLE_PX", 100_000)
    Image.fromarray(smooth).save(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(SlideError, match=r"cut\.png: the file is damaged or incomplete"):
        open_slide(str(tmp_path / "cut.png"), 0.5)
    assert [path for path in cache.rglob("*") if path.is_file() and path.stat().st_size] == []


def test_the_limit_against_bombs_is_named(tmp_path, smooth, monkeypatch):
    monkeypatch.setattr(image_reader, "DECODE_PX", 1000)
    Image.fromarray(smooth).save(tmp_path / "huge.png")
    with pytest.raises(
        SlideError, match=r"huge\.png: the file claims 400 x 520 pixels, and more than 1,000"
    ):
        open_slide(str(tmp_path / "huge.png"), 0.5)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_real_section_is_read_piece_by_piece(shared_data, cache):
    """92 Mpx (276 MB) at once would show in the memory of the process that reads."""
    path = str(shared_data / "he_large/5714_HE_BT_D1.jpg")
    code = f"""
import resource
from raylarge.slides.protocol import ReadOptions
from raylarge.slides.reader import open_slide
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with open_slide({path!r}, 0.7, 0.7) as slide:
    slide.thumbnail(16)
    for top in range(0, slide.size_px[0], 256):
        slide.read(top, 0, 256, slide.size_px[1])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    growth_kb = [
        int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
        for _ in range(2)
    ]
    assert growth_kb[0] < 600_000  # the process that converts
    assert growth_kb[1] < 150_000  # all others
    with Image.open(path) as picture, open_slide(path, 0.7, 0.7) as slide:
        expected = np.asarray(picture.crop((3000, 4000, 3300, 4200)))
        assert (slide.read(4000, 3000, 200, 300) == expected).all()
