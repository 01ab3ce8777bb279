import io

import numpy as np
import pytest
from PIL import Image

from raylarge import pixels


def stored(array, mode=None, **options):
    """A picture that went through a PNG, as files do."""
    sink = io.BytesIO()
    picture = array if isinstance(array, Image.Image) else Image.fromarray(array)
    (picture.convert(mode) if mode else picture).save(sink, "PNG", **options)
    return Image.open(io.BytesIO(sink.getvalue()))


def test_the_full_range_of_16_bits_becomes_that_of_8():
    deep = np.arange(65536, dtype=np.uint16)
    assert (pixels.to_8_bits(deep) == np.round(deep / 257.0)).all()
    assert (pixels.to_8_bits(np.arange(256, dtype=np.uint16) * 257) == np.arange(256)).all()


def test_declared_bits_are_the_range_and_larger_values_are_clipped():
    assert pixels.to_8_bits(np.array([0, 2048, 4095, 60000], np.uint16), 12).tolist() == [
        0,
        128,
        255,
        255,
    ]


def test_other_types_need_a_range():
    values = np.array([-2.0, 0.0, 0.5, 1.0, 7.0, np.nan, np.inf, -np.inf], np.float32)
    for kind in (np.float32, np.float64, np.int16, np.uint32):
        with pytest.raises(pixels.PixelFormatError, match=f"{np.dtype(kind).name} samples"):
            pixels.to_8_bits(np.zeros(3, kind))
    expected = [0, 0, 128, 255, 255, 255, 255, 0]
    assert pixels.to_8_bits(values, value_range=(0.0, 1.0)).tolist() == expected
    reversed_range = pixels.to_8_bits(np.array([0, 10], np.int16), value_range=(10.0, 0.0))
    assert reversed_range.tolist() == [255, 0]


def test_a_range_overrides_the_type():
    reflectance = np.array([0, 1500, 3000, 9000], np.uint16)
    assert pixels.to_8_bits(reflectance, value_range=(0.0, 3000.0)).tolist() == [0, 128, 255, 255]


def test_transparency_shows_white():
    colours = np.array([[[200, 100, 0]] * 3], np.uint8)
    alpha = np.array([[0, 128, 255]], np.uint8)
    expected = colours * (alpha / 255)[..., None] + 255 * (1 - alpha / 255)[..., None]
    assert np.abs(pixels.over_white(colours, alpha) - expected).max() <= 0.5
    ready = (colours * (alpha[..., None] / 255)).round().astype(np.uint8)
    assert np.abs(pixels.over_white(ready, alpha, premultiplied=True) - expected).max() <= 1


def test_pictures_of_every_mode_become_rgb():
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    expected = np.repeat(grey[..., None], 3, axis=-1)
    assert (pixels.from_picture(stored(grey)) == expected).all()
    assert (pixels.from_picture(stored(grey.astype(np.uint16) * 257)) == expected).all()
    assert (pixels.from_picture(stored(grey, "P")) == expected).all()
    assert (pixels.from_picture(stored(grey > 99)) == np.where(expected > 99, 255, 0)).all()
    premultiplied = Image.fromarray(grey).convert("LA").convert("La")
    assert (pixels.from_picture(premultiplied) == expected).all()


@pytest.mark.parametrize("deep", [False, True])
def test_a_transparent_colour_of_a_png_is_white(deep):
    grey = np.array([[7, 50]], np.uint16 if deep else np.uint8)
    picture = stored(grey * np.uint16(257) if deep else grey, transparency=7 * (257 if deep else 1))
    assert pixels.from_picture(picture)[0, :, 0].tolist() == [255, 50]


@pytest.mark.parametrize("mode", ["F", "I", "CMYK", "LAB", "HSV"])
def test_pictures_without_a_meaning_as_rgb_are_refused(mode):
    with pytest.raises(pixels.PixelFormatError, match="convert it to 8-bit RGB"):
        pixels.from_picture(Image.new(mode, (4, 4)))
