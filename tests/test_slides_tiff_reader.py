import numpy as np
import pytest
import tifffile
from PIL import Image

from raylarge.errors import SlideError
from raylarge.slides import openslide_reader, scenes, tiff_reader
from raylarge.slides.protocol import ReadOptions, UnreadableSlide
from raylarge.slides.reader import open_slide
from raylarge.slides.tiff_reader import TiffPyramid


@pytest.fixture(scope="module")
def image():
    noise = np.random.default_rng(0).integers(0, 256, (50, 65, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((520, 400), Image.Resampling.BICUBIC))


def whole(path, **options):
    with open_slide(str(path), 0.5, **options) as slide:
        assert isinstance(slide._pyramid, TiffPyramid)
        read = slide.read(0, 0, *slide.size_px)
        assert (slide.read(37, 111, 150, 200) == read[37:187, 111:311]).all()
    return read


@pytest.mark.parametrize("compression", [None, "zlib", "lzw", "zstd", "jpeg", "jpeg2000"])
@pytest.mark.parametrize("layout", [{"tile": (128, 64)}, {"rowsperstrip": 33}])
def test_every_codec_and_layout_gives_its_pixels(tmp_path, image, compression, layout):
    path = tmp_path / "image.tif"
    options = {"compressionargs": {"level": 95}} if compression == "jpeg" else {}
    if compression == "jpeg2000":
        options = {"compressionargs": {"level": 0}}
    tifffile.imwrite(
        path, image, photometric="rgb", compression=compression, bigtiff=True, **layout, **options
    )
    read = whole(path)
    error = np.abs(read.astype(int) - image)
    assert error.mean() <= (4 if compression == "jpeg" else 0)
    assert (read == tifffile.imread(path)).all()


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("layout", [{"tile": (64, 64)}, {"rowsperstrip": 33}])
def test_planes_stored_one_after_the_other(tmp_path, image, compression, layout):
    path = tmp_path / "planar.tif"
    tifffile.imwrite(
        path,
        np.moveaxis(image, -1, 0),
        photometric="rgb",
        planarconfig="separate",
        compression=compression,
        **layout,
    )
    assert (whole(path) == image).all()


@pytest.mark.parametrize(
    ("unit", "size"), [("µm", 0.25), ("nm", 250), ("mm", 0.00025), ("cm", 0.000025)]
)
def test_an_ome_pyramid_in_sub_ifds(tmp_path, image, unit, size):
    path = tmp_path / "image.ome.tif"
    metadata = {
        "axes": "YXS",
        "PhysicalSizeX": size,
        "PhysicalSizeXUnit": unit,
        "PhysicalSizeY": size,
        "PhysicalSizeYUnit": unit,
    }
    label = np.zeros((100, 40, 3), np.uint8)
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        options = {"photometric": "rgb", "tile": (64, 64), "resolution": (72, 72)}
        writer.write(image, subifds=2, metadata=metadata, **options)
        writer.write(image[::2, ::2], subfiletype=1, **options)
        writer.write(image[::4, ::4], subfiletype=1, **options)
        writer.write(label, metadata={"axes": "YXS", "Name": "label"}, **options)
    with open_slide(str(path)) as slide:
        assert slide.mpp == pytest.approx(0.25)
        assert slide._pyramid.sizes == [(400, 520), (200, 260), (100, 130)]
        assert (slide.read(0, 0, 200, 260) == image[::2, ::2]).all()  # the level of 20x
        assert (slide.read(0, 0, 200, 260, downscale=2) == image[::4, ::4]).all()


def test_a_pyramid_of_pages(tmp_path, image):
    with tifffile.TiffWriter(tmp_path / "pages.tif") as writer:
        for level, part in enumerate((image, image[::2, ::2])):
            options = {"tile": (64, 64), "photometric": "rgb", "metadata": None}
            writer.write(part, subfiletype=int(level > 0), compression="zstd", **options)
    assert openslide_reader.vendor(str(tmp_path / "pages.tif")) in (None, "generic-tiff")
    with open_slide(str(tmp_path / "pages.tif"), 0.5) as slide:
        assert slide._pyramid.sizes == [(400, 520), (200, 260)]
        assert (slide.read(0, 0, 400, 520, downscale=2) == image[::2, ::2]).all()


def test_grey_palette_bits_and_alpha_become_rgb(tmp_path, image):
    grey, tiles = image[..., 0], {"tile": (64, 64)}
    tifffile.imwrite(tmp_path / "grey.tif", grey, **tiles)
    assert (whole(tmp_path / "grey.tif") == grey[..., None]).all()
    tifffile.imwrite(tmp_path / "negative.tif", grey, photometric="miniswhite", **tiles)
    assert (whole(tmp_path / "negative.tif") == 255 - grey[..., None]).all()
    tifffile.imwrite(tmp_path / "bits.tif", grey > 127, photometric="minisblack")
    assert (whole(tmp_path / "bits.tif") == 255 * (grey > 127)[..., None]).all()
    two = np.array([[0, 9], [0, 200], [0, 77]], np.uint16) * 257
    colours = [(320, "H", 6, two.ravel().tolist(), True)]
    tifffile.imwrite(tmp_path / "two.tif", grey > 127, photometric=0, extratags=colours)
    with tifffile.TiffFile(tmp_path / "two.tif", mode="r+b") as file:
        file.pages[0].tags["PhotometricInterpretation"].overwrite(3)  # which tifffile cannot write
    assert (whole(tmp_path / "two.tif") == (two // 257).T[(grey > 127).astype(int)]).all()
    table = np.random.default_rng(1).integers(0, 256, (3, 256)).astype(np.uint16) * 257
    tifffile.imwrite(tmp_path / "palette.tif", grey, photometric="palette", colormap=table, **tiles)
    assert (whole(tmp_path / "palette.tif") == (table // 257).T[grey]).all()


@pytest.mark.parametrize("kind", ["unassalpha", "assocalpha", "unspecified"])
def test_a_fourth_band_is_alpha_where_it_says_so(tmp_path, image, kind):
    alpha = np.linspace(0, 255, 400 * 520).reshape(400, 520, 1).astype(np.uint8)
    share = alpha / 255
    stored = (image * share).astype(np.uint8) if kind == "assocalpha" else image
    options = {"photometric": "rgb", "extrasamples": [kind], "tile": (64, 64)}
    tifffile.imwrite(tmp_path / "four.tif", np.dstack([stored, alpha]), **options)
    expected = image if kind == "unspecified" else image * share + 255 * (1 - share)
    assert np.abs(whole(tmp_path / "four.tif") - expected).max() <= 1


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_deep_samples_are_scaled(tmp_path, image, planar):
    path, deep = tmp_path / "deep.tif", image.astype(np.uint16)
    options = {"photometric": "rgb", "planarconfig": planar, "tile": (64, 64)}

    def write(samples, **more):
        samples = np.moveaxis(samples, -1, 0) if planar == "separate" else samples
        tifffile.imwrite(path, samples, **options, **more)

    write(deep * 257)
    assert (whole(path) == image).all()
    with open_slide(str(path), 0.5) as slide:
        assert slide.notes[0].startswith("16-bit samples: 0 to 65535 became 0 to 255")
    assert (whole(path, options=ReadOptions(bands=(3, 2, 1))) == image[..., ::-1]).all()
    reflectance = (image / 255).astype(np.float32)
    reflectance[:5] = np.nan
    write(reflectance)
    read = whole(path, options=ReadOptions(value_range=(0.0, 1.0)))
    assert (read[:5] == 255).all()
    assert (read[5:] == image[5:]).all()


@pytest.mark.parametrize(
    ("samples", "options", "expected"),
    [
        (np.arange(0, 65536, 257, np.uint16).reshape(16, 16), {}, np.arange(256)),
        (np.arange(256, dtype=np.uint16).reshape(16, 16) * 16, {"bitspersample": 12}, None),
        (np.full((16, 16), 65535, np.uint16), {"photometric": "miniswhite"}, np.zeros(256)),
    ],
)
def test_deep_grey_is_scaled_by_its_bits(tmp_path, samples, options, expected):
    tifffile.imwrite(tmp_path / "grey.tif", samples, **{"photometric": "minisblack", **options})
    with open_slide(str(tmp_path / "grey.tif"), 0.5) as slide:
        read = slide.read(0, 0, 16, 16)
    expected = np.round(samples.ravel() * 255.0 / 4095) if expected is None else expected
    assert (read == np.reshape(expected, (16, 16, 1))).all()


def test_alpha_of_deep_and_grey_images_lies_on_white(tmp_path, image):
    alpha = np.linspace(0, 65535, 400 * 520).reshape(400, 520, 1).astype(np.uint16)
    share = alpha / 65535
    for kind, colours in (("rgb", image), ("minisblack", image[..., :1])):
        stored = np.dstack([colours.astype(np.uint16) * 257, alpha])
        tifffile.imwrite(
            tmp_path / "alpha.tif",
            stored,
            photometric=kind,
            planarconfig="contig",
            extrasamples=["unassalpha"],
        )
        expected = colours * share + 255 * (1 - share)
        assert np.abs(whole(tmp_path / "alpha.tif") - expected).max() <= 1


def test_unnamed_channels_are_said_and_can_be_chosen(tmp_path, image):
    four = np.dstack([image, image[..., 0]])
    grey = {"photometric": "minisblack", "planarconfig": "contig"}
    tifffile.imwrite(tmp_path / "four.tif", four, **grey)
    with open_slide(str(tmp_path / "four.tif"), 0.5) as slide:
        assert "does not say which bands are its colours: bands 1, 2, 3 were" in slide.notes[0]
        assert (slide.read(0, 0, 400, 520) == image).all()
    assert (
        whole(tmp_path / "four.tif", options=ReadOptions(bands=(4, 3, 2))) == four[..., [3, 2, 1]]
    ).all()


def test_raw_ycbcr_is_refused(tmp_path, image):
    tifffile.imwrite(tmp_path / "raw.tif", image, photometric="rgb")
    with tifffile.TiffFile(tmp_path / "raw.tif", mode="r+b") as file:
        file.pages[0].tags["PhotometricInterpretation"].overwrite(6)
    with pytest.raises(SlideError, match="holds YCbCr colours without JPEG; convert it"):
        open_slide(str(tmp_path / "raw.tif"), 0.5)


@pytest.fixture
def two_scenes(tmp_path, image):
    path = tmp_path / "two.ome.tif"
    with tifffile.TiffWriter(path) as writer:
        for name, pixels in (("left", image), ("right", 255 - image)):
            writer.write(
                pixels,
                photometric="rgb",
                tile=(64, 64),
                metadata={"axes": "YXS", "Name": name, "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5},
            )
    return path


@pytest.mark.parametrize(
    ("scene", "inverted"), [("", False), ("0", False), ("1", True), ("right", True)]
)
def test_a_scene_is_read_by_number_or_name(two_scenes, image, scene, inverted):
    with open_slide(str(two_scenes), options=ReadOptions(scene=scene)) as slide:
        assert (slide.read(0, 0, 400, 520) == (255 - image if inverted else image)).all()
        notes = slide.notes
    if scene:
        assert notes == [f"scene {int(inverted)} of 2 was read"]
    else:
        assert notes == [
            "the file holds 2 scenes (0 of 400 x 520 px, 1 of 400 x 520 px): scene 0, the first "
            "of the largest, was read (tile.scene= names another)"
        ]


@pytest.mark.parametrize("scene", ["2", "-1", "middle", "²"])
def test_a_scene_that_is_not_there_is_refused(two_scenes, scene):
    with pytest.raises(
        SlideError, match=rf"holds no scene tile\.scene={scene}, but 2: 0 of 400 x 520 px, 1 of"
    ):
        open_slide(str(two_scenes), options=ReadOptions(scene=scene))


def test_a_file_without_an_image_is_refused():
    with pytest.raises(UnreadableSlide, match="holds no image"):
        scenes.choose([], [], "")


def test_series_of_other_sizes_are_scenes_and_the_largest_is_read(tmp_path, image):
    with tifffile.TiffWriter(tmp_path / "label.tif") as writer:
        writer.write(image[:100, :90], photometric="rgb")
        writer.write(image, photometric="rgb", tile=(64, 64), subifds=1)
        writer.write(image[::2, ::2], photometric="rgb", tile=(64, 64), subfiletype=1)
    with open_slide(str(tmp_path / "label.tif"), 0.5) as slide:
        assert slide._pyramid.sizes == [(400, 520), (200, 260)]
        assert "scene 1, the largest, was read" in slide.notes[0]
    with open_slide(str(tmp_path / "label.tif"), 0.5, options=ReadOptions(scene="0")) as slide:
        assert (slide.read(0, 0, 100, 90) == image[:100, :90]).all()


def test_tiles_that_a_sparse_file_leaves_out_are_white(tmp_path, image):
    def tiles():
        yield image[:256, :256]
        yield from [None] * 5

    shape = {"shape": (512, 768, 3), "dtype": np.uint8}
    tifffile.imwrite(tmp_path / "sparse.tif", tiles(), tile=(256, 256), photometric="rgb", **shape)
    read = whole(tmp_path / "sparse.tif")
    assert (read[:256, :256] == image[:256, :256]).all()
    assert (read[256:] == 255).all()


def test_the_unit_of_imagej_counts(tmp_path, image):
    tifffile.imwrite(
        tmp_path / "fiji.tif", image, imagej=True, resolution=(4, 4), metadata={"unit": "um"}
    )
    with open_slide(str(tmp_path / "fiji.tif")) as slide:
        assert slide.mpp == pytest.approx(0.25)


def test_one_huge_tile_is_refused(tmp_path, image, monkeypatch):
    tifffile.imwrite(tmp_path / "tile.tif", image, tile=(512, 528), photometric="rgb")
    monkeypatch.setattr(tiff_reader, "DECODE_PX", 100_000)
    with pytest.raises(SlideError, match=r"claims 512 x 528 pixels, and more than 100,000 are not"):
        open_slide(str(tmp_path / "tile.tif"), 0.5)


def test_the_same_pixels_as_openslide(tmp_path, image):
    from raylarge import pyramid

    pyramid.write(str(tmp_path / "made.tif"), [image], (400, 520), 0.5, {})
    assert openslide_reader.vendor(str(tmp_path / "made.tif")) == "generic-tiff"
    other = openslide_reader.OpenSlidePyramid(str(tmp_path / "made.tif"))
    mine = TiffPyramid(str(tmp_path / "made.tif"))
    assert mine.sizes == other.sizes
    for level, (rows, columns) in enumerate(mine.sizes):
        a, b = (one.read_level(level, 0, 0, rows, columns) for one in (mine, other))
        assert (a == b).all()
