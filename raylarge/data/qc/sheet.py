"""Draw quality-control sheets of slides, and write the page that shows them all.

    Slide + its TILES ─▶ sheet ─▶ qc/<slide_id>.png       facts of all parts ─▶ qc/index.html

A sheet shows the bare slide; each scale's regions over it, kept ones tinted by split, rejected
ones faded by reason, random crops dashed; and examples as a network will see them. No file name
appears. Colours of splits: Okabe and Ito's palette, which colour-blind people tell apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from raylarge import storage
from raylarge.data.pipeline import Facts
from raylarge.data.qc import page as pages
from raylarge.data.qc.page import length
from raylarge.data.qc.regions import (
    REASONS,
    SPLITS,
    Ink,
    Layer,
    heat,
    in_order,
    ink,
    layers,
    overlay,
    title,
)
from raylarge.geometry import spans
from raylarge.slides.reader import Slide

Pixels = UInt8[np.ndarray, "_ _ 3"]
Place = tuple[int, int]
"""x and y on the sheet, or a width and a height, as Pillow has them."""

SIDE_PX = 1600
"""Width of a sheet, and its greatest height."""
_MARGIN_PX, _GAP_PX = 24, 14
_THUMBNAIL_PX = 800
_OVERVIEW_PX, _PANEL_PX, _EXAMPLE_PX = 600, 210, 130
_LEGEND_PX = 250
_MOST_LAYERS = 12
_INK: Ink = (32, 33, 36)
_SOFT: Ink = (105, 108, 114)
_LINE: Ink = (205, 208, 213)
_NOTE: Ink = (0, 114, 178)
_READ_PX = 1 << 23
"""Most base pixels of an example in memory at once, where a slide has a single level."""


def sheet(slide: Slide, table: pa.Table, patch_px: int) -> Pixels:
    """Return the quality-control sheet of one slide; it is deterministic.

    Args:
        slide: open; its thumbnail and a few regions are read.
        table: its TILES.
        patch_px: side of a base tile.
    """
    return _Sheet(slide, layers(table, patch_px)).draw(str(table["slide_id"][0]), patch_px)


def write_page(
    root: str, facts: list[Facts], failed: list[dict[str, Any]], names: Mapping[str, str]
) -> None:
    """Write `qc/index.html`, all slides of a data folder beside their numbers.

    Args:
        root: the data folder.
        facts: of the parts of TILES.
        failed: slide_id, part and reason of each slide that could not be read.
        names: file names by pseudonym, where the page shall have them.
    """
    page = pages.render(facts, failed, names)
    storage.write_bytes(storage.join(root, "qc", "index.html"), page.encode())


class _Sheet:
    """A sheet, drawn from top to bottom."""

    def __init__(self, slide: Slide, regions: Sequence[Layer]) -> None:
        self._page = Image.new("RGB", (SIDE_PX, SIDE_PX), "white")
        self._pen = ImageDraw.Draw(self._page)
        self._slide = slide
        self._mpp = slide.mpp * slide.zoom
        self._layers = regions
        self._downscale = max(1, round(max(slide.size_px) / _THUMBNAIL_PX))
        self._picture = Image.fromarray(slide.thumbnail(self._downscale))

    def draw(self, slide_id: str, patch_px: int) -> Pixels:
        """Draw the sheet and return its pixels."""
        self._header(slide_id, patch_px)
        top = self._overview(96)
        shown = self._layers[:_MOST_LAYERS]
        pitch = (SIDE_PX - 2 * _MARGIN_PX + _GAP_PX) // len(shown)
        ends = [
            self._column(layer, (_MARGIN_PX + i * pitch, top), pitch - _GAP_PX)
            for i, layer in enumerate(shown)
        ]
        return np.array(self._page.crop((0, 0, SIDE_PX, max(ends) + _MARGIN_PX)))

    def _header(self, slide_id: str, patch_px: int) -> None:
        slide, mpp, finest = self._slide, self._mpp, self._layers[0]
        rows, columns = slide.size_px
        tissue = finest.tissue[finest.regular].sum() * finest.side_px**2 / (rows * columns)
        kept = sum(int(layer.kept.sum()) for layer in self._layers)
        facts = [
            f"{rows:,} x {columns:,} px (rows x columns)",
            f"{length(rows * mpp)} x {length(columns * mpp)}",
            f"{length(mpp)}/px" + (slide.zoom != 1) * f" (of the file: {length(slide.mpp)}/px)",
            f"tissue {min(tissue, 1.0):.0%}",
            f"patch {patch_px} px",
            f"{kept:,} of {sum(len(layer.kept) for layer in self._layers):,} candidates kept",
        ]
        self._write((_MARGIN_PX, 18), slide_id, 30)
        self._write((_MARGIN_PX, 58), "   ·   ".join(facts), 17, _SOFT)
        if slide.notes:
            self._write((_MARGIN_PX, 78), _cut("   ·   ".join(slide.notes), 13), 13, _NOTE)

    def _overview(self, top: int) -> int:
        """Draw the slide, its finest scale, legend and tissue; return their bottom in px."""
        finest, left = self._layers[0], _MARGIN_PX
        wide = (SIDE_PX - 2 * _MARGIN_PX - 2 * _GAP_PX - _LEGEND_PX) // 2
        bare = _fitted(self._picture, (wide, _OVERVIEW_PX))
        over = overlay(bare, self._slide.size_px, finest)
        for head, panel in (("slide", bare), (f"regions at scale {finest.k}", over)):
            self._write((left, top), head, 15)
            self._paste(panel, (left, top + 22))
            left += bare.width + _GAP_PX
        bottom = top + 22 + bare.height
        self._scale_bar((_MARGIN_PX, bottom), bare.width)
        below = self._legend((left + _GAP_PX, top)) + 14
        self._write((left + _GAP_PX, below), "tissue, from none (white) to all", 15)
        box = (SIDE_PX - _MARGIN_PX - left - _GAP_PX, max(_PANEL_PX, bottom - below - 22))
        tissue = heat(_fitted(self._picture, box), self._slide.size_px, finest)
        self._paste(tissue, (left + _GAP_PX, below + 22))
        return max(bottom + 24, below + 22 + tissue.height) + 24

    def _column(self, layer: Layer, place: Place, wide: int) -> int:
        """Draw a scale's counts, regions and examples; return their bottom in px."""
        left, top = place
        self._write(place, f"scale {layer.k} · {length(self._mpp * (1 << layer.k))}/px", 17)
        crops = int((layer.kept & ~layer.regular).sum())
        counts = (
            f"{layer.kept.sum():,} of {len(layer.kept):,} kept" + bool(crops) * f", {crops} crops"
        )
        self._write((left, top + 24), counts, 14, _SOFT)
        for i, kept in enumerate((True, False)):
            x = left
            for name in _named(layer.counts, kept):
                count = f"{layer.counts[name, kept]:,}"
                x = self._swatch((x, top + 46 + 20 * i), count, ink(name, kept))
        panel = overlay(_fitted(self._picture, (wide, _PANEL_PX)), self._slide.size_px, layer)
        top += 92
        self._paste(panel, (left, top))
        return self._examples(layer, (left, top + panel.height + 12), wide)

    def _examples(self, layer: Layer, place: Place, wide: int) -> int:
        left, top = place
        columns = max(2, wide // _EXAMPLE_PX)
        pitch = (wide + 6) // columns
        rows = min(3, (SIDE_PX - _MARGIN_PX - top) // pitch)
        for i, at in enumerate(_spread(layer, (rows, columns))):
            y, x = top + i // columns * pitch, left + i % columns * pitch
            frame = tuple(layer.inks[at].tolist())
            self._pen.rectangle((x, y, x + pitch - 7, y + pitch - 7), fill=frame)
            self._page.paste(self._example(layer, at, pitch - 12), (x + 3, y + 3))
        return top + rows * pitch

    def _example(self, layer: Layer, i: int, side: int) -> Image.Image:
        """Return a region as a small picture; coarse ones are cut from the thumbnail."""
        downscale = max(1, layer.side_px // side)
        top, left = layer.origin_px[i].tolist()
        if downscale < self._downscale:
            picture = Image.fromarray(_read(self._slide, (top, left), layer.side_px, downscale))
            return picture.resize((side, side), Image.Resampling.LANCZOS)
        x, y, length = (one / self._downscale for one in (left, top, layer.side_px))
        right, bottom = min(x + length, self._picture.width), min(y + length, self._picture.height)
        size = (round((right - x) * side / length), round((bottom - y) * side / length))
        page = Image.new("RGB", (side, side), "white")
        if min(size) > 0:
            box = (x, y, right, bottom)
            page.paste(self._picture.resize(size, Image.Resampling.LANCZOS, box=box))
        return page

    def _legend(self, place: Place) -> int:
        """Draw the legend of the colours in use; return its bottom in px."""
        x, y = place
        present = Counter[tuple[str, bool]]()
        for layer in self._layers:
            present.update(layer.counts)
        for kept, head in ((True, "kept, by split"), (False, "rejected")):
            names = _named(present, kept)
            if not names:
                continue
            self._write((x, y), head, 15)
            for name in names:
                y += 21
                label = f"{title(name, kept)}  {present[name, kept]:,}"
                self._swatch((x, y), label, ink(name, kept))
            y += 31
        if not all(layer.regular.all() for layer in self._layers):
            self._write((x, y - 6), "dashed: kept random crops", 13, _SOFT)
            y += 20
        return y

    def _scale_bar(self, place: Place, wide: int) -> None:
        um_per_px, (x, y) = self._slide.size_px[1] * self._mpp / wide, place
        bar_um = _bar_um(um_per_px, wide)
        end = x + round(bar_um / um_per_px)
        self._pen.rectangle((x, y + 9, end, y + 12), fill=_INK)
        self._write((end + 8, y + 2), length(bar_um), 13)

    def _paste(self, panel: Image.Image, place: Place) -> None:
        """Paste a picture with a hairline around it, as glass is as white as the page."""
        x, y = place
        self._pen.rectangle((x - 1, y - 1, x + panel.width, y + panel.height), outline=_LINE)
        self._page.paste(panel, place)

    def _swatch(self, place: Place, text: str, fill: Ink) -> int:
        x, y = place
        self._pen.rectangle((x, y + 2, x + 12, y + 14), fill=fill)
        self._write((x + 18, y), text, 13)
        return x + 30 + int(_font(13).getlength(text))

    def _write(self, place: Place, text: str, size: int, fill: Ink = _INK) -> None:
        self._pen.text(place, text.replace("µ", "u"), fill=fill, font=_font(size))


def _bar_um(um_per_px: float, wide: int) -> float:
    """Return the longest of 1, 2, 5, 10, ... µm that covers at most a quarter of a width."""
    even = (n * 10.0**power for power in range(-3, 12) for n in (1, 2, 5))
    return max((length for length in even if length <= um_per_px * wide / 4), default=um_per_px)


def _spread(layer: Layer, grid: tuple[int, int]) -> Iterator[int]:
    """Yield the kept regions nearest to the centres of an even grid over all of them."""
    rest = np.flatnonzero(layer.kept)
    if not len(rest):
        return
    low, high = layer.origin_px[rest].min(axis=0), layer.origin_px[rest].max(axis=0)
    for i in range(min(len(rest), grid[0] * grid[1])):
        spot = low + (high - low) * (np.array(divmod(i, grid[1])) + 0.5) / grid
        nearest = ((layer.origin_px[rest] - spot) ** 2).sum(axis=1).argmin()
        yield int(rest[nearest])
        rest = np.delete(rest, nearest)


def _read(slide: Slide, origin_px: tuple[int, int], side_px: int, downscale: int) -> Pixels:
    """Read a square region in strips, to save memory for slides with a single level."""
    top, left = origin_px
    columns = side_px // downscale
    strips = spans(columns, max(1, _READ_PX // (side_px * downscale)))
    return np.concatenate(
        [
            slide.read(
                top + first * downscale,
                left,
                (last - first) * downscale,
                columns * downscale,
                downscale,
            )
            for first, last in strips
        ]
    )


def _named(counts: Mapping[tuple[str, bool], int], kept: bool) -> list[str]:
    """Return the splits of kept regions, or the reasons of rejected ones."""
    names = [name for name, whether in counts if whether == kept]
    return in_order(names, SPLITS if kept else REASONS)


def _cut(text: str, size: int) -> str:
    """Cut a line to the width of a sheet."""
    wide = SIDE_PX - 2 * _MARGIN_PX
    if _font(size).getlength(text) <= wide:
        return text
    while _font(size).getlength(f"{text}...") > wide:
        text = text[:-1]
    return f"{text}..."


def _fitted(picture: Image.Image, box: Place) -> Image.Image:
    """Return a picture scaled to fit a box."""
    scale = min(box[0] / picture.width, box[1] / picture.height)
    size = (max(1, int(picture.width * scale)), max(1, int(picture.height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS)


@lru_cache
def _font(size: int) -> Any:
    """Pillow's own font: on every machine the same, and without a µ."""
    return ImageFont.load_default(size=size)
