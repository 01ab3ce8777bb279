"""Images that users hand in: one rule for all kinds of pixels, and a sentence for all the rest."""

import base64
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from raylarge import order as orders
from raylarge import uploads
from raylarge.errors import UserError

ROWS, COLUMNS = 24, 40
y, x = np.mgrid[:ROWS, :COLUMNS]
RGB = np.stack([120 + x, 90 + y, 150 + x // 2], -1).astype(np.uint8)
GREY = RGB[..., 0].copy()
DEEP = GREY.astype(np.uint16) * 257


def file_of(picture, kind="PNG", **options):
    sink = io.BytesIO()
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    picture.save(sink, kind, **options)
    return sink.getvalue()


def tiff(array, **options):
    sink = io.BytesIO()
    tifffile.imwrite(sink, array, **options)
    return sink.getvalue()


def grey(values):
    return np.repeat(values[..., None], 3, axis=-1)


def rotated(kind, orientation=6, image=RGB):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return file_of(image, kind, exif=exif, **({"quality": 100} if kind == "JPEG" else {}))


def over_white():
    alpha = np.zeros((ROWS, COLUMNS), np.uint8)
    alpha[4:12, 4:30], alpha[12:20] = 255, 128
    share = alpha[..., None] / 255
    wanted = np.floor(RGB * share + 255 * (1 - share) + 0.5)
    return np.dstack([RGB, alpha]), wanted.astype(np.uint8)


PALETTE = Image.fromarray(RGB).quantize(200)
MIN_WHITE = tiff(255 - GREY, photometric="miniswhite")


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (file_of(RGB), RGB),
        (tiff(RGB, photometric="rgb"), RGB),
        (file_of(GREY), grey(GREY)),
        (file_of(DEEP), grey(GREY)),
        (tiff(DEEP), grey(GREY)),
        (tiff(DEEP, byteorder=">"), grey(GREY)),
        (tiff(RGB.astype(np.uint16) * 257, photometric="rgb"), RGB),
        (MIN_WHITE, grey(GREY)),
        (file_of(GREY > 140), grey(((GREY > 140) * 255).astype(np.uint8))),
        (file_of(PALETTE), np.asarray(PALETTE.convert("RGB"))),
        (file_of(over_white()[0]), over_white()[1]),
        (file_of(Image.fromarray(over_white()[0]), "TIFF"), over_white()[1]),
        (rotated("PNG"), np.rot90(RGB, -1)),
        (rotated("TIFF"), np.rot90(RGB, -1)),
        (rotated("PNG", 3), RGB[::-1, ::-1]),
        (rotated("PNG", 6, DEEP), grey(np.rot90(GREY, -1))),
    ],
)
def test_every_kind_of_pixel_becomes_rgb(content, wanted):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = uploads.read(content, "it")
    assert (image.dtype, image.shape) == (np.uint8, wanted.shape)
    assert np.abs(image.astype(int) - wanted).max() <= 1


def test_cameras_turn_their_jpegs():
    image = uploads.read(rotated("JPEG"), "it")
    assert image.shape == (COLUMNS, ROWS, 3)
    assert np.abs(image.astype(int) - np.rot90(RGB, -1)).mean() < 3


def test_a_pyramid_is_read_at_its_full_resolution():
    sink = io.BytesIO()
    with tifffile.TiffWriter(sink) as writer:
        writer.write(RGB, photometric="rgb")
        writer.write(RGB[::2, ::2], photometric="rgb", subfiletype=1)
    assert (uploads.read(sink.getvalue(), "it") == RGB).all()


def claiming(rows, columns):
    """A PNG of a hundred bytes whose header says how large it is."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"\0" * 64)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def moving(kind):
    frames = [Image.fromarray(np.roll(RGB, 5 * i, 1)) for i in range(3)]
    return file_of(frames[0], kind, save_all=True, append_images=frames[1:])


FLOATS = GREY.astype(np.float32) / 255
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
SVG = b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is no PNG, JPEG or TIFF image"),
        (b"no picture", "is no PNG, JPEG or TIFF image"),
        (EPS, "is no PNG, JPEG or TIFF image"),
        (SVG, "is no PNG, JPEG or TIFF image"),
        (moving("GIF"), "is no PNG, JPEG or TIFF image"),
        (file_of(RGB, "BMP"), "is no PNG, JPEG or TIFF image"),
        (moving("PNG"), "holds several images"),
        (moving("TIFF"), "holds several images"),
        (file_of(RGB)[: len(file_of(RGB)) // 2], "is damaged or incomplete"),
        (file_of(RGB, "JPEG")[:500], "is damaged or incomplete"),
        (tiff(RGB, photometric="rgb")[:1000], "damaged or incomplete|no PNG, JPEG or TIFF"),
        (claiming(ROWS, COLUMNS), "is damaged or incomplete"),
        (claiming(9000, 9000), "claims 9000 x 9000 pixels, and at most 67,108,864 are read"),
        (claiming(1 << 17, 1 << 17), "claims far more pixels"),
        (claiming(1 << 30, 1 << 30), "claims far more pixels"),
        (tiff(FLOATS), "holds floating-point grey"),
        (tiff(GREY.astype(np.int32)), "holds 32-bit grey"),
        (tiff(65535 - DEEP, photometric="miniswhite"), "samples of which 0 is white"),
        (file_of(Image.fromarray(RGB).convert("CMYK"), "JPEG"), "holds CMYK pixels"),
        (file_of(Image.fromarray(RGB).convert("CMYK"), "TIFF"), "holds CMYK pixels"),
        (file_of(Image.fromarray(RGB).convert("LAB"), "TIFF"), "holds LAB pixels"),
    ],
)
def test_what_is_no_picture_is_refused_in_a_sentence(content, why, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match=f"^image=a.png:? .*{why}") as error:
            uploads.read(content, "image=a.png")
    assert str(error.value).endswith(".")
    assert "BytesIO" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_garbled_files_are_read_or_refused_and_nothing_else():
    draw = np.random.default_rng(0)
    refused = 0
    for whole in (file_of(RGB), rotated("JPEG"), rotated("TIFF"), file_of(DEEP)):
        for place in draw.integers(0, min(len(whole), 600), 50):
            content = whole[:place] + bytes([int(draw.integers(256))]) + whole[place + 1 :]
            try:
                assert uploads.read(content, "it").ndim == 3
            except UserError:
                refused += 1
    assert refused > 40


def test_the_source_of_an_order_has_its_size():
    source = {"image": base64.b64encode(file_of(DEEP)).decode(), "octaves": 1}
    values = {"algorithm": "superres", "size": "48x80", "source": source}
    assert (uploads.source_of(orders.parse(values)) == grey(GREY)).all()
    with pytest.raises(UserError, match=r"the source has 24x40 px, an order of .* takes 40x24"):
        uploads.source_of(orders.parse({**values, "size": "80x48"}))
    for data in ("!", "\ud800", "a"):
        broken = {**values, "source": {"image": data, "octaves": 1}}
        with pytest.raises(UserError, match=r"^source\.image is not the base64 of a PNG, JPEG"):
            uploads.source_of(orders.parse(broken))
