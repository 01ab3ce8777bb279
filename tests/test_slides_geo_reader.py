import sys

import numpy as np
import pytest
from PIL import Image

from raylarge.errors import SlideError, UserError
from raylarge.slides.geo_reader import GeoPyramid
from raylarge.slides.reader import open_slide

rasterio = pytest.importorskip("rasterio", reason="the extra raylarge[geo] is not installed")

UTM_NORTH = "EPSG:26911"


@pytest.fixture(scope="module")
def image():
    y, x = np.mgrid[0:300, 0:400] / 25.0
    waves = [np.sin(3 * y + x), np.cos(2 * x - y), np.sin(x * y / 4), np.cos(x * y)]
    return (127.5 + 100 * np.stack(waves, axis=-1)).round().astype(np.uint8)


def write(path, image, crs=UTM_NORTH, transform=None, **options):
    """A GeoTIFF of 1 m/px, near 34 degrees north if nothing else is said."""
    overviews = options.pop("overviews", ())
    transform = transform or rasterio.Affine(1, 0, 557_699, 0, -1, 3_648_377)
    shape = {"height": image.shape[0], "width": image.shape[1], "count": image.shape[2]}
    options = {"dtype": image.dtype, "crs": crs, "transform": transform, **shape, **options}
    with rasterio.open(path, "w", driver="GTiff", **options) as file:
        file.write(np.moveaxis(image, -1, 0))
        if overviews:
            file.build_overviews(overviews, rasterio.enums.Resampling.nearest)
    return str(path)


def test_naip_is_red_green_blue_at_its_own_scale(shared_data):
    path = str(shared_data / "aerial/m_3211605_ne_11_060_20200415.tif")
    with rasterio.open(path) as file:
        bands, transform = file.read(), list(file.transform)[:6]
        assert file.colorinterp[3].name == "alpha"  # near infrared, labelled wrongly
    with open_slide(path, base_mpp=6e5) as slide:
        assert slide.mpp == pytest.approx(6e5, rel=2e-3)
        assert slide.zoom == 1
        assert slide.georeference == {"crs": "EPSG:26911", "transform": transform}
        assert (slide.read(0, 0, 204, 266) == np.moveaxis(bands[:3], 0, -1)).all()
    with open_slide(path, base_mpp=1e6) as slide:
        assert slide.size_px == (122, 159)


def test_every_real_aerial_image_opens(shared_data):
    for path in sorted((shared_data / "aerial").glob("*.tif")):
        with open_slide(str(path), base_mpp=1e8 if "downsampled" in path.name else 3e7) as slide:
            assert slide.georeference["crs"].startswith("EPSG:")
            assert 9e4 < slide.mpp < 7e7
            assert slide.thumbnail(1).std() > 1
        with pytest.raises(SlideError, match=r"shows the ground at .* set tile\.base_mpp=\S*e\d "):
            open_slide(str(path))


def test_overviews_are_levels(tmp_path, image):
    options = {"tiled": True, "blockxsize": 128, "blockysize": 128, "overviews": (2, 4)}
    path = write(tmp_path / "cog.tif", image, **options)
    with open_slide(path, base_mpp=1e6) as slide:
        assert isinstance(slide._pyramid, GeoPyramid)
        assert slide._pyramid.sizes == [(300, 400), (150, 200), (75, 100)]
        assert (slide.read(37, 50, 100, 200) == image[37:137, 50:250, :3]).all()
        with rasterio.open(path, overview_level=0) as overview:
            expected = np.moveaxis(overview.read([1, 2, 3]), 0, -1)
        assert (slide.read(0, 0, 300, 400, downscale=2) == expected).all()


@pytest.mark.filterwarnings("ignore:The dataset's nodata attribute is shadowing")
def test_no_data_is_white_and_near_infrared_is_no_mask(tmp_path, image):
    image = image.copy()
    image[:50, :60] = 0
    path = write(tmp_path / "void.tif", image, nodata=0)
    with open_slide(path, base_mpp=1e6) as slide:
        region = slide.read(0, 0, 300, 400)
    assert (region[:50, :60] == 255).all()
    assert (region[60:, 60:] == image[60:, 60:, :3]).all()
    image[100:150, 100:150] = (9, 9, 9, 0)  # no infrared, but colours
    path = write(tmp_path / "alpha.tif", image, photometric="rgb", alpha="yes")
    with open_slide(path, base_mpp=1e6) as slide:
        region = slide.read(0, 0, 300, 400)
    assert (region[:50, :60] == 255).all()
    assert (region[100:150, 100:150] == 9).all()
    assert (region[150:, 150:] == image[150:, 150:, :3]).all()


@pytest.mark.parametrize(
    ("crs", "place", "mpp"),
    [
        (UTM_NORTH, (557_699, 3_648_377), 1e6),
        ("EPSG:3857", (0, 8_399_738), 5e5),  # Mercator at 60 degrees: half of what it says
        ("EPSG:2263", (1_000_000, 200_000), 304_801),  # New York in US survey feet
    ],
)
def test_pixels_are_measured_on_the_ground(tmp_path, image, crs, place, mpp):
    transform = rasterio.Affine(1, 0, place[0], 0, -1, place[1])
    path = write(tmp_path / "map.tif", image, crs, transform)
    with open_slide(path, base_mpp=1e6) as slide:
        assert slide.mpp == pytest.approx(mpp, rel=5e-3)
        assert slide._pyramid.sizes == [(300, 400)]  # nothing is warped


def test_degrees_become_metres(tmp_path, image):
    """A degree of longitude at 60 degrees north is half of one of latitude."""
    step = 1 / 111_320
    transform = rasterio.Affine(2 * step, 0, 15.0, 0, -step, 60.0)
    path = write(tmp_path / "degrees.tif", image, "EPSG:4326", transform)
    with open_slide(path, base_mpp=1e6) as slide:
        assert slide.georeference["crs"] == "EPSG:32633"
        assert slide.mpp == pytest.approx(1e6, rel=1e-2)
        assert np.abs(np.subtract(slide.size_px, (300, 400))).max() <= 8
        whole = slide.read(0, 0, *slide.size_px)
        assert (slide.read(100, 130, 64, 64) == whole[100:164, 130:194]).all()
    middle = np.asarray(Image.fromarray(whole).resize((400, 300)))[50:250, 50:350]
    assert np.abs(middle.astype(int) - image[50:250, 50:350, :3]).mean() < 8


@pytest.mark.parametrize("label", [{}, {"photometric": "rgb", "alpha": "yes"}])
def test_a_rotated_image_is_turned_north(tmp_path, image, label):
    place = (557_699, 3_648_377)
    turned = rasterio.Affine(0, 1, place[0], 1, 0, place[1])
    path = write(tmp_path / "turned.tif", image, transform=turned, overviews=(2,), **label)
    with open_slide(path, base_mpp=1e6) as slide:
        assert slide.mpp == pytest.approx(1e6, rel=2e-3)
        assert slide.georeference["transform"][1] == slide.georeference["transform"][3] == 0
        rows, columns = slide.size_px
        assert (abs(rows - 400) <= 2, abs(columns - 300) <= 2) == (True, True)
        assert len(slide._pyramid.sizes) == 2
        region = slide.read(0, 0, 400, 300)
    expected = np.rot90(image[..., :3])
    inner = (slice(20, 380), slice(20, 280))
    assert np.abs(region[inner].astype(int) - expected[inner]).mean() < 4


def test_pixels_that_are_no_squares_are_made_square(tmp_path, image):
    transform = rasterio.Affine(1, 0, 557_699, 0, -2, 3_648_377)
    path = write(tmp_path / "tall.tif", image, transform=transform)
    with open_slide(path, base_mpp=1e6) as slide:
        assert slide.mpp == pytest.approx(1e6, rel=2e-3)
        assert abs(slide.size_px[0] - 600) <= 2


def test_what_is_not_8_bit_rgb_is_refused(tmp_path, image):
    path = write(tmp_path / "deep.tif", image.astype(np.uint16))
    with pytest.raises(
        SlideError, match=r"deep\.tif holds uint16 pixels, not 8-bit .*gdal_translate"
    ):
        open_slide(path, base_mpp=1e6)
    with rasterio.open(
        tmp_path / "classes.tif",
        "w",
        driver="GTiff",
        height=300,
        width=400,
        count=1,
        dtype=np.uint8,
        crs=UTM_NORTH,
        transform=rasterio.Affine(1, 0, 557_699, 0, -1, 3_648_377),
    ) as file:
        file.write(image[..., :1].T.swapaxes(1, 2))
        file.write_colormap(1, {0: (1, 2, 3, 255)})
    with pytest.raises(SlideError, match=r"classes\.tif holds a palette"):
        open_slide(str(tmp_path / "classes.tif"), base_mpp=1e6)


def test_an_image_below_one_base_pixel_is_refused(tmp_path, image):
    path = write(tmp_path / "small.tif", image[:50])
    with pytest.raises(
        SlideError, match=r"less than one pixel of the base scale .*tile\.base_mpp="
    ):
        open_slide(path, base_mpp=1e8)


def test_grey_becomes_rgb(tmp_path, image):
    path = write(tmp_path / "grey.tif", image[..., :1])
    with open_slide(path, base_mpp=1e6) as slide:
        assert (slide.read(0, 0, 300, 400) == image[..., :1]).all()


def test_a_truncated_file_is_one_sentence(tmp_path, image):
    path = write(tmp_path / "whole.tif", image, compress="deflate")
    content = (tmp_path / "whole.tif").read_bytes()
    (tmp_path / "cut.tif").write_bytes(content[: len(content) // 2])
    with (
        pytest.raises(SlideError, match=r"^slide \S+cut\.tif is damaged or incomplete [^\n]+\.$"),
        open_slide(path.replace("whole", "cut"), base_mpp=1e6) as slide,
    ):
        slide.read(0, 0, 300, 400)


def test_without_rasterio_the_cure_is_named(tmp_path, image, monkeypatch):
    path = write(tmp_path / "map.tif", image)
    for name in [name for name in sys.modules if name.partition(".")[0] == "rasterio"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"needs rasterio; .* install 'raylarge\[geo\]'") as told:
        open_slide(path, base_mpp=1e6)
    assert told.type is UserError  # no fault of the slide


@pytest.mark.parametrize("crs", ["EPSG:32617", "EPSG:4326"])
@pytest.mark.parametrize("place", [(0, 0, 5e5, 0, -1, 4e6), (1e9, 0, 1e30, 0, -1e9, 1e30)])
def test_a_place_that_is_none_is_refused(tmp_path, image, crs, place):
    path = write(tmp_path / "nowhere.tif", image, transform=rasterio.Affine(*place), crs=crs)
    with pytest.raises(SlideError, match=r"^slide \S+nowhere\.tif [^\n]+\.$"):
        open_slide(path, base_mpp=1e6)
