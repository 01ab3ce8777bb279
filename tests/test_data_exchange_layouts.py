"""Items of published sets that are not what they should be: left out, with the reason."""

import io

import numpy as np
import pytest
from PIL import Image

from raylarge.data.exchange import layouts
from raylarge.data.exchange.layouts import LAYOUTS, Unfit

NAIP = LAYOUTS["naip"]
RGB = np.random.default_rng(0).integers(0, 255, (256, 256, 3), np.uint8)


def file_of(array, kind="JPEG"):
    sink = io.BytesIO()
    Image.fromarray(array).save(sink, kind)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"no image", "no whole PNG or JPEG"),
        (file_of(RGB, "BMP"), "no whole PNG or JPEG"),
        (file_of(RGB)[:3000], "no whole PNG or JPEG"),
        (file_of(RGB[:128]), "256 x 128 px, not 256"),
        (file_of(np.dstack([RGB, RGB[..., :1]]), "PNG"), "an image of RGBA pixels"),
        (file_of(RGB[..., 0].astype(np.uint16), "PNG"), "an image of I;16 pixels"),
    ],
)
def test_images_that_no_reader_could_use_later(tmp_path, content, why):
    (tmp_path / "7.jpg").write_bytes(content)
    with pytest.raises(Unfit, match=why):
        layouts.image(NAIP, str(tmp_path), 7)


def test_whole_images_come_out_byte_for_byte(tmp_path):
    for content in (file_of(RGB), file_of(RGB[..., 0]), file_of(RGB, "PNG")):
        (tmp_path / "7.jpg").write_bytes(content)
        assert layouts.image(NAIP, str(tmp_path), 7) == content


def test_arrays_that_hold_no_numbers_are_left_out(tmp_path):
    for values in (np.full((3, 64, 64), "a"), np.zeros((3, 64, 64), complex)):
        np.save(tmp_path / "7_vae.npy", values)
        with pytest.raises(Unfit, match=r"a latent of .*, not numbers"):
            layouts.latent(NAIP, str(tmp_path), 7)
    for kind in (np.float32, np.float64):
        np.save(tmp_path / "7_vae.npy", np.ones((3, 64, 64), kind))
        assert (layouts.latent(NAIP, str(tmp_path), 7) == 1).all()


def test_a_batch_of_one_grid_is_a_grid(tmp_path):
    grid = np.random.default_rng(0).normal(size=(4, 1024)).astype(np.float16)
    np.save(tmp_path / "7_dino_grid.npy", grid)
    plain = layouts.grid(NAIP, str(tmp_path), 7, 1, 1024)
    np.save(tmp_path / "7_dino_grid.npy", grid[None])
    assert (layouts.grid(NAIP, str(tmp_path), 7, 1, 1024) == plain).all()
