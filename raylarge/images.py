"""Pixels and files: PNG, conversions with one rounding rule, contact sheets, pyramidal TIFF.

An image is uint8, [rows, columns, 3], RGB. A network's image is float32, [3, rows, columns],
in [-1, 1]: x = pixel / 127.5 - 1, and back by round(127.5 (x + 1)), clamped.
Whatever raylarge writes is marked as synthetic in the file unless the caller says that it
is not; bytes of a data table carry no mark.
"""

from __future__ import annotations

import io
import os
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import fsspec
import numpy as np
import tifffile
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from raylarge import storage

Pixels = UInt8[np.ndarray, "_ _ 3"]
_TILE_PX = 256
_GAP_PX = 4
_INK = (40, 40, 40)


def to_float(
    image: UInt8[np.ndarray, "*batch rows columns 3"],
) -> Float[Tensor, "*batch 3 rows columns"]:
    """Pixels as a network sees them: float32 in [-1, 1], channels before rows."""
    return torch.from_numpy(image.astype(np.float32) / 127.5 - 1.0).movedim(-1, -3).contiguous()


def to_uint8(
    x: Float[Tensor, "*batch 3 rows columns"],
) -> UInt8[np.ndarray, "*batch rows columns 3"]:
    """A network's image as pixels: round(127.5 (x + 1)), clamped to 0..255."""
    pixels = (127.5 * (x.detach().float() + 1.0)).round().clamp(0, 255)
    return pixels.to(torch.uint8).movedim(-3, -1).cpu().contiguous().numpy()


def png_bytes(image: Pixels, text: Mapping[str, str] | None = None) -> bytes:
    """An image as PNG bytes, with text fields when given."""
    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_itxt(key, value)
    sink = io.BytesIO()
    Image.fromarray(image).save(sink, format="PNG", pnginfo=info)
    return sink.getvalue()


def from_bytes(content: bytes) -> Pixels:
    """An image from the bytes of a PNG (or JPEG) file."""
    return np.array(Image.open(io.BytesIO(content)).convert("RGB"))


def write_png(
    path: str, image: Pixels, text: Mapping[str, str] | None = None, *, synthetic: bool = True
) -> None:
    """Write a PNG atomically, with `Software`, `Synthetic` and the given text fields in it.

    Args:
        path: a local path or URL.
        image: the pixels.
        text: further fields, such as the order as JSON.
        synthetic: False only for pictures that show nothing but real data.
    """
    mark = {"Software": "raylarge", **({"Synthetic": "true"} if synthetic else {})}
    storage.write_bytes(path, png_bytes(image, {**(text or {}), **mark}))


def read_png(path: str) -> tuple[Pixels, dict[str, str]]:
    """A PNG's pixels and its text fields.

    Raises:
        UserError: nothing stands at the path.
    """
    picture = Image.open(io.BytesIO(storage.read_bytes(path)))
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


def write_pyramid(path: str, image: Pixels, mpp: float, description: str = "") -> None:
    """Write a tiled pyramidal TIFF (deflate, halved levels) that OpenSlide opens.

    Args:
        path: a local path or URL; written atomically.
        image: the full resolution; a `np.memmap` is read piece by piece.
        mpp: micrometres per pixel, kept in the resolution tags.
        description: kept in ImageDescription after the synthetic mark.
    """
    with tempfile.TemporaryDirectory(prefix="raylarge-") as scratch:
        made = Path(scratch) / "pyramid.tif"
        with tifffile.TiffWriter(made, bigtiff=image.nbytes > 2**31) as writer:
            for number, level in enumerate(_levels(image, Path(scratch))):
                _write_level(writer, level, number, mpp, description)
        _put(made, path)


def _write_level(
    writer: tifffile.TiffWriter, level: Pixels, number: int, mpp: float, description: str
) -> None:
    pixels_per_cm = 10_000 / (mpp * 2**number)
    writer.write(
        _tiles(level),
        shape=level.shape,
        dtype=np.uint8,
        tile=(_TILE_PX, _TILE_PX),
        photometric="rgb",
        compression="zlib",
        predictor=True,
        resolution=(pixels_per_cm, pixels_per_cm),
        resolutionunit="CENTIMETER",
        subfiletype=1 if number else 0,
        software="raylarge",
        description=f"Synthetic image made by raylarge. {description}".strip(),
        metadata=None,
    )


def _tiles(level: Pixels) -> Iterator[Pixels]:
    """Tiles row by row; those at the right and bottom are filled up with white."""
    rows, columns, _ = level.shape
    for top in range(0, rows, _TILE_PX):
        for left in range(0, columns, _TILE_PX):
            tile = np.full((_TILE_PX, _TILE_PX, 3), 255, np.uint8)
            part = level[top : top + _TILE_PX, left : left + _TILE_PX]
            tile[: part.shape[0], : part.shape[1]] = part
            yield tile


def _levels(image: Pixels, scratch: Path) -> Iterator[Pixels]:
    """The image, then its halves by 2 x 2 means until one tile holds it; on disk, in strips."""
    yield image
    number = 0
    while max(image.shape[:2]) > _TILE_PX and min(image.shape[:2]) >= 2:
        number += 1
        rows, columns = image.shape[0] // 2, image.shape[1] // 2
        half = np.lib.format.open_memmap(
            scratch / f"level-{number}.npy", mode="w+", dtype=np.uint8, shape=(rows, columns, 3)
        )
        for top in range(0, rows, _TILE_PX):
            strip = image[2 * top : 2 * min(top + _TILE_PX, rows), : 2 * columns].astype(np.uint16)
            sums = strip[0::2, 0::2] + strip[0::2, 1::2] + strip[1::2, 0::2] + strip[1::2, 1::2]
            half[top : top + _TILE_PX] = ((sums + 2) // 4).astype(np.uint8)
        image = half
        yield image


def _put(made: Path, path: str) -> None:
    """Move a finished local file to its place, atomically."""
    if not storage.is_local(path):
        fs, root = fsspec.core.url_to_fs(path)
        fs.put_file(str(made), root)
        return
    target = Path(path.removeprefix("file://"))
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        with made.open("rb") as source, beside.open("wb") as stream:
            while piece := source.read(1 << 24):
                stream.write(piece)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)
