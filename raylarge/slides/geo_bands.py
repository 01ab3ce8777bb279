"""Bands of a GeoTIFF as 8-bit RGB: colour interpretation, palette, transparency, no data.

A band labelled alpha is transparency where nearly all of it is 0 or full; where it varies like an
image (NAIP's fourth band is near infrared, labelled alpha) it is not, and only black pixels
without it are no data. What the file calls no data, by value or by mask, is white.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
from jaxtyping import UInt8

from raylarge import pixels
from raylarge.slides import bands
from raylarge.slides.bands import Channels
from raylarge.slides.protocol import Pixels, ReadOptions, UnreadableSlide

_COLOURS = ("red", "green", "blue")
_NEUTRAL = ("undefined", "gray", "alpha", "palette")
_GDAL_TYPES = {
    "uint8": "Byte",
    "int8": "Int8",
    "uint16": "UInt16",
    "int16": "Int16",
    "uint32": "UInt32",
    "int32": "Int32",
    "float32": "Float32",
    "float64": "Float64",
}
_PROBES, _PROBE_PX = 6, 48
"""An alpha band is looked at in so many squares of this side, each way."""
_FEW = 0.05
"""Soft edges of a true transparency are less than this share of its pixels."""


class GeoBands:
    """How the bands of one GeoTIFF become RGB.

    Attributes:
        notes: choices made.
        nearest: whether indices of a palette are stored, between which nothing can be
            interpolated.
        infrared: number from 1 of a band labelled alpha that is no transparency; 0: none.
    """

    def __init__(self, dataset: Any, options: ReadOptions) -> None:
        """Choose among the bands of an open dataset.

        Raises:
            UnreadableSlide: samples without a way to 8 bits, or bands whose colours nobody says.
        """
        self.notes: list[str] = []
        labels = [one.name for one in dataset.colorinterp]
        alpha = labels.index("alpha") if "alpha" in labels and dataset.count > 1 else None
        self.infrared = 0
        if alpha is not None and _varies(dataset, alpha + 1):
            self.infrared, alpha = alpha + 1, None
            self.notes.append(
                f"band {self.infrared} is labelled alpha but varies like an image: it was not "
                "taken for transparency"
            )
        colours = self._colours(labels, options)
        self._palette: UInt8[np.ndarray, "n 4"] | None = None
        if len(colours) == 1 and labels[colours[0]] == "palette":
            self._palette = _palette(dataset.colormap(colours[0] + 1))
        self.nearest = self._palette is not None
        number = colours[0] + 1
        bits = int(dataset.tags(number, ns="IMAGE_STRUCTURE").get("NBITS", 0))
        for index in colours:
            note = bands.require_depth(dataset.dtypes[index], bits, options)
        if note:
            self.notes.append(note)
        self._channels = Channels(colours, alpha, bits, options.value_range)

    def _colours(self, labels: Sequence[str], options: ReadOptions) -> tuple[int, ...]:
        if options.bands:
            return bands.of_user(options.bands, len(labels))
        named = tuple(labels.index(name) for name in _COLOURS if name in labels)
        if len(named) == 3:
            if named != (0, 1, 2):
                numbers = ", ".join(str(index + 1) for index in named)
                self.notes.append(f"red, green and blue are bands {numbers}, as the file says")
            return named
        strange = sorted(set(labels) - {*_NEUTRAL, *_COLOURS})
        if named or strange:
            raise UnreadableSlide(
                f"the file has bands of {', '.join(labels)}, not all of red, green and blue; set "
                "tile.bands=[red,green,blue], or tile.bands=[grey], by numbers from 1."
            )
        colours, note = bands.unnamed([i for i, label in enumerate(labels) if label != "alpha"])
        self.notes += [note] if note else []
        return colours

    def read(self, source: Any, window: Any, warped: bool) -> Pixels:
        """Return a window of a level as RGB, over white where it is transparent or no data.

        Args:
            source: the level.
            window: of rasterio, inside it.
            warped: whether its last band is the transparency that a warp added.
        """
        channels = self._channels
        numbers = [index + 1 for index in channels.colours]
        if warped and self.infrared:
            numbers = list(range(1, len(numbers) + 1))
        stored = source.read(numbers, window=window)
        if self._palette is not None:
            rgba = self._palette[np.minimum(stored[0], len(self._palette) - 1)]
            region = pixels.over_white(rgba[..., :3], rgba[..., 3])
        else:
            region = np.empty((*stored.shape[1:], 3), np.uint8)
            for band in range(3):  # numpy copies triples slowly
                region[..., band] = channels.scaled(stored[min(band, len(stored) - 1)])
        alpha = source.count if warped else 0 if channels.alpha is None else channels.alpha + 1
        if alpha:
            opacity = self._opacity(source.read(alpha, window=window), warped)
            if opacity.min(initial=255) < 255:
                region = pixels.over_white(region, opacity)
        void = self._void(source, window, region, warped)
        if void is not None:
            region[void] = 255
        return region

    def opaque(self, dataset: Any, path: str) -> str:
        """Return a virtual dataset of the colours alone, in XML for GDAL to open."""
        transform, wkt = dataset.transform.to_gdal(), escape(dataset.crs.to_wkt())
        void = "" if dataset.nodata is None else f"<NoDataValue>{dataset.nodata}</NoDataValue>"
        source = f'<SourceFilename relativeToVRT="0">{escape(path)}</SourceFilename>'
        stored = [
            f'<VRTRasterBand dataType="{_GDAL_TYPES[dataset.dtypes[index]]}" band="{number}">{void}'
            f"<SimpleSource>{source}<SourceBand>{index + 1}</SourceBand></SimpleSource>"
            "</VRTRasterBand>"
            for number, index in enumerate(self._channels.colours, 1)
        ]
        return (
            f'<VRTDataset rasterXSize="{dataset.width}" rasterYSize="{dataset.height}">'
            f"<SRS>{wkt}</SRS><GeoTransform>{', '.join(map(repr, transform))}</GeoTransform>"
            f"{''.join(stored)}</VRTDataset>"
        )

    def _opacity(self, alpha: np.ndarray, warped: bool) -> UInt8[np.ndarray, "rows columns"]:
        """Return opacity; that of a warp uses all bits of its type, whatever the file declares."""
        return (Channels(()) if warped else self._channels).opacity(alpha)

    def _void(self, source: Any, window: Any, region: Pixels, warped: bool) -> Any:
        """Return which pixels hold no data; None if all hold data."""
        if warped:
            return None
        if self.infrared and source.nodata is None:
            no_infrared = source.read(self.infrared, window=window) == 0
            return no_infrared & ~region.any(axis=-1)
        flags = {flag.name for flag in source.mask_flag_enums[0]}
        if "all_valid" in flags or "alpha" in flags:
            return None
        numbers = [index + 1 for index in self._channels.colours]
        return ~source.read_masks(numbers, window=window).any(axis=0)


def _varies(dataset: Any, band: int) -> bool:
    """Return whether a band has more values between 0 and full than a transparency has."""
    from rasterio.windows import Window

    rows = np.linspace(0, max(0, dataset.height - _PROBE_PX), _PROBES).astype(int)
    columns = np.linspace(0, max(0, dataset.width - _PROBE_PX), _PROBES).astype(int)
    size = (min(_PROBE_PX, dataset.width), min(_PROBE_PX, dataset.height))
    full = np.iinfo(dataset.dtypes[band - 1]).max if dataset.dtypes[band - 1][0] == "u" else None
    between = total = 0
    for top in rows.tolist():
        for left in columns.tolist():
            alpha = dataset.read(band, window=Window(left, top, *size))
            ends = (alpha == 0) | (alpha == (alpha.max() if full is None else full))
            between, total = between + int((~ends).sum()), total + alpha.size
    return between > _FEW * total


def _palette(colormap: dict[int, tuple[int, int, int, int]]) -> UInt8[np.ndarray, "n 4"]:
    """Return a colour table as an array; indices without a colour are black, as in GDAL."""
    table = np.zeros((max(colormap) + 1, 4), np.uint8)
    table[:, 3] = 255
    for index, colour in colormap.items():
        table[index] = colour
    return table
