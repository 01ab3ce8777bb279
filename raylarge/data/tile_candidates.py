"""What `tile` is told, and which regions of a slide may become examples: no pixels.

A candidate at scale k covers 2^k x 2^k base tiles. Candidates lie on the regular grid of their
scale; at coarse scales random tile-aligned crops join them. What is random about a slide is a
function of (seed, slide_id, scale).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Int

from raylarge.diffusion.noise import generator
from raylarge.errors import UserError
from raylarge.geometry import spans
from raylarge.slides.protocol import ReadOptions
from raylarge.slides.reader import BASE_MPP

Grid = Float[np.ndarray, "grid_rows grid_columns"]
Cells = Int[np.ndarray, "n 2"]
_COARSEST = 12


@dataclass(frozen=True)
class TileConfig:
    """What counts as an example, and who may train on it."""

    patch_px: int = 256  # side of an example in pixels, at every scale
    scales: list[int] = field(default_factory=lambda: list(range(8)))
    """0: the base; each further one halves the pixels."""
    tissue: list[float] = field(default_factory=lambda: [0.5, 0.4, 0.3, 0.2, 0.1])
    """Least share of tissue per scale; coarser scales than listed take the last."""
    mask: str = ""
    """Where tissue is: "" by colour; `all`; or a pattern such as `masks/{name}.geojson` (.png).
    Example: masks/{name}.geojson."""
    border: str = "drop"
    """Regions over the right and lower edge: `drop`, or `pad` them with white."""
    crops: int = 0
    """Random tile-aligned candidates per slide and coarse scale, beside the regular grid."""
    base_crops: int = 0
    """Random crops of scale 0 per training slide, at any pixel, turned or mirrored, with their own
    embeddings; few at a time share one view (`tile.views`). For small data."""
    views: int = 1
    """How often each training slide is tiled: 1 as it is; each further view starts at another
    pixel and is turned or mirrored (`slides/view.py`), with its own embeddings. For small data."""
    split: str = "patient"
    """`patient`: whole patients are held out; `band`: the lowest rows of each slide; or a file."""
    val_fraction: float = 0.1  # share held out for validation
    test_fraction: float = 0.0  # share held out for tests
    unlisted: str = "refuse"
    """Slides without a split, where `table` has a column `split` or `split` is a file: `refuse`;
    `skip` leaves them out, `hash` holds out patients as `split=patient` does."""
    patient: str = ""
    """Regular expression on the file name whose first group is the patient; empty: the slide.
    Example: (.*)-[0-9]+."""
    table: str = ""
    """A CSV or parquet of the slides: `slide`, and patient, split, mpp (`slide_index.py`).
    Example: slides.csv."""
    labels: list[str] = field(default_factory=list)
    """Columns of the table that go into the examples; mind what they tell of a patient."""
    mpp: float | None = None  # µm per pixel of the slides whose files do not say it
    base_mpp: float = BASE_MPP  # µm per pixel of scale 0
    icc: bool = True
    """Convert pixels to sRGB where the file has a colour profile."""
    scene: str = ""
    """Which image of a file with several: its name, or its number from 0; empty: the largest."""
    bands: list[int] = field(default_factory=list)
    """Numbers from 1 of red, green and blue (or of grey alone) in GeoTIFF and TIFF, such as
    [3,2,1]; empty: what the file says."""
    value_range: list[float] = field(default_factory=list)
    """The values that become 0 and 255 in samples of more than 8 bits, such as [0,3000]; empty:
    all of an unsigned type, and floating point is refused."""
    block_tiles: int = 1024
    """Base tiles (about) per part of the later tables."""
    salt: str = "raylarge"
    """Of the pseudonyms. It is written nowhere: give your own, and keep it. Everybody knows this
    one, and finds a slide's name by trying names."""
    seed: int = 0  # of crops and of the split

    def check(self) -> None:
        """Refuse values that make no sense.

        Raises:
            UserError: naming the key, its value and what it may be.
        """
        held_out = self.val_fraction + self.test_fraction
        for key, fine, wish in (
            ("patch_px", self.patch_px >= 8, "8 or more"),
            ("scales", _ascending(self.scales), f"an ascending list of 0 to {_COARSEST}"),
            ("tissue", _shares(self.tissue), "a list with a share, 0 to 1, per scale"),
            ("border", self.border in ("drop", "pad"), "drop or pad"),
            ("mask", self.mask in ("", "all") or "{name}" in self.mask, "all, or hold {name}"),
            ("val_fraction", 0 <= self.val_fraction < 1, "0 or more and below 1"),
            (
                "test_fraction",
                self.test_fraction >= 0 and held_out < 1,
                "with val_fraction below 1",
            ),
            ("test_fraction", self.split != "band" or not self.test_fraction, "0 with split=band"),
            ("split", bool(self.split), "patient, band, or a file with the splits"),
            ("unlisted", self.unlisted in ("refuse", "skip", "hash"), "refuse, skip or hash"),
            ("seed", 0 <= self.seed < 1 << 64, "0 or more"),
            ("bands", _bands(self.bands), "one band or three, by numbers from 1"),
            ("value_range", _range(self.value_range), "two different numbers, [low,high]"),
            ("block_tiles", self.block_tiles >= 1, "1 or more"),
            ("crops", self.crops >= 0, "0 or more"),
            ("base_crops", self.base_crops >= 0, "0 or more"),
            ("base_crops", not self.base_crops or 0 in self.scales, "0 unless scales has 0"),
            ("views", self.views >= 1, "1 or more"),
            ("labels", not self.labels or bool(self.table), "empty without tile.table"),
        ):
            if not fine:
                raise UserError(f"tile.{key}={getattr(self, key)}: it must be {wish}.")

    @property
    def read_options(self) -> ReadOptions:
        """What the readers of slides are told."""
        return ReadOptions(self.scene, tuple(self.bands), tuple(map(float, self.value_range)))

    def require_one_view(self) -> TileConfig:
        """Return itself, for formats that know one view of a slide.

        Raises:
            UserError: the slides are tiled more than once.
        """
        for key, value, single in (("views", self.views, 1), ("base_crops", self.base_crops, 0)):
            if value != single:
                raise UserError(
                    f"tile.{key}={value}: this works on tables of one view per slide; prepare "
                    f"them with tile.{key}={single} into another out=."
                )
        return self


def _bands(bands: Sequence[int]) -> bool:
    return len(bands) in (0, 1, 3) and all(band >= 1 for band in bands)


def _range(values: Sequence[float]) -> bool:
    if not values:
        return True
    return len(values) == 2 and all(map(math.isfinite, values)) and values[0] != values[1]


def _ascending(scales: Sequence[int]) -> bool:
    return bool(scales) and list(scales) == sorted(set(scales) & set(range(_COARSEST + 1)))


def _shares(tissue: Sequence[float]) -> bool:
    return bool(tissue) and all(0 <= share <= 1 for share in tissue)


def base_grid(size_px: tuple[int, int], config: TileConfig) -> tuple[int, int]:
    """(rows, columns) of base tiles: whole ones; padded, up to a multiple of the coarsest scale."""
    if config.border == "drop":
        return (size_px[0] // config.patch_px, size_px[1] // config.patch_px)
    unit = 1 << max(config.scales)
    rows, columns = (-(-side // (config.patch_px * unit)) * unit for side in size_px)
    return (rows, columns)


def blocks(grid: Sequence[int], config: TileConfig) -> list[tuple[int, int]]:
    """The rows [start, stop) of the base grid that each block of a slide's parts covers."""
    return spans(grid[0], max(1, config.block_tiles // max(1, grid[1]))) if all(grid) else []


def candidates(size_px: tuple[int, int], k: int, config: TileConfig, slide_id: str) -> Cells:
    """(row, column) of all candidates at a scale: the regular grid, then random crops, sorted."""
    factor = 1 << k
    counts = [-(-side // (config.patch_px * factor)) for side in size_px]
    regular = {(r * factor, c * factor) for r in range(counts[0]) for c in range(counts[1])}
    free = [side // config.patch_px - factor + 1 for side in size_px]
    if k and config.crops and min(free) > 0:
        address = (int(slide_id[:8], 16), int(slide_id[8:], 16), k)
        order = generator(config.seed, "tile crops", *address).permutation(free[0] * free[1])
        drawn = (divmod(int(index), free[1]) for index in order)
        fresh = [cell for cell in drawn if cell not in regular]
        regular.update(fresh[: config.crops])
    return np.array(sorted(regular), dtype=np.int64).reshape(-1, 2)


def box_means(tissue: Grid, cells: Cells, factor: int) -> Float[np.ndarray, " n"]:
    """Mean tissue of the tiles under each candidate; there is none beyond the grid."""
    sums = np.zeros((tissue.shape[0] + factor + 1, tissue.shape[1] + factor + 1))
    padded = np.pad(tissue.astype(np.float64), ((0, factor), (0, factor)))
    sums[1:, 1:] = padded.cumsum(axis=0).cumsum(axis=1)
    top, left = cells[:, 0], cells[:, 1]
    bottom, right = top + factor, left + factor
    total = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
    return (total / factor**2).astype(np.float32)


def splits(cells: Cells, k: int, rows: int, split: str, val_fraction: float) -> list[str]:
    """Each candidate's split; empty where it straddles the edge of the held-out band."""
    if split != "band":
        return [split] * len(cells)
    edge = band_edge(rows, val_fraction)
    above, below = cells[:, 0] + (1 << k) <= edge, cells[:, 0] >= edge
    return [str(name) for name in np.select([above, below], ["train", "val"], "")]


def band_rows(rows_px: int, config: TileConfig) -> int:
    """Return how many rows of base tiles `split=band` divides."""
    padded = config.border == "pad"
    return -(-rows_px // config.patch_px) if padded else rows_px // config.patch_px


def band_edge(rows: int, val_fraction: float) -> int:
    """Return the first row of the base grid that `split=band` holds out."""
    return rows - (max(1, round(val_fraction * rows)) if val_fraction else 0)


def reason(
    cell: Int[np.ndarray, "2"],
    factor: int,
    grid: tuple[int, int],
    split: str,
    share: np.float32,
    least: float,
) -> str:
    """Why a candidate is rejected; empty where it is kept."""
    if cell[0] + factor > grid[0] or cell[1] + factor > grid[1]:
        return "outside"
    if not split:
        return "crosses the split"
    return f"tissue {share:.3g} < {least:g}" if share < np.float32(least) else ""


def covered(
    scale: Int[np.ndarray, " n"], cells: Cells, rows: tuple[int, int], columns: int
) -> Bool[np.ndarray, "rows columns"]:
    """Which base tiles of the rows [top, bottom) some example covers."""
    top, bottom = rows
    marks = np.zeros((bottom - top + 1, columns + 1), np.int32)
    factor = 1 << scale.astype(np.int64)
    first = np.clip(cells[:, 0] - top, 0, bottom - top)
    last = np.clip(cells[:, 0] + factor - top, 0, bottom - top)
    for r, c, sign in (
        (first, cells[:, 1], 1),
        (last, cells[:, 1], -1),
        (first, cells[:, 1] + factor, -1),
        (last, cells[:, 1] + factor, 1),
    ):
        np.add.at(marks, (r, c), sign)
    coverage: np.ndarray = marks.cumsum(axis=0).cumsum(axis=1)[:-1, :-1] > 0
    return coverage
