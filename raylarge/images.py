"""Pixels and files: PNG, conversions with one rounding rule, contact sheets, the synthetic mark.

An image is uint8, [rows, columns, 3], RGB. A network's image is float32, [3, rows, columns],
in [-1, 1]: x = pixel / 127.5 - 1, and back by round(127.5 (x + 1)), clamped.
Whatever raylarge writes is marked as synthetic in the file unless the caller says that it
is not; bytes of a data table carry no mark.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageCms, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from raylarge import storage
from raylarge.errors import UserError

Pixels = UInt8[np.ndarray, "_ _ 3"]
_GAP_PX = 4
_INK = (40, 40, 40)


def to_float(
    image: UInt8[np.ndarray, "*batch rows columns 3"],
) -> Float[Tensor, "*batch 3 rows columns"]:
    """Pixels as a network sees them: float32 in [-1, 1], channels before rows."""
    first = np.ascontiguousarray(np.moveaxis(image, -1, -3))  # moving bytes is cheaper
    return torch.from_numpy(first).float().div_(127.5).sub_(1.0)


def to_uint8(
    x: Float[Tensor, "*batch 3 rows columns"],
) -> UInt8[np.ndarray, "*batch rows columns 3"]:
    """Return a network's image as pixels: round(127.5 (x + 1)), clamped to 0..255.

    Raises:
        UserError: NaN or infinity in it, which would become black or white pixels.
    """
    _require_finite(x)
    pixels = (x.detach().float() + 1.0).mul_(127.5).round_().clamp_(0, 255)  # one copy alone
    return pixels.to(torch.uint8).movedim(-3, -1).cpu().contiguous().numpy()


def _require_finite(x: Tensor) -> None:
    low, high = torch.aminmax(x.detach()) if x.numel() else (x.new_zeros(()),) * 2
    if not (low.isfinite() and high.isfinite()):
        bad = int((~x.isfinite()).sum())
        raise UserError(
            f"{bad} of {x.numel()} values of an image are NaN or infinite, so no picture is made "
            "of it; use dtype=float32, or weights of an earlier checkpoint."
        )


def png_bytes(
    image: Pixels, text: Mapping[str, str] | None = None, icc: bytes | None = None
) -> bytes:
    """An image as PNG bytes, with text fields and an ICC profile when given."""
    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_itxt(key, value)
    sink = io.BytesIO()
    Image.fromarray(image).save(sink, format="PNG", pnginfo=info, icc_profile=icc)
    return sink.getvalue()


def encoded(image: Pixels, quality: int = 0) -> bytes:
    """An image as the bytes of a PNG, or of a JPEG of a quality from 1 to 100 (no subsampling)."""
    sink = io.BytesIO()
    if quality:
        Image.fromarray(image).save(sink, format="JPEG", quality=quality, subsampling=0)
    else:  # runs alone, of zlib: a quarter of the time for the same size
        Image.fromarray(image).save(sink, format="PNG", compress_type=zlib.Z_RLE)
    return sink.getvalue()


def srgb() -> bytes:
    """An sRGB profile; its date of creation is fixed, so that equal images make equal files."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[24:36] = np.array([2000, 1, 1, 0, 0, 0], ">u2").tobytes()
    return bytes(profile)


def from_bytes(content: bytes) -> Pixels:
    """An image from the bytes of a PNG (or JPEG) file."""
    return np.array(Image.open(io.BytesIO(content), formats=("PNG", "JPEG")).convert("RGB"))


def marked(text: Mapping[str, str], *, synthetic: bool = True) -> dict[str, str]:
    """Text fields with the mark that every file of raylarge bears; it cannot be overruled."""
    mark = {"Software": "raylarge", **({"Synthetic": "true"} if synthetic else {})}
    return {**text, **mark}


def write_png(
    path: str, image: Pixels, text: Mapping[str, str] | None = None, *, synthetic: bool = True
) -> None:
    """Write a PNG atomically, in sRGB, with `Software`, `Synthetic` and the text fields in it.

    Args:
        path: a local path or URL.
        image: the pixels.
        text: further fields, such as the order as JSON.
        synthetic: False only for pictures that show nothing but real data.
    """
    fields = marked(text or {}, synthetic=synthetic)
    storage.write_bytes(path, png_bytes(image, fields, srgb()))


def read_png(path: str) -> tuple[Pixels, dict[str, str]]:
    """A PNG's pixels and its text fields.

    Raises:
        UserError: nothing stands at the path.
    """
    picture = Image.open(io.BytesIO(storage.read_bytes(path)), formats=("PNG",))
    text = {key: str(value) for key, value in getattr(picture, "text", {}).items()}
    return np.array(picture.convert("RGB")), text


def sheet(
    rows: Sequence[Sequence[Pixels]],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    cell_px: int = 128,
) -> Pixels:
    """A contact sheet: rows of images in square cells, with small labels.

    Images are shown whole, enlarged by whole factors without smoothing or shrunk to the cell.
    """
    font = ImageFont.load_default(size=13)
    left = max((int(font.getlength(label)) + 10 for label in row_labels), default=_GAP_PX)
    top = 22 if column_labels else _GAP_PX
    pitch = cell_px + _GAP_PX
    width = left + pitch * max(len(row) for row in rows)
    page = Image.new("RGB", (width, top + pitch * len(rows)), "white")
    pen = ImageDraw.Draw(page)
    for index, label in enumerate(column_labels):
        pen.text((left + index * pitch, 3), label, fill=_INK, font=font)
    for index, label in enumerate(row_labels):
        pen.text((4, top + index * pitch + cell_px // 2 - 8), label, fill=_INK, font=font)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            page.paste(_fit(image, cell_px), (left + j * pitch, top + i * pitch))
    return np.array(page)


def _fit(image: Pixels, cell_px: int) -> Image.Image:
    picture = Image.fromarray(image)
    longest = max(picture.size)
    if longest <= cell_px:
        times = cell_px // longest
        return picture.resize(
            (picture.width * times, picture.height * times), Image.Resampling.NEAREST
        )
    picture.thumbnail((cell_px, cell_px), Image.Resampling.BICUBIC)
    return picture
