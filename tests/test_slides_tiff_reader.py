import numpy as np
import pytest
import tifffile
from PIL import Image

from raylarge.errors import SlideError
from raylarge.slides import openslide_reader, tiff_reader
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
