"""tile: slides in, TILES out: every candidate example, kept or rejected with a reason.

A slide is opened once: its thumbnail tells where there is tissue, its candidates
(`tile_candidates.py`) are held against it, and a sheet for its quality control is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from raylarge import images, report, schema, storage
from raylarge.data import name_table, parts, readable, slide_index
from raylarge.data.grid import about
from raylarge.data.parts import Stage
from raylarge.data.pipeline import ExecutorConfig, Facts
from raylarge.data.qc.sheet import sheet as drawn
from raylarge.data.qc.sheet import write_page
from raylarge.data.tile_candidates import (
    Grid,
    TileConfig,
    band_rows,
    base_grid,
    box_means,
    candidates,
    covered,
    reason,
    splits,
)
from raylarge.data.tile_table import file_names, remember, scale_and_cells, section
from raylarge.data.units import SlideFacts, TileUnit, Unit
from raylarge.data.views import drop_unused_crops, mask_cell_px, view_of, view_splits, with_views
from raylarge.errors import SlideError, UserError
from raylarge.slides import masks
from raylarge.slides.reader import Slide, open_slide
from raylarge.slides.tissue import tissue_fraction, tissue_mask

_OF_ENTRY = ("path", "slide_id", "patient_id", "split", "mpp", "labels", "view")
_NAMED = 3
"""So many slides are named that have one note."""


def run(
    root: str,
    slides: Sequence[str],
    config: TileConfig,
    executor: ExecutorConfig,
    names: bool = False,
) -> Facts:
    """Find the candidates of all slides, and write `slides.json`, `names.json` and `tile.json`.

    Args:
        root: the data folder.
        slides: paths or URLs.
        config: what counts as an example.
        executor: who does it.
        names: whether the QC page and the facts may name files.

    Raises:
        UserError: a slide that cannot be read, two of one name, or none with a kept tile.
    """
    config.check()
    sections = {"tile": section(config)}
    parts.refuse_mixing(root, sections)
    index = slide_index.index(slides, config)
    for line in index.lines:
        report.say(line)
    entries = with_views(index.entries, config)
    remember(root, entries)
    shown = file_names(root) if names else {}
    units = _units(entries, sections, config)
    try:
        built = parts.build(root, units, partial(TileStage, root, config), executor, "tile")
    except SlideError as error:
        raise readable.refuse_all(root, units, config, executor, shown) or error from error
    _report(root, units, built, shown)
    if not any(one["counts"] for one in built.facts):
        raise _nothing_kept(root, built, config, shown)
    _write_slides(root, built.facts)
    facts = parts.finish(root, "tile", built, sections, patch_px=config.patch_px)
    tables = slide_index.account(index, config.salt, names)
    return {**facts, "user_tables": tables} if tables else facts


def _write_slides(root: str, facts: Sequence[Facts]) -> None:
    slides = [part["slide"] for part in facts]
    storage.write_json(storage.join(root, "slides.json"), {"slides": slides})


def _report(
    root: str, units: Sequence[Unit], built: parts.BuildResult, shown: dict[str, str]
) -> None:
    _tell_of_others(root, {unit.slide_id for unit in units})
    _say_notes(built.facts)
    write_page(root, built.facts, built.failed, shown)


def _nothing_kept(
    root: str, built: parts.BuildResult, config: TileConfig, shown: dict[str, str]
) -> UserError:
    """Print why slides failed, and return the error of a run that keeps no tile."""
    for one in built.failed:
        report.say(f"  {slide_index.with_names(one['reason'], shown)}")
    best = max((one["most_tissue"] for one in built.facts), default=0.0)
    count = len(built.facts) + len(built.failed)
    return UserError(
        f"no tile of {count} slides is kept ({len(built.failed)} of them could not be read): the "
        f"most tissue in one is {best:.3g} and tile.tissue={config.tissue}; look at "
        f"{root}/qc/index.html, lower tile.tissue= or give slides with tissue."
    )


def _say_notes(facts: Sequence[Facts]) -> None:
    """Say once what readers chose, of the slides that were read just now."""
    slides: dict[str, list[str]] = {}
    for one in facts:
        for note in one["slide"].get("notes", []) if one["made"] else []:
            slides.setdefault(note, []).append(one["slide"]["slide_id"])
    for note, names in sorted(slides.items()):
        more = f" and {len(names) - _NAMED} others" if len(names) > _NAMED else ""
        report.say(f"slide {', '.join(names[:_NAMED])}{more}: {note}")


def _tell_of_others(root: str, slides: set[str]) -> None:
    """Say what lies here of slides that are not among the given ones."""
    parts = storage.sizes(storage.join(root, "tiles"))
    others = {name.removesuffix(".parquet") for name in parts} - slides
    if others:
        report.say(
            f"{len(others)} slides of earlier runs are left out; what was made of them stays in "
            f"{root}/tiles, embeddings and qc until you remove it"
        )


def _units(
    entries: Sequence[slide_index.Entry], sections: dict[str, Any], config: TileConfig
) -> list[TileUnit]:
    pattern = storage.absolute(config.mask) if "{name}" in config.mask else ""
    mask_paths = [pattern.replace("{name}", entry.stem) for entry in entries]
    _refuse_shared(entries, mask_paths)
    with ThreadPoolExecutor(16) as pool:
        prints = list(pool.map(_fingerprint, [entry.path for entry in entries]))
        drawn = list(pool.map(lambda path: path and _fingerprint(path), mask_paths))
    units: list[TileUnit] = []
    for entry, mark, mask, mask_mark in zip(entries, prints, mask_paths, drawn, strict=True):
        of_view = [entry.view] if entry.view else []
        digest = parts.stamp(sections, mark, mask_mark, entry.mpp, *of_view)
        units.append(
            TileUnit(
                **{name: getattr(entry, name) for name in _OF_ENTRY},
                part=f"tiles/{entry.slide_id}.parquet",
                stamp=parts.stamp(digest, entry.patient_id, entry.split, entry.labels),
                tiling_digest=digest,
                fingerprint=mark,
                mask=mask,
            )
        )
    return units


def _refuse_shared(entries: Sequence[slide_index.Entry], mask_paths: Sequence[str]) -> None:
    """Refuse slides whose names differ in the ending alone: one mask cannot be of both.

    Raises:
        UserError: naming both slides and the mask.
    """
    slides: dict[str, str] = {}
    for entry, path in zip(entries, mask_paths, strict=True):
        other = slides.setdefault(path, entry.path)
        if path and other != entry.path:
            raise UserError(
                f"tile.mask= gives {name_table.file_name(other)} and "
                f"{name_table.file_name(entry.path)} one mask, {path}; rename one of the slides."
            )


def _fingerprint(path: str) -> str:
    """A slide's fingerprint; none of one that cannot be read, which its own unit will say."""
    try:
        return slide_index.fingerprint(path)
    except UserError as error:
        if isinstance(error, SlideError) or storage.is_local(path):
            return ""
        raise


class TileStage(Stage):
    """Makes the TILES of one slide."""

    kind = schema.TILES

    def __init__(self, root: str, config: TileConfig) -> None:
        """Hold the config."""
        self._root = root
        self._config = config

    def make(self, unit: TileUnit) -> tuple[pa.Table, Facts]:
        """All candidates of a slide, scale by scale, row by row; its sheet is written first."""
        config = self._config
        with (
            about(unit),
            open_slide(
                unit.path,
                unit.mpp,
                config.base_mpp,
                config.icc,
                config.read_options,
                view_of(unit, config),
            ) as slide,
        ):
            tissue = tissue_grid(slide, config, unit.mask)
            table = pa.concat_tables([self._scale(unit, k, slide, tissue) for k in config.scales])
            table = drop_unused_crops(table, unit, config)
            facts = _slide_facts(unit, slide, table, base_grid(slide.size_px, config))
            sheet = drawn(slide, table, config.patch_px)
        path = storage.join(self._root, "qc", f"{unit.slide_id}.png")
        images.write_png(path, sheet, synthetic=False)
        return table, {"slide": facts.as_json(), "most_tissue": float(tissue.max(initial=0.0))}

    def _scale(self, unit: TileUnit, k: int, slide: Slide, tissue: Grid) -> pa.Table:
        config = self._config
        cells = candidates(slide.size_px, k, config, unit.slide_id)
        shares = box_means(tissue, cells, 1 << k)
        grid = base_grid(slide.size_px, config)
        if unit.view:
            named = view_splits(cells, k, slide, unit.split, config)
        else:
            rows = band_rows(slide.size_px[0], config)
            named = splits(cells, k, rows, unit.split, config.val_fraction)
        least = config.tissue[min(k, len(config.tissue) - 1)]
        reasons = [
            reason(cell, 1 << k, grid, name, share, least)
            for cell, name, share in zip(cells, named, shares, strict=True)
        ]
        count = len(cells)
        return pa.table(
            {
                "slide_id": [unit.slide_id] * count,
                "patient_id": [unit.patient_id] * count,
                "split": named,
                "scale": pa.array([k] * count, pa.int8()),
                "row": pa.array(cells[:, 0], pa.int32()),
                "column": pa.array(cells[:, 1], pa.int32()),
                "tissue": pa.array(shares, pa.float32()),
                "kept": pa.array([not one for one in reasons], pa.bool_()),
                "reason": pa.array(reasons, pa.string()),
            },
            schema=pa.schema(list(schema.TILES)),
        )


def _slide_facts(
    unit: TileUnit, slide: Slide, table: pa.Table, grid: tuple[int, int]
) -> SlideFacts:
    """Return what the later verbs need to know of a slide and its TILES."""
    marks = covered(*scale_and_cells(table.filter(table["kept"])), (0, grid[0]), grid[1])
    names = ("slide_id", "patient_id", "split", "labels", "fingerprint", "tiling_digest", "stamp")
    return SlideFacts(
        **{name: getattr(unit, name) for name in names},
        size_px=list(slide.size_px),
        grid=list(grid),
        covered=marks.sum(axis=1).tolist(),
        coverage_digest=storage.digest(marks.tobytes()),
        size_l0=list(slide.size_l0),
        mpp=slide.mpp,
        georeference=slide.georeference,
        mpp_override=unit.mpp,
        view=unit.view,
        notes=slide.notes,
    )


def tissue_grid(slide: Slide, config: TileConfig, mask_path: str = "") -> Grid:
    """The share of tissue in every base tile, those over the right and lower edge included."""
    downscale = mask_cell_px(config)
    shape = tuple(-(-side // downscale) for side in slide.size_px)
    if mask_path:
        rows, columns = (-(-side // downscale) for side in slide.whole_px)
        mask = masks.read(mask_path, slide.size_l0, (rows, columns), slide.notes)
        mask = slide.view.of_whole(mask, downscale, slide.whole_px)
    elif config.mask == "all":
        mask = np.ones(shape, bool)
    else:
        mask = tissue_mask(slide.thumbnail(downscale))
    grid = (-(-slide.size_px[0] // config.patch_px), -(-slide.size_px[1] // config.patch_px))
    return tissue_fraction(mask, config.patch_px / downscale, grid)
