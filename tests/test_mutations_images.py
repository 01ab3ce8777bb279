"""Random images as users hand them in: the same pixels by the stated rule, or a refusal.

Each is read twice: as an uploaded image, and as a slide of its own resolution.
"""

import io

import numpy as np
import pytest
import tifffile
from mutations import Refused, outcome, painted, pick
from PIL import Image

from raylarge import uploads
from raylarge.slides.protocol import ReadOptions
from raylarge.slides.reader import open_slide


def to_white(colours, alpha):
    """Composite over white: c a + 255 (1 - a), rounded half up."""
    a = alpha[..., None].astype(np.int64)
    return ((2 * (colours * a + 255 * (255 - a)) + 255) // 510).astype(np.uint8)


def saved(picture, kind="PNG", **options):
    sink = io.BytesIO()
    picture.save(sink, kind, **options)
    return sink.getvalue()


def tiff(rng, array, **options):
    """A TIFF in strips, tiles, planes or either byte order."""
    if array.ndim == 3 and rng.random() < 0.3:
        array, options = np.moveaxis(array, -1, 0), {"planarconfig": "separate", **options}
    layout = pick(rng, [{}, {"tile": (16, 16)}, {"rowsperstrip": 5}, {"byteorder": ">"}])
    codec = pick(rng, [None, "zlib", "lzw", "packbits"])
    sink = io.BytesIO()
    tifffile.imwrite(sink, array, compression=codec, **layout, **options)
    return sink.getvalue()


def colours(rng, rgb):
    return saved(Image.fromarray(rgb), pick(rng, ["PNG", "TIFF"])), rgb


def colours_in_tiff(rng, rgb):
    return tiff(rng, rgb, photometric="rgb"), rgb


def grey(rng, rgb):
    level = rgb[..., 0]
    content = pick(rng, [saved(Image.fromarray(level)), tiff(rng, level, photometric="minisblack")])
    return content, np.dstack([level] * 3)


def inverted(rng, rgb):
    level = rgb[..., 0]
    return tiff(rng, 255 - level, photometric="miniswhite"), np.dstack([level] * 3)


def deep_grey(rng, rgb):
    deep = rng.integers(0, 1 << 16, rgb.shape[:2], dtype=np.uint16)
    level = np.floor(deep.astype(np.float64) * 255 / 65535 + 0.5).astype(np.uint8)
    options = [saved(Image.fromarray(deep)), tiff(rng, deep, photometric="minisblack")]
    return pick(rng, options), np.dstack([level] * 3)


def alpha(rng, rgb):
    opacity = rng.integers(0, 256, rgb.shape[:2], dtype=np.uint8)
    opacity[::2] = pick(rng, [0, 255])
    rgba = np.dstack([rgb, opacity])
    options = {"photometric": "rgb", "extrasamples": ["unassalpha"]}
    return pick(rng, [saved(Image.fromarray(rgba)), tiff(rng, rgba, **options)]), to_white(
        rgb, opacity
    )


def grey_alpha(rng, rgb):
    level, opacity = rgb[..., 0], rgb[..., 1]
    picture = Image.merge("LA", [Image.fromarray(level), Image.fromarray(opacity)])
    return saved(picture), to_white(np.dstack([level] * 3), opacity)


def palette(rng, rgb):
    """Up to 256 colours, perhaps one of them transparent."""
    table = painted(rng, 1, 256)[0]
    index = rgb[..., 0]
    picture = Image.fromarray(index)
    picture.putpalette(table.ravel().tolist())
    clear = pick(rng, [None, int(index[0, 0])])
    options = {} if clear is None else {"transparency": clear}
    expected = table[index].copy()
    expected[index == (-1 if clear is None else clear)] = 255
    return saved(picture, **options), expected


def one_colour_clear(rng, rgb):
    """The colour of a pixel is transparent."""
    colour = tuple(int(v) for v in rgb[1, 2])
    expected = rgb.copy()
    expected[(rgb == rgb[1, 2]).all(axis=-1)] = 255
    return saved(Image.fromarray(rgb), transparency=colour), expected


def bits(rng, rgb):
    lit = rgb[..., 0] > 128
    kind, options = pick(rng, [("PNG", {}), ("TIFF", {}), ("TIFF", {"compression": "group4"})])
    level = (lit * 255).astype(np.uint8)
    return saved(Image.fromarray(lit), kind, **options), np.dstack([level] * 3)


def interlaced_or_small(rng, rgb):
    rgb = rgb[: int(rng.integers(1, 4)), : int(rng.integers(1, 4))]
    return saved(Image.fromarray(rgb)), rgb


FINE = (
    *(colours, colours_in_tiff, grey, inverted, deep_grey, alpha, grey_alpha, palette),
    *(one_colour_clear, bits, interlaced_or_small),
)


def as_slide(content, path):
    path.write_bytes(content)
    with open_slide(str(path), 0.5, 0.5) as slide:
        return slide.read(0, 0, *slide.size_px).tolist()


@pytest.mark.parametrize("seed", range(66))
def test_pixels_come_out_by_the_stated_rule(tmp_path, seed):
    rng = np.random.default_rng([31, seed])
    kind = FINE[seed % len(FINE)]
    rgb = painted(rng, int(rng.integers(20, 60)), int(rng.integers(20, 60)))
    content, expected = kind(rng, rgb)
    assert outcome(lambda: uploads.read(content, "source.image").tolist()) == expected.tolist()
    assert outcome(lambda: as_slide(content, tmp_path / "slide")) == expected.tolist()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_upload_is_turned_upright_and_a_slide_is_not(tmp_path, orientation):
    rgb = painted(np.random.default_rng([32, orientation]), 21, 34)
    exif = Image.Exif()
    exif[274] = orientation
    content = saved(Image.fromarray(rgb), exif=exif)
    upright = [
        *(lambda x: x, lambda x: x[:, ::-1], lambda x: x[::-1, ::-1], lambda x: x[::-1]),
        *(lambda x: x.transpose(1, 0, 2), lambda x: np.rot90(x, -1)),
        *(lambda x: x[::-1, ::-1].transpose(1, 0, 2), lambda x: np.rot90(x, 1)),
    ][orientation - 1](rgb)
    assert outcome(lambda: uploads.read(content, "source.image").tolist()) == upright.tolist()
    assert outcome(lambda: as_slide(content, tmp_path / "slide")) == rgb.tolist()


def floats(rng, rgb):
    return tiff(rng, (rgb[..., 0] / 255).astype(np.float32), photometric="minisblack")


def signed(rng, rgb):
    kind = pick(rng, [np.int8, np.int16, np.int32])
    return tiff(rng, rgb[..., 0].astype(kind), photometric="minisblack")


def long(rng, rgb):
    return tiff(
        rng, rgb[..., 0].astype(pick(rng, [np.uint32, np.uint64])), photometric="minisblack"
    )


def cmyk(rng, rgb):
    picture = Image.fromarray(np.dstack([rgb, rgb[..., :1]]), "CMYK")
    return saved(picture, pick(rng, ["JPEG", "TIFF"]))


def lab(rng, rgb):
    return saved(Image.fromarray(rgb).convert("LAB"), "TIFF")


def cut(rng, rgb):
    kind = pick(rng, ["PNG", "JPEG", "TIFF"])
    content = saved(Image.fromarray(rgb), kind)
    if kind == "JPEG":
        return content[: int(rng.integers(10, len(content) // 2))]
    return content[: int(rng.integers(1, len(content) - 200))]


def bands(rng, rgb):
    """Two or five bands, of which no one says what they are."""
    count = pick(rng, [2, 5, 7])
    array = rng.integers(0, 256, (count, 32, 40), dtype=np.uint8)
    sink = io.BytesIO()
    tifffile.imwrite(sink, array, photometric="minisblack", planarconfig="separate")
    return sink.getvalue()


def other_format(rng, rgb):
    content = saved(Image.fromarray(rgb), pick(rng, ["GIF", "BMP", "WEBP", "PPM", "ICO", "PDF"]))
    return pick(rng, [content, b"", b"\0" * 300, b"%!PS-Adobe", b"<svg/>", b"\x89PNG\r\n\x1a\n"])


ODD = (floats, signed, long, cmyk, lab, cut, bands, other_format)


@pytest.mark.parametrize("seed", range(48))
def test_pixels_without_a_stated_way_are_refused(tmp_path, seed):
    rng = np.random.default_rng([33, seed])
    rgb = painted(rng, int(rng.integers(40, 60)), int(rng.integers(40, 60)))
    content = ODD[seed % len(ODD)](rng, rgb)
    assert outcome(lambda: uploads.read(content, "source.image").shape) == Refused("source.image")
    assert outcome(lambda: as_slide(content, tmp_path / "slide")) == Refused(
        f"slide {tmp_path}/slide"
    )


def animation(rng, rgb):
    frames = [Image.fromarray(rgb), Image.fromarray(255 - rgb)]
    return saved(frames[0], "PNG", save_all=True, append_images=frames[1:])


def pages(rng, rgb):
    frames = [Image.fromarray(rgb), Image.fromarray(255 - rgb)]
    return saved(frames[0], "TIFF", save_all=True, append_images=frames[1:])


@pytest.mark.parametrize("several", [animation, pages])
def test_an_upload_of_several_images_is_refused(several):
    content = several(None, painted(np.random.default_rng(34), 30, 40))
    assert outcome(lambda: uploads.read(content, "source.image")) == Refused(
        "source.image", "several"
    )


@pytest.mark.parametrize("seed", range(30))
def test_a_range_of_values_becomes_0_to_255(tmp_path, seed):
    """Samples of any type are scaled linearly and clipped; NaN is white."""
    rng = np.random.default_rng([35, seed])
    kind = pick(rng, [np.uint16, np.int16, np.uint32, np.int32, np.float16, np.float32, np.float64])
    low, high = pick(rng, [(0, 255), (100, 1000), (-50, 50), (1000, 0), (0, 30000)])
    values = rng.integers(-2000, 31000, (24, 31))
    if np.issubdtype(kind, np.unsignedinteger):
        values = np.abs(values)
    stored = values.astype(kind)
    exact = np.clip((stored.astype(np.float64) - low) * 255 / (high - low), 0, 255)
    level = np.floor(exact + 0.5).astype(np.uint8)
    if np.issubdtype(kind, np.floating):
        stored[0, :3] = [np.nan, np.inf, -np.inf]
        level[0, :3] = [255, *((255, 0) if high > low else (0, 255))]
    content = tiff(rng, stored, photometric="minisblack")
    (tmp_path / "slide").write_bytes(content)
    options = ReadOptions(value_range=(float(low), float(high)))
    with open_slide(str(tmp_path / "slide"), 0.5, 0.5, options=options) as slide:
        pixels = slide.read(0, 0, *slide.size_px)
    assert (pixels == level[..., None]).all()
