import numpy as np
import openslide
import pytest

from raylarge.slides import openslide_reader
from raylarge.slides.openslide_reader import OpenSlidePyramid, vendor
from raylarge.slides.protocol import UnreadableSlide
from raylarge.slides.reader import open_slide

PART = (1500, 1000, 200, 300)


@pytest.fixture(scope="module")
def cmu(shared_data):
    return str(shared_data / "wsi/CMU-1-Small-Region.svs")


def test_a_real_slide(cmu):
    with open_slide(cmu) as slide:
        assert isinstance(slide._pyramid, OpenSlidePyramid)
        assert (slide.mpp, slide.zoom, slide.size_px) == (0.499, 1.0, (2967, 2220))
        nuclei, glass = slide.read(1500, 1000, 64, 64), slide.read(0, 0, 64, 64)
        assert nuclei.mean() < 200 < glass.mean()
        top, left, rows, columns = PART
        region = slide.read(*PART)
    with openslide.OpenSlide(cmu) as plain:
        expected = np.asarray(plain.read_region((left, top), 0, (columns, rows)).convert("RGB"))
    assert (region == expected).all()
    assert region.flags.c_contiguous


def test_label_and_macro_are_no_levels(cmu):
    with openslide.OpenSlide(cmu) as plain:
        sizes = {image.size[::-1] for image in plain.associated_images.values()}
        assert {"label", "macro"} <= set(plain.associated_images)
    pyramid = OpenSlidePyramid(cmu)
    assert not sizes & set(pyramid.sizes)
    pyramid.close()


def test_they_are_never_asked_for(cmu, monkeypatch):
    def refuse(*_):
        raise AssertionError("an associated image was read")

    monkeypatch.setattr(openslide.lowlevel, "read_associated_image", refuse)
    monkeypatch.setattr(openslide.lowlevel, "get_associated_image_names", refuse)
    with open_slide(cmu) as slide:
        assert slide.thumbnail(32).shape == (93, 70, 3)
    with openslide.OpenSlide(cmu) as plain, pytest.raises(AssertionError, match="was read"):
        dict(plain.associated_images)


class Transparent:
    """An OpenSlide whose pixels are partly transparent."""

    level_downsamples = (1.0,)

    def read_region(self, corner, level, size):
        from PIL import Image

        page = Image.new("RGBA", size, (10, 20, 30, 255))
        page.paste((10, 20, 30, 0), (0, 0, 4, 4))
        page.paste((100, 0, 200, 51), (4, 0, 8, 4))
        return page


def test_transparent_pixels_lie_on_white(cmu):
    pyramid = OpenSlidePyramid(cmu)
    pyramid._slide = Transparent()
    region = pyramid.read_level(0, 0, 0, 8, 8)
    assert (region[:4, :4] == 255).all()
    assert (region[:4, 4:] == (224, 204, 244)).all()
    assert (region[4:] == (10, 20, 30)).all()


def test_a_region_of_a_scan_is_a_scene(cmu, monkeypatch):
    whole = OpenSlidePyramid(cmu)
    fields = ("y", "x", "height", "width")
    regions = [(0, 0, 500, 600), (700, 900, 300, 400)]
    facts = {
        f"openslide.region[{i}].{name}": str(value)
        for i, region in enumerate(regions)
        for name, value in zip(fields, region, strict=True)
    }
    original = openslide_reader._regions
    monkeypatch.setattr(openslide_reader, "_regions", lambda found: original({**found, **facts}))
    everything = OpenSlidePyramid(cmu)
    assert everything.sizes == whole.sizes
    assert "has 2 regions, which were read as one image" in everything.notes[0]
    one = OpenSlidePyramid(cmu, "1")
    assert one.sizes[0] == (300, 400)
    assert one.notes == ["scene 1 of 2 was read"]
    expected = whole.read_level(0, 710, 920, 100, 200)
    assert (one.read_level(0, 10, 20, 100, 200) == expected).all()
    with pytest.raises(UnreadableSlide, match=r"holds no scene tile\.scene=2, but 2"):
        OpenSlidePyramid(cmu, "2")


def test_vendors(cmu, tmp_path):
    (tmp_path / "text.svs").write_text("no slide")
    assert (vendor(cmu), vendor(str(tmp_path / "text.svs"))) == ("aperio", None)
