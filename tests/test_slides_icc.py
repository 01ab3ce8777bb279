from io import BytesIO

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms

from raylarge.errors import SlideError
from raylarge.slides.icc import SrgbPyramid
from raylarge.slides.reader import open_slide

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
LAB = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


def swapped() -> bytes:
    """sRGB whose red and blue primaries have changed places."""
    profile = SRGB.replace(b"rXYZ", b"tmpT").replace(b"bXYZ", b"rXYZ").replace(b"tmpT", b"bXYZ")
    assert profile != SRGB
    return profile


@pytest.fixture(scope="module")
def picture():
    y, x = np.mgrid[0:96, 0:128]
    return np.stack([y * 2, x, 255 - y - x // 2], axis=-1).astype(np.uint8)


def saved(folder, kind, picture, profile):
    path = str(folder / f"picture.{kind}")
    if kind == "tif":
        tifffile.imwrite(path, picture, photometric="rgb", tile=(64, 64), iccprofile=profile)
    else:
        Image.fromarray(picture).save(path, icc_profile=profile)
    return path


@pytest.mark.parametrize("kind", ["tif", "png", "jpg"])
def test_a_profile_is_applied_and_can_be_left(tmp_path, picture, kind):
    path = saved(tmp_path, kind, picture, swapped())
    with open_slide(path, 0.5, icc=False) as raw, open_slide(path, 0.5) as slide:
        stored, seen = raw.read(0, 0, 96, 128), slide.read(0, 0, 96, 128)
        part = slide.read(10, 20, 30, 40)
    expected = ImageCms.profileToProfile(
        Image.fromarray(stored),
        ImageCms.ImageCmsProfile(BytesIO(swapped())),
        ImageCms.createProfile("sRGB"),
    )
    assert (seen == np.asarray(expected)).all()
    assert np.abs(seen.astype(int) - stored).mean() > 20
    assert np.abs(seen[..., ::-1].astype(int) - stored).mean() < 2
    assert (part == seen[10:40, 20:60]).all()


@pytest.mark.parametrize("kind", ["tif", "png", "jpg"])
def test_srgb_costs_nothing(tmp_path, picture, kind):
    with open_slide(saved(tmp_path, kind, picture, SRGB), 0.5) as slide:
        assert not isinstance(slide._pyramid, SrgbPyramid)


@pytest.mark.parametrize("profile", [b"no profile", SRGB[:200], LAB], ids=["text", "cut", "lab"])
def test_a_broken_profile_names_the_cure(tmp_path, picture, profile):
    path = saved(tmp_path, "tif", picture, profile)
    with pytest.raises(SlideError, match=r"tif: the file has an ICC profile .*set tile\.icc=false"):
        open_slide(path, 0.5)
    with open_slide(path, 0.5, icc=False) as slide:
        assert (slide.read(0, 0, 96, 128) == picture).all()


def test_the_profile_of_a_vendors_slide_is_found(shared_data):
    with open_slide(str(shared_data / "wsi/TCGA-CR-7395.svs"), 0.25, icc=False) as slide:
        profile = slide._pyramid.icc_profile
        assert "sRGB" in ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(BytesIO(profile)))
    with open_slide(str(shared_data / "wsi/CMU-1-Small-Region.svs"), icc=False) as slide:
        assert slide._pyramid.icc_profile is None
