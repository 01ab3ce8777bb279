import io
import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from raylarge import images
from raylarge.errors import UserError


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (300, 700, 3), dtype=np.uint8)


def test_pixels_survive_the_network_range():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    x = images.to_float(ramp)
    assert x.shape == (3, 16, 16)
    assert (x.min(), x.max()) == (-1, 1)
    assert (images.to_uint8(x) == ramp).all()


def test_one_rounding_rule():
    x = torch.tensor([-3.0, -1.0, 0.0, 0.001, 0.005, 1.0, 3.0]).view(1, 7, 1).expand(3, 7, 1)
    expected = [0, 0, 128, 128, 128, 255, 255]  # 127.5 and 127.6 round to 128
    assert images.to_uint8(x)[:, 0, 0].tolist() == expected


def test_batches_convert_like_single_images(picture):
    batch = np.stack([picture[:64, :64], picture[64:128, :64]])
    assert torch.equal(images.to_float(batch)[1], images.to_float(batch[1]))
    assert (images.to_uint8(images.to_float(batch)) == batch).all()


def test_png_bytes_carry_pixels_and_no_mark(picture):
    content = images.png_bytes(picture)
    assert (images.from_bytes(content) == picture).all()
    assert b"Synthetic" not in content


def test_a_written_png_says_that_it_is_synthetic(tmp_path, picture):
    order = json.dumps({"size": [512, 512], "text": "Drüse"})
    images.write_png(str(tmp_path / "made.png"), picture, {"order": order, "Synthetic": "false"})
    pixels, text = images.read_png(str(tmp_path / "made.png"))
    assert (pixels == picture).all()
    with Image.open(tmp_path / "made.png") as opened:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(opened.info["icc_profile"]))
    assert "sRGB" in ImageCms.getProfileDescription(profile)
    assert text == {"Software": "raylarge", "Synthetic": "true", "order": order}


def test_only_the_caller_can_vouch_for_real_pixels(tmp_path, picture):
    images.write_png(str(tmp_path / "real.png"), picture, synthetic=False)
    assert "Synthetic" not in images.read_png(str(tmp_path / "real.png"))[1]


def test_a_sheet_holds_every_image_and_its_labels(picture):
    cells = [picture[:64, :64], picture[:256, :256]]
    page = images.sheet([cells, cells[:1]], ["first row", "second"], ["a", "b"], cell_px=128)
    height, width, _ = page.shape
    enlarged = cells[0].repeat(2, axis=0).repeat(2, axis=1)
    places = np.lib.stride_tricks.sliding_window_view(page[..., 0], (128, 128))
    assert (places == enlarged[..., 0]).all(axis=(2, 3)).sum() == 2  # in both rows
    assert height > 256
    assert width > 256
    left = page[:, : width - 2 * 132 - 4]
    assert (left[:140] < 100).any()  # ink of both row labels
    assert (left[150:] < 100).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite_become_no_pixels(value, kind):
    x = torch.zeros(2, 3, 4, 4, dtype=kind)
    assert images.to_uint8(x).shape == (2, 4, 4, 3)
    x[1, 2, 3, 0] = value
    with pytest.raises(UserError, match=r"^1 of 96 values of an image are NaN or infinite"):
        images.to_uint8(x)
