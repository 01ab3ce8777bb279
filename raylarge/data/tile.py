"""tile: slides in, TILES out: every candidate example, kept or rejected with a reason.

A candidate at scale k covers 2^k x 2^k base tiles. Candidates lie on the regular grid of their
scale; at coarse scales random tile-aligned crops join them. What is random about a slide is a
function of (seed, slide_id, scale).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from raylarge import schema, storage
from raylarge.config import plain
from raylarge.data import parts
from raylarge.data.parts import Maker
from raylarge.data.pipeline import Facts, Unit
from raylarge.diffusion.noise import generator
from raylarge.errors import UserError
from raylarge.slides.reader import BASE_MPP, Slide, open_slide
from raylarge.slides.tissue import tissue_fraction, tissue_mask

Grid = Float[np.ndarray, "grid_rows grid_columns"]
_MASK_CELLS = 8
_PEEK_BYTES = 1 << 20


@dataclass(frozen=True)
class Tile:
    """What counts as an example, and who may train on it."""

    patch_px: int = 256
    scales: list[int] = field(default_factory=lambda: list(range(8)))
    tissue: list[float] = field(default_factory=lambda: [0.5, 0.4, 0.3, 0.2, 0.1])
    """Least share of tissue per scale; coarser scales than listed take the last."""
    crops: int = 0
    """Random tile-aligned candidates per slide and coarse scale, beside the regular grid."""
    split: str = "patient"
    """`patient`: whole patients are held out; `band`: the lowest rows of each slide."""
    val_fraction: float = 0.1
    patient: str = ""
    """Regular expression on the file name whose first group is the patient; empty: the slide."""
    mpp: float | None = None
    base_mpp: float = BASE_MPP
    block_tiles: int = 1024
    """Base tiles (about) per part of the later tables."""
    salt: str = "raylarge"
    seed: int = 0

    def check(self) -> None:
        """Refuse values that make no sense.

        Raises:
            UserError: naming the key, its value and what it may be.
        """
        for key, fine, wish in (
            ("patch_px", self.patch_px >= 8, "8 or more"),
            ("scales", bool(self.scales) and min(self.scales) >= 0, "a list of 0 and above"),
            ("tissue", bool(self.tissue), "a list with a share per scale"),
            ("split", self.split in ("patient", "band"), "patient or band"),
            ("val_fraction", 0 <= self.val_fraction < 1, "0 or more and below 1"),
            ("block_tiles", self.block_tiles >= 1, "1 or more"),
            ("crops", self.crops >= 0, "0 or more"),
        ):
            if not fine:
                raise UserError(f"tile.{key}={getattr(self, key)}: it must be {wish}.")


def run(root: str, slides: Sequence[str], config: Tile, workers: int | None) -> Facts:
    """Find the candidates of all slides, and write `slides.json` and `tile.json`.

    Raises:
        UserError: a slide that cannot be read, two of one name, or none with a kept tile.
    """
    config.check()
    sections = {"tile": plain(config)}
    parts.refuse_mixing(root, sections)
    units = _units(slides, sections, config)
    facts = parts.build(root, units, partial(Tiling, config), workers, "tile")
    if not any(one["counts"] for one in facts):
        names = ", ".join(os.path.basename(unit["path"]) for unit in units[:5])
        best = max(one["most_tissue"] for one in facts)
        raise UserError(
            f"no tile of {names} is kept: the most tissue in one is {best:.3g} and "
            f"tile.tissue={config.tissue}; lower tile.tissue= or give slides with tissue."
        )
    rows = [{**one["slide"], "path": unit["path"]} for one, unit in zip(facts, units, strict=True)]
    storage.write_json(storage.join(root, "slides.json"), {"slides": rows})
    return parts.finish(root, "tile", facts, sections, patch_px=config.patch_px)


def slides_of(root: str) -> list[dict[str, Any]]:
    """The slides of a data folder: slide_id, path, patient_id, split, size_px, mpp, fingerprint."""
    slides: list[dict[str, Any]] = storage.read_json(storage.join(root, "slides.json"))["slides"]
    return slides


def blocks(slide: dict[str, Any], config: Tile) -> list[tuple[int, int]]:
    """The rows [start, stop) of the base grid that each block of a slide's parts covers."""
    rows, columns = (side // config.patch_px for side in slide["size_px"])
    per_block = max(1, config.block_tiles // max(1, columns))
    return [(top, min(top + per_block, rows)) for top in range(0, rows, per_block)]


def pseudonym(salt: str, name: str) -> str:
    """A salted name: the same for the same file name, and no way back without the salt."""
    return hashlib.blake2b(name.encode(), key=salt.encode()[:64], digest_size=8).hexdigest()


def fingerprint(path: str) -> str:
    """A short name for a slide's bytes: its size, first and last MiB.

    Raises:
        UserError: nothing stands at the path.
    """
    fs, root = fsspec.core.url_to_fs(path)
    try:
        size = fs.size(root)
    except FileNotFoundError as error:
        raise UserError(f"slide {path} does not exist; check the path.") from error
    ends = [fs.cat_file(root, 0, _PEEK_BYTES), fs.cat_file(root, max(0, size - _PEEK_BYTES), size)]
    return storage.digest(f"{size} ".encode() + b"".join(ends))


def _units(slides: Sequence[str], sections: dict[str, Any], config: Tile) -> list[Unit]:
    with ThreadPoolExecutor(16) as pool:
        prints = list(pool.map(fingerprint, slides))
    units: dict[str, Unit] = {}
    for path, mark in zip(slides, prints, strict=True):
        name = path.rsplit("/", 1)[-1]
        slide_id = pseudonym(config.salt, name)
        if slide_id in units:
            raise UserError(
                f"{units[slide_id]['path']} and {path} have one file name, and with it one "
                "pseudonym; rename one of them."
            )
        units[slide_id] = {
            "part": f"tiles/{slide_id}.parquet",
            "stamp": parts.stamp(sections, mark),
            "slide_id": slide_id,
            "patient_id": pseudonym(config.salt, _patient(name, config.patient)),
            "path": path,
            "fingerprint": mark,
        }
    return [units[slide_id] for slide_id in sorted(units)]


def _patient(name: str, pattern: str) -> str:
    if not pattern:
        return name
    found = re.search(pattern, name)
    if found is None or not found.groups():
        raise UserError(
            f"tile.patient={pattern} finds no patient in '{name}'; give a regular expression "
            "with one group, such as '^(TCGA-..-....)'."
        )
    return found.group(1)


class Tiling(Maker):
    """Makes the TILES of one slide."""

    kind = schema.TILES

    def __init__(self, config: Tile) -> None:
        """Hold the config."""
        self._config = config

    def make(self, unit: Unit) -> tuple[pa.Table, Facts]:
        """All candidates of a slide, scale by scale, row by row."""
        config = self._config
        with open_slide(unit["path"], config.mpp, config.base_mpp) as slide:
            tissue = tissue_grid(slide, config.patch_px)
            split = _patient_split(unit["patient_id"], config)
            tables = [self._scale(unit, k, slide, tissue, split) for k in config.scales]
            facts = {
                "slide_id": unit["slide_id"],
                "patient_id": unit["patient_id"],
                "split": split,
                "size_px": list(slide.size_px),
                "mpp": slide.mpp,
                "fingerprint": unit["fingerprint"],
            }
        table = pa.concat_tables(tables)
        return table, {"slide": facts, "most_tissue": float(tissue.max(initial=0.0))}

    def _scale(self, unit: Unit, k: int, slide: Slide, tissue: Grid, split: str) -> pa.Table:
        config = self._config
        cells = candidates(slide.size_px, k, config, unit["slide_id"])
        shares = _box_means(tissue, cells, 1 << k)
        whole = (slide.size_px[0] // config.patch_px, slide.size_px[1] // config.patch_px)
        splits = _splits(cells, k, whole[0], split, config)
        least = config.tissue[min(k, len(config.tissue) - 1)]
        reasons = [
            _reason(cell, 1 << k, whole, name, share, least)
            for cell, name, share in zip(cells, splits, shares, strict=True)
        ]
        count = len(cells)
        return pa.table(
            {
                "slide_id": [unit["slide_id"]] * count,
                "patient_id": [unit["patient_id"]] * count,
                "split": splits,
                "scale": pa.array([k] * count, pa.int8()),
                "row": pa.array(cells[:, 0], pa.int32()),
                "column": pa.array(cells[:, 1], pa.int32()),
                "tissue": pa.array(shares, pa.float32()),
                "kept": pa.array([not reason for reason in reasons], pa.bool_()),
                "reason": pa.array(reasons, pa.string()),
            },
            schema=pa.schema(list(schema.TILES)),
        )


def tissue_grid(slide: Slide, patch_px: int) -> Grid:
    """The share of tissue in every base tile, those over the right and lower edge included."""
    downscale = max(1, patch_px // _MASK_CELLS)
    mask = tissue_mask(slide.thumbnail(downscale))
    grid = (-(-slide.size_px[0] // patch_px), -(-slide.size_px[1] // patch_px))
    return tissue_fraction(mask, patch_px / downscale, grid)


def candidates(
    size_px: tuple[int, int], k: int, config: Tile, slide_id: str
) -> Int[np.ndarray, "n 2"]:
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


def _box_means(tissue: Grid, cells: Int[np.ndarray, "n 2"], factor: int) -> Float[np.ndarray, "n"]:
    """Mean tissue of the tiles under each candidate; there is none beyond the grid."""
    sums = np.zeros((tissue.shape[0] + factor + 1, tissue.shape[1] + factor + 1))
    padded = np.pad(tissue.astype(np.float64), ((0, factor), (0, factor)))
    sums[1:, 1:] = padded.cumsum(axis=0).cumsum(axis=1)
    top, left = cells[:, 0], cells[:, 1]
    bottom, right = top + factor, left + factor
    total = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
    return (total / factor**2).astype(np.float32)


def _patient_split(patient_id: str, config: Tile) -> str:
    """The slide's split: `band`, or by the patient's pseudonym alone."""
    if config.split == "band":
        return "band"
    return "val" if int(patient_id, 16) / 2.0**64 < config.val_fraction else "train"


def _splits(
    cells: Int[np.ndarray, "n 2"], k: int, rows: int, split: str, config: Tile
) -> list[str]:
    """Each candidate's split; empty where it straddles the edge of the held-out band."""
    if split != "band":
        return [split] * len(cells)
    held_out = max(1, round(config.val_fraction * rows)) if config.val_fraction else 0
    edge = rows - held_out
    above, below = cells[:, 0] + (1 << k) <= edge, cells[:, 0] >= edge
    return [str(name) for name in np.select([above, below], ["train", "val"], "")]


def _reason(
    cell: Int[np.ndarray, "2"],
    factor: int,
    whole: tuple[int, int],
    split: str,
    share: np.float32,
    least: float,
) -> str:
    """Why a candidate is rejected; empty where it is kept."""
    if cell[0] + factor > whole[0] or cell[1] + factor > whole[1]:
        return "outside"
    if not split:
        return "crosses the split"
    return f"tissue {share:.3g} < {least:g}" if share < np.float32(least) else ""
