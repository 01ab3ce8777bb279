"""The candidates of a slide by scale, and how they are drawn over a picture of it.

Colours say what became of a region: of splits they are Okabe and Ito's, which colour-blind people
tell apart; of rejections they are muted. Only arrays and pictures: no slide is read here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image, ImageDraw

Ink = tuple[int, int, int]

SPLITS: dict[str, Ink] = {"train": (0, 114, 178), "val": (230, 159, 0), "test": (0, 158, 115)}
_OTHER: Ink = (60, 60, 60)
REASONS: dict[str, tuple[str, Ink]] = {
    "tissue": ("too little tissue", (214, 214, 214)),
    "crosses": ("crosses the split", (166, 158, 84)),
    "outside": ("over the edge", (112, 120, 132)),
}
"""What a sheet calls a rejection, by the first word of its reason."""
KEPT_TINT, REJECTED_TINT = 0.2, 0.7

_TISSUE: Ink = (84, 39, 143)
_LEAST_CELL_PX = 8.0
"""A region that is smaller on the sheet has no outline of its own."""


@dataclass(frozen=True)
class Layer:
    """The candidates of one scale.

    Attributes:
        k: the scale.
        side_px: side of a region in base pixels.
        origin_px: [n, 2] row and column of each region in base pixels.
        tissue: the share in each.
        kept: whether each is.
        names: the split of a kept one, the first word of the reason of another.
    """

    k: int
    side_px: int
    origin_px: Int[np.ndarray, "n 2"]
    tissue: Float[np.ndarray, " n"]
    kept: Bool[np.ndarray, " n"]
    names: Sequence[str]

    @cached_property
    def regular(self) -> Bool[np.ndarray, " n"]:
        """False for random crops, which never lie on the grid of their scale."""
        regular: np.ndarray = (self.origin_px % self.side_px == 0).all(axis=1)
        return regular

    @cached_property
    def counts(self) -> Mapping[tuple[str, bool], int]:
        """How many there are by name, kept or not."""
        return Counter(zip(self.names, self.kept.tolist(), strict=True))

    @cached_property
    def inks(self) -> UInt8[np.ndarray, "n 3"]:
        """Everyone's colour."""
        pairs = zip(self.names, self.kept.tolist(), strict=True)
        return np.array([ink(*pair) for pair in pairs], np.uint8).reshape(-1, 3)


def layers(table: pa.Table, patch_px: int) -> list[Layer]:
    """The scales of a slide's TILES, finest first."""
    scale, kept, tissue, *cells = (
        table[name].to_numpy() for name in ("scale", "kept", "tissue", "row", "column")
    )
    origin_px = np.stack(cells, axis=1).astype(np.int64) * patch_px
    pairs = zip(table["reason"].to_pylist(), table["split"].to_pylist(), strict=True)
    names = np.array([why.split(" ")[0] if why else split for why, split in pairs], object)
    return [
        Layer(int(k), patch_px << int(k), origin_px[at], tissue[at], kept[at], names[at].tolist())
        for k in np.unique(scale)
        for at in [np.flatnonzero(scale == k)]
    ]


def ink(name: str, kept: bool) -> Ink:
    """The colour of a split, or of a reason for rejection."""
    return SPLITS.get(name, _OTHER) if kept else REASONS.get(name, (name, _OTHER))[1]


def title(name: str, kept: bool) -> str:
    """What a sheet calls a split, or a reason for rejection."""
    return name if kept else REASONS.get(name, (name, _OTHER))[0]


def overlay(shown: Image.Image, size_px: tuple[int, int], layer: Layer) -> Image.Image:
    """A scale's candidates over a picture of the whole slide.

    Args:
        shown: the slide, of any size.
        size_px: (rows, columns) of the slide in base pixels.
        layer: the scale.
    """
    pixels = np.asarray(shown, np.float32)
    at = _under(pixels.shape[:2], size_px, layer)
    shrunk = shown.width / size_px[1]
    alone = layer.side_px * shrunk >= _LEAST_CELL_PX
    kinds = layer.inks.astype(np.int64) @ (1 << 16, 1 << 8, 1)
    lines = _borders(at if alone else kinds[at])
    strength = np.where(layer.kept[at], np.where(lines, 1.0, KEPT_TINT), REJECTED_TINT)
    strength = np.where(at < 0, 0.0, strength)[..., None]
    pixels += (layer.inks[at] - pixels) * strength
    crops = _dashes(shown.size, shrunk, layer)
    pixels = np.where(crops.any(axis=-1, keepdims=True), crops, pixels)
    return Image.fromarray(np.round(pixels).astype(np.uint8))


def _dashes(
    size: tuple[int, int], shrunk: float, layer: Layer
) -> UInt8[np.ndarray, "rows columns 3"]:
    """Outlines of the kept random crops, dashed with white; black elsewhere."""
    drawn = Image.new("RGB", size)
    pen = ImageDraw.Draw(drawn)
    side = max(0, int(layer.side_px * shrunk) - 1)
    for i in np.flatnonzero(layer.kept & ~layer.regular):
        y, x = (layer.origin_px[i] * shrunk).astype(int).tolist()
        pen.rectangle((x, y, x + side, y + side), outline=tuple(layer.inks[i].tolist()))
    lines = np.array(drawn)
    gaps = np.indices((size[1], size[0])).sum(axis=0) // 4 % 2 == 0
    lines[gaps & lines.any(axis=-1)] = 255
    return lines


def _under(
    shape: tuple[int, ...], size_px: tuple[int, int], layer: Layer
) -> Int[np.ndarray, "rows columns"]:
    """Which candidate of the regular grid each pixel of a picture shows; -1 where none."""
    y, x = (
        ((np.arange(count) + 0.5) * size / count).astype(np.int64) // layer.side_px
        for count, size in zip(shape, size_px, strict=True)
    )
    index = np.full((y[-1] + 1, x[-1] + 1), -1)
    cells = layer.origin_px // layer.side_px
    here = np.flatnonzero(layer.regular & (cells < index.shape).all(axis=1))
    index[cells[here, 0], cells[here, 1]] = here
    candidates: np.ndarray = index[y][:, x]
    return candidates


def _borders(names: Int[np.ndarray, "rows columns"]) -> Bool[np.ndarray, "rows columns"]:
    """Pixels beside another name or at the picture's edge."""
    rows, columns = names.shape
    padded = np.pad(names, 1, constant_values=-2)
    borders = np.zeros(names.shape, bool)
    for y, x in ((0, 1), (2, 1), (1, 0), (1, 2)):
        borders |= padded[y : y + rows, x : x + columns] != names
    return borders


def heat(shown: Image.Image, size_px: tuple[int, int], layer: Layer) -> Image.Image:
    """The share of tissue in a scale's regions, from white to dark, in the size of a picture."""
    at = _under((shown.height, shown.width), size_px, layer)
    share = np.where(at < 0, 0, layer.tissue[at])[..., None]
    return Image.fromarray(np.round(250 + (np.array(_TISSUE) - 250) * share).astype(np.uint8))


def in_order(names: Iterable[str], order: Iterable[str] = SPLITS) -> list[str]:
    """Sort names: those in `order` first, in that order, then others."""
    places = {name: place for place, name in enumerate(order)}
    return sorted(names, key=lambda name: (places.get(name, len(places)), name))
