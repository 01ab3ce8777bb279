"""h5_embed: vectors that CLAM or TRIDENT made of the user's slides in, EMBEDDINGS out.

    TILES + FOLDER/<slide>.h5 ─▶ EMBEDDINGS and embed.json, so that `shard` can go on

A patch must lie on our grid of base tiles, so the tools must have cut the slide from its corner,
without overlap, into patches as wide as our tiles: TRIDENT does. They leave glass out, though,
which coarse examples do cover: such tiles are embedded here (`fill=true`), or refused.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
from omegaconf import MISSING

from raylarge import storage
from raylarge.data import embed, embed_config, name_table, parts, pipeline
from raylarge.data.embed import EmbedStage
from raylarge.data.embed_config import EmbedConfig
from raylarge.data.exchange import h5, h5_read
from raylarge.data.exchange.h5_place import Index, check_index, index_of
from raylarge.data.exchange.h5_read import Patches, Vectors
from raylarge.data.grid import TileGrid, about
from raylarge.data.parts import BuildResult
from raylarge.data.pipeline import ExecutorConfig, Facts
from raylarge.data.tile_candidates import TileConfig, covered
from raylarge.data.tile_table import kept, scale_and_cells, slides_of
from raylarge.data.units import BlockUnit, SlideFacts, Unit
from raylarge.errors import SlideError, UserError
from raylarge.models import ssl
from raylarge.models.ssl_cards import EncoderCard
from raylarge.slides.mpp import zoom


@dataclass(frozen=True)
class Import:
    """Whose vectors come in."""

    data: str = MISSING
    """The data folder, where `tile` has run. Example: data."""
    source: str = MISSING
    """The folder of the h5 files with features, or of CLAM's `h5_files`. They are named like the
    slides' files, or by pseudonym. Example: features_uni."""
    encoder: str = MISSING
    """That made them. Example: uni."""
    format: str = "trident"  # trident or clam
    patches: str = ""
    """The folder of the h5 files that tell patch_size, where those with features do not.
    Example: patches."""
    fill: bool = False
    """Embed the tiles that the files lack here; it takes the encoder's weights."""
    embed: EmbedConfig = field(default_factory=EmbedConfig)
    """By what means; its `encoder` is the one above."""
    workers: int | None = None  # Ray workers; null: this process
    on_error: str = "stop"
    """At a slide whose file does not fit: `stop`, or `skip` it and say so in failed.parquet."""


@dataclass(frozen=True, kw_only=True)
class SlideFiles(Unit):
    """A slide and its files: the path of the features, then that of the coords.

    `zoom` is in level-0 pixels per base pixel, `grid` (rows, columns) of base tiles.
    """

    path: str
    files: Sequence[str]
    zoom: float
    grid: Sequence[int]
    size_l0: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class ImportUnit(BlockUnit):
    """A block of EMBEDDINGS that is read from files; fields as in `SlideFiles`."""

    files: Sequence[str]
    zoom: float
    grid: Sequence[int]
    size_l0: Sequence[int]


def run(config: Import) -> Facts:
    """Put the vectors of all slides into EMBEDDINGS, and write `embed.json`.

    Returns:
        What `parts.finish` says; `imported`, `embedded`: tiles by where their vectors are from;
        and `unused`: patches of the files that no kept example covers.

    Raises:
        UserError: `tile` has not run, the folder holds embeddings of its own or examples of other
            vectors, a slide's file is missing or does not fit, or h5py is not installed.
    """
    _check(config)
    root = storage.absolute(config.data)
    tiles = parts.manifest(root, "tile", "import")
    _refuse_own(root)
    card, tile = ssl.card(config.encoder), h5.tile_of(tiles)
    executor = ExecutorConfig(workers=config.workers, skip=config.on_error == "skip")
    slides = _with_files(slides_of(root), config, tile)
    looked = pipeline.run(slides, partial(Looking, root, tile, config), executor, "look")
    checked = {unit.slide_id: (unit, one) for unit, one in zip(slides, looked, strict=True)}
    failed = [_failed(name, one["failed"]) for name, (_, one) in checked.items() if "failed" in one]
    sections = {"tile": tiles["config"]["tile"], "embed": _section(config)}
    units = [
        _unit(unit, *checked[unit.slide_id])
        for unit in embed.units_of(root, tile, sections)
        if "failed" not in checked[unit.slide_id][1]
    ]
    make_stage = partial(Importing, root, tile, config)
    executor = config.embed.of(executor) if config.fill else executor
    built = parts.build(root, units, make_stage, executor, "embed")
    together = BuildResult(built.facts, failed + built.failed)
    totals = {
        key: sum(one[key] for one in built.facts) for key in ("imported", "embedded", "blank")
    }
    encoder = {**card.as_json(), "weights": sections["embed"].get("weights", "")}
    more = {"input": tiles["digest"], "encoder": encoder, **totals}
    unused = sum(one["unused"] for _, one in checked.values() if "failed" not in one)
    return {**parts.finish(root, "embed", together, sections, **more), **totals, "unused": unused}


def _check(config: Import) -> None:
    h5_read.library()
    if config.format not in h5.FORMATS:
        raise UserError(f"import={config.format}: it must be one of {', '.join(h5.FORMATS)}.")
    if config.on_error not in ("stop", "skip"):
        raise UserError(f"on_error={config.on_error}: it must be stop or skip.")


def _refuse_own(root: str) -> None:
    """Imported vectors replace imported ones; those that `embed` made are left alone."""
    path = storage.join(root, "embed.json")
    if storage.exists(path) and "imported" not in storage.read_json(path)["config"]["embed"]:
        raise UserError(
            f"{root} holds embeddings that verbs=embed made; choose another data=, or delete "
            f"{path} and what shard made."
        )


def _section(config: Import) -> dict[str, Any]:
    """Where the vectors are from: the encoder, the tool, and what filled the gaps."""
    means = embed_config.section(_means(config)) if config.fill else {"encoder": config.encoder}
    return {**means, "imported": config.format}


def _unit(unit: BlockUnit, slide: SlideFiles, facts: Facts) -> ImportUnit:
    """Return a block with its slide's files, whose content is part of its stamp."""
    block = {one.name: getattr(unit, one.name) for one in fields(BlockUnit)}
    files = {name: getattr(slide, name) for name in ("files", "zoom", "grid", "size_l0")}
    return ImportUnit(**{**block, **files, "stamp": parts.stamp(unit.stamp, facts["digest"])})


def _means(config: Import) -> EmbedConfig:
    weights = config.embed.weights and storage.absolute(config.embed.weights)
    return replace(config.embed, encoder=config.encoder, weights=weights)


def _failed(slide_id: str, reason: str) -> dict[str, str]:
    return {"slide_id": slide_id, "part": f"embeddings/{slide_id}", "reason": reason}


def _with_files(slides: Sequence[SlideFacts], config: Import, tile: TileConfig) -> list[SlideFiles]:
    """Return the slides with their files."""
    source = storage.absolute(config.source)
    features = {**_named(source), **_named(storage.join(source, "h5_files"))}
    if not features:
        raise UserError(
            f"source={config.source}: there is no .h5 file in it, nor in h5_files (CLAM's .pt "
            "files have no coordinates)."
        )
    folders = [storage.absolute(config.patches)] if config.patches else []
    folders += [storage.join(source, "patches"), storage.join(source.rsplit("/", 1)[0], "patches")]
    coords = {name: path for folder in reversed(folders) for name, path in _named(folder).items()}
    units = []
    for slide in slides:
        stems = (unicodedata.normalize("NFC", stem) for stem in name_table.stems(slide.path))
        names = [slide.slide_id, *stems]
        files = [next((of[name] for name in names if name in of), "") for of in (features, coords)]
        units.append(
            SlideFiles(
                part=f"embeddings/{slide.slide_id}",
                slide_id=slide.slide_id,
                path=slide.path,
                grid=slide.grid,
                size_l0=slide.size_l0,
                zoom=zoom(slide.mpp, tile.base_mpp),
                files=files,
            )
        )
    shared = [path for path, count in Counter(unit.files[0] for unit in units).items() if count > 1]
    if any(shared):
        count = sum(unit.files[0] in shared for unit in units if unit.files[0])
        raise UserError(
            f"source={config.source}: {count} slides share a file of features, since their names "
            "differ in the ending alone; name the files by pseudonym (names.json of data=)."
        )
    return units


def _named(folder: str) -> dict[str, str]:
    """Return the h5 files of a folder by the slide that they are named for (in NFC).

    Raises:
        UserError: several files have one name.
    """
    paths = storage.children(folder, "*.h5")
    stems = [unicodedata.normalize("NFC", name_table.stems(path)[1]) for path in paths]
    if len(set(stems)) < len(stems):
        raise UserError(
            f"{folder} has {len(stems) - len(set(stems))} names twice, which differ in how an "
            "accent is written alone; keep one file of each slide."
        )
    files = dict(zip(stems, paths, strict=True))
    for stem, path in zip(stems, paths, strict=True):
        files.setdefault(stem.removesuffix("_patches"), path)
    return files


class Looking:
    """Looks at one slide's file before anything is written."""

    def __init__(self, root: str, tile: TileConfig, config: Import) -> None:
        """Hold what the file is to fit."""
        self._root, self._tile, self._fill = root, tile, config.fill
        self._card = ssl.card(config.encoder)

    def __call__(self, unit: SlideFiles) -> Facts:
        """Return the `digest` of the file, the tiles `missing` in it and its `unused` patches.

        Raises:
            SlideError: no file, another encoder's width, another place, or tiles that are missing.
        """
        with about(unit):
            layout, index = _source(unit, self._tile)
            _check_width(layout, self._card)
            scale, cells = scale_and_cells(kept(self._root, unit.slide_id))
            rows, columns = unit.grid
            marks = covered(scale, cells, (0, rows), columns)
            needed = [(int(row), int(column)) for row, column in np.argwhere(marks)]
            check_index(index, needed)
            missing = [cell for cell in needed if cell not in index]
            if missing and not self._fill:
                raise SlideError(
                    f"its h5 lacks {len(missing)} of the {len(needed)} tiles that kept examples "
                    f"cover, the first at row {missing[0][0]}, column {missing[0][1]}; set "
                    "fill=true to embed those here, or tile with its own patches as the mask "
                    "(import=tissue) and fewer scales"
                )
            digest = storage.digest_file(unit.files[0])
            unused = len(index) - (len(needed) - len(missing))
            return {"digest": digest, "missing": len(missing), "unused": unused}


class Importing(EmbedStage):
    """Makes the EMBEDDINGS of one block out of a file's vectors."""

    def __init__(self, root: str, tile: TileConfig, config: Import) -> None:
        """Load the encoder, where gaps are to be filled."""
        self._tile = tile
        self._read = lru_cache(1)(self._read_anew)
        if config.fill:
            super().__init__(root, tile, _means(config))
        else:
            self._root = root
            self._encoder: Any = _Unloaded(ssl.card(config.encoder))
        self._grid = _AtNeed(tile)

    def make(self, unit: ImportUnit) -> tuple[Any, Facts]:  # type: ignore[override]
        """The block's rows of the base grid, as `embed` makes them."""
        self._unit = unit
        table, facts = super().make(unit)
        return table, {"imported": 0, **facts}

    def _embed(self, cells: Sequence[tuple[int, int]], facts: Facts) -> Vectors:
        """A vector per cell: the file's, or of our own making where it has none."""
        index, vectors = self._read(self._unit.slide_id)
        embeddings = np.empty((len(cells), self._encoder.card.width), np.float16)
        gaps = [i for i, cell in enumerate(cells) if cell not in index]
        imported = [i for i, cell in enumerate(cells) if cell in index]
        embeddings[imported] = vectors[[index[cells[i]] for i in imported]]
        if gaps:
            embeddings[gaps] = super()._embed([cells[i] for i in gaps], facts)
        facts["imported"] = len(imported)
        return embeddings

    def _read_anew(self, slide_id: str) -> tuple[Index, Vectors]:
        """All vectors of a slide; its blocks come one after the other."""
        layout, index = _source(self._unit, self._tile)
        return index, h5_read.vectors(self._unit.files[0], layout)


class _AtNeed(TileGrid):
    """A slide's grid that opens the slide (a whole download) when a tile is read, if ever."""

    def open(self, unit: BlockUnit) -> Any:
        """Remember which slide is meant."""
        self._meant = unit

    def read(self, row: int, column: int, count: int) -> list[np.ndarray]:
        """`count` neighbouring tiles, straight from the slide."""
        super().open(self._meant)
        return super().read(row, column, count)


class _Unloaded(NamedTuple):
    """Stands where an encoder would, if there is nothing to embed."""

    card: EncoderCard


def _source(unit: SlideFiles | ImportUnit, tile: TileConfig) -> tuple[Patches, Index]:
    """What a slide's files say, and which of their vectors is a cell's.

    Raises:
        SlideError: no file, or patches of another size or place than our tiles.
    """
    features, coords = unit.files
    if not features:
        raise SlideError("there is no h5 file of its name in source=")
    layout = h5_read.patches([features, coords] if coords else [features])
    return layout, index_of(layout, unit, tile)


def _check_width(layout: Patches, card: EncoderCard) -> None:
    if not layout.features:
        raise SlideError(
            "its h5 holds no dataset 'features' [N, D], only coords; give source= the "
            "folder of the files with features"
        )
    count, width = layout.features
    if count != len(layout.xy):
        raise SlideError(
            f"its h5 has {count} rows of features for {len(layout.xy)} coords, where each patch "
            "has one of both; the file is incomplete or mixed up: write it again"
        )
    if width != card.width:
        raise SlideError(
            f"its h5 has features of {width} channels (shape {layout.features}), but "
            f"encoder={card.name} makes {card.width} channels; name the encoder that made them"
        )
