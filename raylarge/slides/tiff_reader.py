"""Read generic TIFF by tifffile: tiled or in strips, pyramids, OME-TIFF, BigTIFF.

tifffile locates the levels (pages, SubIFDs, OME) and decodes only the tiles or strips that a region
overlaps, with every codec of imagecodecs. A large image that is one page of strips
is converted into tiles first (`convert.py`). Rows and columns are those stored in the file: the
orientation tag is not applied, as in OpenSlide.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from functools import lru_cache
from typing import Any

import numpy as np
import tifffile
from jaxtyping import Shaped, UInt8
from tifffile import COMPRESSION, EXTRASAMPLE, PHOTOMETRIC, PLANARCONFIG

from raylarge.slides import bands, convert, scenes
from raylarge.slides.bands import Channels
from raylarge.slides.protocol import (
    AS_STORED,
    DAMAGE,
    DECODE_PX,
    SLIDE_PX,
    WHOLE_PX,
    Hint,
    Pixels,
    ReadOptions,
    UnreadableSlide,
    check_size,
    parser_errors,
)

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_GEO_KEYS, _ICC_PROFILE = 34735, 34675
_CACHE_BYTES = 1 << 26
"""Decoded tiles or strips that a level remembers: neighbours are read soon after."""
_UM_PER_UNIT = {2: 25_400.0, 3: 10_000.0}
_UM_PER_NAME = {"nm": 1e-3, "µm": 1.0, "um": 1.0, "micron": 1.0, "mm": 1e3, "cm": 1e4, "m": 1e6}
_GREY = (PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.MINISWHITE)
_KNOWN = (*_GREY, PHOTOMETRIC.PALETTE, PHOTOMETRIC.RGB, PHOTOMETRIC.YCBCR)
_PLAIN = (
    *(COMPRESSION.NONE, COMPRESSION.LZW, COMPRESSION.DEFLATE, COMPRESSION.ADOBE_DEFLATE),
    *(COMPRESSION.PACKBITS, COMPRESSION.ZSTD, COMPRESSION.LZMA),
)
"""Codecs that leave YCbCr as it is; those of images make it RGB."""
_ALPHA = (EXTRASAMPLE.ASSOCALPHA, EXTRASAMPLE.UNASSALPHA)


class TiffPyramid:
    """The levels of one image in a TIFF file: of the largest, if no scene is named."""

    georeference = None

    def __init__(self, path: str, options: ReadOptions = AS_STORED) -> None:
        """Open a TIFF file.

        Raises:
            UnreadableSlide: samples have no conversion to 8-bit RGB, there are several planes, a
                tile or strip is too large to decode, or there is no such scene.
        """
        self._tiles: ConvertedPyramid | None = None
        with ExitStack() as opened:
            with tiff_errors():
                self._file = opened.enter_context(tifffile.TiffFile(path))
                series = self._file.series
                pages = [one.keyframe for one in series]
                sizes = [(int(one.imagelength), int(one.imagewidth)) for one in pages]
                names = [str(one.name) for one in series]
            index, self.notes = scenes.choose(names, sizes, options.scene)
            with tiff_errors():
                page = pages[index]
                self.icc_profile: bytes | None = page.tags.valueof(_ICC_PROFILE)
                self.mpp_hints = _mpp_hints(self._file, index, page)
                stored = [(one.keyframe, one.pages[0], one.axes) for one in series[index].levels]
            self._levels = [TiffLevel(self._file.filehandle, *one, options) for one in stored]
            self.notes += self._levels[0].notes
            self.sizes = [level.size for level in self._levels]
            if not page.is_tiled and self.sizes[0][0] * self.sizes[0][1] > WHOLE_PX:
                self._tiles = ConvertedPyramid(path, self.sizes[0], self._strip, (index, *options))
                self.sizes = self._tiles.sizes
            opened.pop_all()

    def read_level(self, level: int, top: int, left: int, rows: int, columns: int) -> Pixels:
        """Return a region inside a level; tiles that a sparse file lacks are white."""
        if self._tiles is not None:
            return self._tiles.read_level(level, top, left, rows, columns)
        return self._levels[level].read(top, left, rows, columns)

    def close(self) -> None:
        """Close the file."""
        for level in self._levels:
            level.close()
        if self._tiles is not None:
            self._tiles.close()
        self._file.close()

    def _strip(self, top: int, bottom: int) -> Pixels:
        return self._levels[0].read(top, 0, bottom - top, self.sizes[0][1])


class ConvertedPyramid(TiffPyramid):
    """The tiles of a converted image, kept in the cache as long as they are open."""

    def __init__(
        self,
        path: str,
        size: tuple[int, int],
        strip: Callable[[int, int], Pixels],
        what: tuple[Any, ...] = (),
    ) -> None:
        """See `convert.tiled`."""
        self._lease = convert.tiled(path, size, strip, what)
        try:
            super().__init__(self._lease.path)
        except BaseException:
            self._lease.close()
            raise

    def close(self) -> None:
        """Close the file and allow its eviction from the cache."""
        super().close()
        self._lease.close()


def tiff_errors() -> AbstractContextManager[None]:
    """Return `parser_errors` that includes what tifffile raises on tags of a wrong type."""
    return parser_errors(*DAMAGE, AttributeError, TypeError)


def is_georeferenced(path: str) -> bool:
    """Return whether a TIFF file has a coordinate system on the ground."""
    with tiff_errors(), tifffile.TiffFile(path) as file:
        return _GEO_KEYS in file.pages.first.tags


class TiffLevel:
    """One page, cut into the tiles or strips in which it is stored."""

    def __init__(
        self,
        file: tifffile.FileHandle,
        kind: tifffile.TiffPage,
        page: Any = None,
        axes: str = "YXS",
        options: ReadOptions = AS_STORED,
    ) -> None:
        """Hold the page.

        Args:
            file: where it lies.
            kind: knows how its pieces are coded.
            page: knows where they lie; absent: `kind` does.
            axes: tifffile's names of its dimensions.
            options: which samples are the colours, and their range.

        Raises:
            UnreadableSlide: its samples have no way to 8-bit RGB.
        """
        self._file = file
        self._page, self._kind = page or kind, kind
        with tiff_errors():
            _refuse_kind(kind, axes)
            self._palette = _palette(kind) if kind.photometric == PHOTOMETRIC.PALETTE else None
            self.size = (int(kind.imagelength), int(kind.imagewidth))
            strip = (min(int(kind.rowsperstrip), self.size[0]), self.size[1])
            tile = (int(kind.tilelength), int(kind.tilewidth))
            self._piece = tile if kind.is_tiled else strip
            self._separate = kind.planarconfig == PLANARCONFIG.SEPARATE
            self._channels, self.notes = _channels(kind, options)
        check_size(self.size, SLIDE_PX)
        check_size(self._piece, DECODE_PX)
        self._across = -(-self.size[1] // self._piece[1])
        self._count = self._across * -(-self.size[0] // self._piece[0])
        in_cache = _CACHE_BYTES // (3 * self._piece[0] * self._piece[1])
        self._pixels = lru_cache(max(1, in_cache))(self._decoded)

    @property
    def transparent(self) -> bool:
        """Return whether some sample is transparency."""
        return self._channels.alpha is not None

    def close(self) -> None:
        """Release the cached tiles, which would stay until the next garbage collection."""
        self._pixels.cache_clear()

    def read(self, top: int, left: int, rows: int, columns: int) -> Pixels:
        """Return a region inside the level."""
        region = np.empty((rows, columns, 3), np.uint8)
        for row, y, into_y in _overlaps(top, rows, self._piece[0]):
            for column, x, into_x in _overlaps(left, columns, self._piece[1]):
                region[into_y, into_x] = self._pixels(row * self._across + column)[y, x]
        return region

    def _decoded(self, index: int) -> Pixels:
        """Return one tile or strip as RGB; white if a sparse file lacks it."""
        channels = self._channels
        indices = [*channels.colours, *([] if channels.alpha is None else [channels.alpha])]
        first = indices if self._separate else [0]
        planes = []
        for plane in first:
            samples = self._samples(index + plane * self._count)
            if samples is None:
                return np.full((*self._piece, 3), 255, np.uint8)
            planes.append(samples)
        if self._palette is not None:
            return self._palette[planes[0][..., 0].astype(np.uint16)]
        if self._separate:
            return channels.rgb(np.concatenate(planes, axis=-1))
        whole = indices == list(range(planes[0].shape[-1]))
        return channels.rgb(planes[0] if whole else planes[0][..., indices])

    def _samples(self, number: int) -> Shaped[np.ndarray, "_ _ s"] | None:
        """Return one stored tile or strip, cropped to the level."""
        row, column = divmod(number % self._count, self._across)
        rows = min(self._piece[0], self.size[0] - row * self._piece[0])
        columns = min(self._piece[1], self.size[1] - column * self._piece[1])
        with tiff_errors():
            at, count = self._page.dataoffsets[number], self._page.databytecounts[number]
            if count == 0:
                return None
            if at + count > self._file.size:  # before memory is taken for it
                raise EOFError(f"piece {number} ends at byte {at + count} of {self._file.size}")
            self._file.seek(at)
            content = self._file.read(count)
            decoded: Any = self._kind.decode(
                content, number, jpegtables=self._page.jpegtables, jpegheader=self._page.jpegheader
            )
            samples: Any = decoded[0][0][:rows, :columns]
            stored = 1 if self._separate else int(self._kind.samplesperpixel)
            if samples.shape[:2] != (rows, columns) or samples.shape[2] < stored:
                raise ValueError(f"piece {number} holds {samples.shape} samples")
        return samples


def _overlaps(start: int, count: int, piece: int) -> Iterator[tuple[int, slice, slice]]:
    """Yield the tiles that overlap [start, start + count): number, slices of tile and range."""
    for number in range(start // piece, -(-(start + count) // piece)):
        first, last = max(start, number * piece), min(start + count, (number + 1) * piece)
        inside = slice(first - number * piece, last - number * piece)
        yield number, inside, slice(first - start, last - start)


def _refuse_kind(kind: tifffile.TiffPage, axes: str) -> None:
    if axes not in ("YX", "YXS", "SYX"):
        raise UnreadableSlide(
            f"the file holds several planes (axes {axes}) where one RGB image was expected; save "
            "the one that counts as an RGB TIFF."
        )
    if kind.photometric not in _KNOWN:
        name = getattr(kind.photometric, "name", kind.photometric)
        raise UnreadableSlide(f"the file holds {name} colours; convert it to 8-bit RGB.")
    if kind.photometric == PHOTOMETRIC.YCBCR and kind.compression in _PLAIN:
        raise UnreadableSlide("the file holds YCbCr colours without JPEG; convert it to 8-bit RGB.")


def _channels(kind: tifffile.TiffPage, options: ReadOptions) -> tuple[Channels, list[str]]:
    """Return which samples are colours and transparency, and notes on the choice.

    Raises:
        UnreadableSlide: nothing says which are the colours, or they have no way to 8 bits.
    """
    count, extras = int(kind.samplesperpixel), tuple(kind.extrasamples)
    bits = int(kind.bitspersample)
    note = bands.require_depth(kind.dtype, bits if bits % 8 else 0, options)
    notes = [note] if note and kind.photometric != PHOTOMETRIC.PALETTE else []
    first = count - len(extras)
    marks = {index: extra for index, extra in enumerate(extras, first) if extra in _ALPHA}
    alpha = next(iter(marks), None)
    if options.bands:
        colours = bands.of_user(options.bands, count)
    elif kind.photometric in _GREY:
        colours, note = bands.unnamed([index for index in range(count) if index not in marks])
        notes += [note] if note else []
    elif kind.photometric == PHOTOMETRIC.PALETTE:
        colours = (0,)
    elif count >= 3:
        colours = (0, 1, 2)
    else:
        raise UnreadableSlide(
            f"the file holds RGB colours of {count} samples; save it as an RGB TIFF."
        )
    return Channels(
        colours,
        alpha,
        bits=bits if bits % 8 else 0,
        value_range=options.value_range,
        premultiplied=alpha is not None and marks[alpha] == EXTRASAMPLE.ASSOCALPHA,
        inverted=kind.photometric == PHOTOMETRIC.MINISWHITE,
    ), notes


def _palette(kind: tifffile.TiffPage) -> UInt8[np.ndarray, "_ 3"]:
    table = np.asarray(kind.colormap).T
    if table.shape != (1 << kind.bitspersample, 3):
        raise ValueError(f"a palette of {table.shape} numbers")
    return (table >> 8 if table.max() > 255 else table).astype(np.uint8)


def _mpp_hints(file: tifffile.TiffFile, index: int, page: tifffile.TiffPage) -> list[Hint]:
    """Return micrometres per pixel from the tags, most trusted first."""
    hints = []
    if file.is_ome and file.ome_metadata:
        hints += _ome_hints(file.ome_metadata, index)
    unit, name = _UM_PER_UNIT.get(int(page.resolutionunit), 0.0), "TIFF resolution"
    if file.is_imagej and file.imagej_metadata:
        name_of_unit = str(file.imagej_metadata.get("unit", "")).replace("\\u00B5", "µ")
        unit, name = _UM_PER_NAME.get(name_of_unit, unit), "ImageJ unit"
    across, down = page.resolution
    if unit and across > 0 and down > 0:
        hints.append(Hint(name, unit / down, unit / across))
    return hints


def _ome_hints(description: str, index: int) -> list[Hint]:
    """Return PhysicalSizeY and -X of a series' image."""
    images = ET.fromstring(description).findall(".//{*}Image/{*}Pixels")
    facts = images[min(index, len(images) - 1)].attrib if images else {}
    sizes = [
        float(facts.get(f"PhysicalSize{axis}", 0))
        * _UM_PER_NAME.get(facts.get(f"PhysicalSize{axis}Unit", "µm"), 0.0)
        for axis in "YX"
    ]
    return [Hint("OME PhysicalSize", *sizes)] if min(sizes) > 0 else []
