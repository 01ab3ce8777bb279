import sys

import numpy as np
import pytest
from PIL import Image

from raylarge.errors import SlideError, UserError
from raylarge.slides.geo_reader import GeoPyramid
from raylarge.slides.protocol import ReadOptions
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


def whole(path, **options):
    with open_slide(path, base_mpp=1e6, options=ReadOptions(**options)) as slide:
        return slide.read(0, 0, *slide.size_px), slide.notes


def labelled(path, image, *names, **options):
    """A GeoTIFF whose bands have these colour interpretations."""
    path = write(path, image, **options)
    with rasterio.open(path, "r+") as file:
        file.colorinterp = [rasterio.enums.ColorInterp[name] for name in names]
    return path


def test_bands_are_those_that_the_file_calls_red_green_and_blue(tmp_path, image):
    path = labelled(tmp_path / "bgrn.tif", image, "blue", "green", "red", "undefined")
    pixels, notes = whole(path)
    assert (pixels == image[..., [2, 1, 0]]).all()
    assert notes == ["red, green and blue are bands 3, 2, 1, as the file says"]
    pixels, notes = whole(path, bands=(4, 1, 1))
    assert (pixels == image[..., [3, 0, 0]]).all()
    assert (whole(path, bands=(2,))[0] == image[..., 1:2]).all()
    with pytest.raises(SlideError, match=r"has 4 bands, and tile\.bands=\[5, 1, 2\] names others"):
        whole(path, bands=(5, 1, 2))


@pytest.mark.parametrize("turned", [False, True])
def test_bands_are_chosen_where_an_image_is_warped_too(tmp_path, image, turned):
    place = (557_699, 3_648_377)
    transform = rasterio.Affine(0, 1, place[0], 1, 0, place[1]) if turned else None
    options = {"transform": transform, "photometric": "rgb", "alpha": "yes", "overviews": (2,)}
    path = write(tmp_path / "false.tif", image, **options)
    pixels, notes = whole(path, bands=(4, 1, 2))  # near infrared, labelled alpha
    assert "band 4 is labelled alpha but varies" in notes[0]
    expected = image[..., [3, 0, 1]]
    expected = np.rot90(expected) if turned else expected
    inner = (slice(20, 280), slice(20, 280))
    assert np.abs(pixels[inner].astype(int) - expected[inner]).mean() < (4 if turned else 0.01)


def test_unnamed_bands_are_taken_in_order_and_said_or_refused(tmp_path, image):
    path = labelled(tmp_path / "plain.tif", image[..., :3], "gray", "undefined", "undefined")
    pixels, notes = whole(path)
    assert (pixels == image[..., :3]).all()
    assert "does not say which bands are its colours: bands 1, 2, 3" in notes[0]
    wide = np.concatenate([image, image], axis=-1)
    path = labelled(tmp_path / "eight.tif", wide, "gray", *["undefined"] * 7)
    with pytest.raises(SlideError, match=r"has 8 bands and does not say .* set tile\.bands="):
        whole(path)
    assert (whole(path, bands=(6, 5, 7))[0] == wide[..., [5, 4, 6]]).all()
    path = labelled(tmp_path / "half.tif", image[..., :3], "red", "undefined", "undefined")
    with pytest.raises(SlideError, match="bands of red, undefined, undefined, not all of red"):
        whole(path)


def test_deep_samples_are_scaled_by_their_declared_bits(tmp_path, image):
    deep = image[..., :3].astype(np.uint16)
    path = write(tmp_path / "deep.tif", deep * 257, photometric="rgb")
    pixels, notes = whole(path)
    assert (pixels == image[..., :3]).all()
    assert notes == [
        "16-bit samples: 0 to 65535 became 0 to 255 (tile.value_range=[low,high] sets another "
        "range)"
    ]
    path = write(tmp_path / "twelve.tif", deep * 16, photometric="rgb", NBITS=12)
    assert np.abs(whole(path)[0].astype(int) - image[..., :3]).max() <= 1
    pixels, notes = whole(
        write(tmp_path / "low.tif", deep, photometric="rgb"), value_range=(0.0, 255.0)
    )
    assert (pixels == image[..., :3]).all()
    assert notes == ["uint16 samples: 0 became 0, and 255 became 255"]


def test_floating_point_needs_a_range_and_nan_is_white(tmp_path, image):
    reflectance = (image[..., :3] / 255).astype(np.float32)
    reflectance[:9, :9] = np.nan
    path = write(tmp_path / "float.tif", reflectance, photometric="rgb")
    with pytest.raises(SlideError, match=r"holds float32 samples, .*tile\.value_range="):
        whole(path)
    pixels, _ = whole(path, value_range=(0.0, 1.0))
    assert (pixels[:9, :9] == 255).all()
    assert (pixels[9:] == image[9:, :, :3]).all()


def test_a_palette_is_expanded(tmp_path, image):
    indices = (image[..., :1] > 128).astype(np.uint8)
    path = write(tmp_path / "classes.tif", indices)
    with rasterio.open(path, "r+") as file:
        file.write_colormap(1, {0: (1, 2, 3, 255), 1: (250, 20, 120, 255)})
    pixels, _ = whole(path)
    assert (pixels == np.array([[1, 2, 3], [250, 20, 120]], np.uint8)[indices[..., 0]]).all()


@pytest.mark.parametrize("turned", [False, True])
def test_a_true_transparency_lies_on_white(tmp_path, image, turned):
    image = image.copy()
    image[..., :3], image[..., 3] = 100, 255
    image[:100, :, 3] = 0
    image[100:104, :, 3] = 51
    place = (557_699, 3_648_377)
    transform = rasterio.Affine(0, 1, place[0], 1, 0, place[1]) if turned else None
    options = {"photometric": "rgb", "alpha": "yes", "transform": transform}
    pixels, notes = whole(write(tmp_path / "alpha.tif", image, **options))
    assert notes == []
    pixels = np.rot90(pixels, -1) if turned else pixels
    assert (pixels[5:97, 5:-5] == 255).all()
    assert (pixels[107:-5, 5:-5] == 100).all()
    assert (pixels[102, 5:-5] == 224).all()


def test_pages_of_a_geotiff_are_scenes(tmp_path, image):
    write(tmp_path / "pages.tif", image[..., :3])
    with rasterio.open(
        tmp_path / "pages.tif",
        "w",
        driver="GTiff",
        height=300,
        width=400,
        count=3,
        dtype="uint8",
        crs=UTM_NORTH,
        transform=rasterio.Affine(1, 0, 557_699, 0, -1, 3_648_377),
        APPEND_SUBDATASET="YES",
    ) as file:
        file.write(np.moveaxis(255 - image[..., :3], -1, 0))
    path = str(tmp_path / "pages.tif")
    with rasterio.open(path) as file:
        assert len(file.subdatasets) == 2
    pixels, notes = whole(path)
    assert "holds 2 scenes" in notes[0]
    assert (pixels == image[..., :3]).all()
    assert (whole(path, scene="1")[0] == 255 - image[..., :3]).all()


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
        pytest.raises(
            SlideError, match=r"^slide \S+cut\.tif: the file is damaged or incomplete [^\n]+\.$"
        ),
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
    with pytest.raises(SlideError, match=r"^slide \S+nowhere\.tif: the [^\n]+\.$"):
        open_slide(path, base_mpp=1e6)
