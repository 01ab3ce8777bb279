"""published: the data sets of ZoomLDM, as their authors left them, in; EXAMPLES and LATENTS out.

    layouts.py: images ─▶ EXAMPLES and shard.json, latents ─▶ LATENTS and encode-<digest>.json

The sets tell neither slide nor place: a block of neighbouring indices stands for a slide (and for a
patient), and items lie side by side in one row of base tiles. A unit takes every n-th item of a
folder, since neighbours in a set come from one slide, and rows are read together by part.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int64
from omegaconf import MISSING

from raylarge import schema, storage, tables
from raylarge.config import plain
from raylarge.data import bucket, parts, shard, slide_index
from raylarge.data.exchange import layouts
from raylarge.data.exchange.layouts import LAYOUTS, PATCH_PX, Unfit
from raylarge.data.parts import Stage
from raylarge.data.pipeline import ExecutorConfig, Facts
from raylarge.data.units import Unit
from raylarge.errors import UserError
from raylarge.models import ssl

_READERS = 8  # threads: the sets are millions of small files, and opening them takes the time
_MOST_ITEMS = 8192  # of a part: Arrow counts the values of a list column in 32 bits
_SALT = "raylarge published"
Ids = Int64[np.ndarray, "n"]


@dataclass(frozen=True)
class Published:
    """Which set, where it lies, and what becomes of it."""

    format: str = MISSING  # brca, naip, brca-demo or naip-demo. Example: brca
    source: str = MISSING
    """The set's root: a folder or a URL. Example: zoomldm."""
    out: str = MISSING  # the data folder. Example: data
    tables: str = ""
    """`examples`, `latents` or both with a comma; empty: what the set's first item has.
    Example: latents."""
    encoder: str = ""
    """That made the embeddings; empty: the one that the paper names. Example: uni."""
    bundle: str = ""
    """Whose autoencoder made the latents. Example: bundle."""
    autoencoder: str = ""
    """In place of a bundle: any name for it. Example: vq-f4."""
    split: str = "train"
    """Of all items that the fractions leave."""
    val_fraction: float = 0.0
    """Share of blocks, by hash, that are held out: the authors held out nothing."""
    test_fraction: float = 0.0  # share of blocks for tests
    block_items: int = 1000
    """Neighbouring indices that count as one slide, and are held out together."""
    unit_items: int = 2000
    """Items (about) per part."""
    group_rows: int = 64
    """Rows that are read together."""
    workers: int | None = None  # Ray workers; null: this process

    def check(self) -> None:
        """Refuse values that make no sense.

        Raises:
            UserError: naming the key, its value and what it may be.
        """
        held_out = self.val_fraction + self.test_fraction
        for key, fine, wish in (
            (
                "tables",
                set(self.table_names) <= {"examples", "latents"},
                "examples, latents, or both",
            ),
            ("autoencoder", not (self.autoencoder and self.bundle), "left out beside bundle="),
            ("autoencoder", re.fullmatch(r"[\w.-]*", self.autoencoder), "letters, digits, . and -"),
            ("val_fraction", 0 <= self.val_fraction < 1, "0 or more and below 1"),
            (
                "test_fraction",
                self.test_fraction >= 0 and held_out < 1,
                "with val_fraction below 1",
            ),
            ("block_items", self.block_items >= 1, "1 or more"),
            ("unit_items", 1 <= self.unit_items <= _MOST_ITEMS, f"1 to {_MOST_ITEMS}"),
            ("group_rows", self.group_rows >= 1, "1 or more"),
        ):
            if not fine:
                raise UserError(f"{key}={getattr(self, key)}: it must be {wish}.")
        if self.format not in LAYOUTS:
            raise UserError(f"import={self.format}: it must be one of {', '.join(LAYOUTS)}.")

    @property
    def table_names(self) -> list[str]:
        """Return the tables that the user asks for."""
        return [name.strip() for name in self.tables.split(",") if name.strip()]


@dataclass(frozen=True, kw_only=True)
class ItemsUnit(Unit):
    """Items of one folder; `ids` are their indices (`_spelled`), `name` that of the part."""

    folder: str
    scale: int
    name: str
    ids: dict[str, Any]


def run(config: Published) -> dict[str, Facts]:
    """Bring a published set into tables; the same command run again makes what is missing.

    A part is identified by the names of its files, not by their content.

    Returns:
        Per table what `parts.finish` says, and `rejected`: how many items did not fit.

    Raises:
        UserError: no such set at the root, files of another form or another encoder, no name for
            the autoencoder, or a folder that holds other data.
    """
    config.check()
    root, layout = storage.absolute(config.out), LAYOUTS[config.format]
    card = ssl.card(config.encoder or layout.encoder)
    sections = {
        "published": _section(config, card.name),
        "tile": {"patch_px": PATCH_PX, "base_mpp": layout.base_mpp},
    }
    parts.refuse_mixing(root, sections)
    units = _units(config)
    done = {}
    for table in _tables(config, units[0]):
        verb = tables.verb(table)
        parts.refuse_mixing(root, sections, [verb])
        mine = [_of_table(unit, table, sections) for unit in units]
        make_stage = partial(Publishing, config, table.split("-", 1)[0], card.width)
        built = parts.build(root, mine, make_stage, ExecutorConfig(workers=config.workers), verb)
        rejected = sum(len(one["rejected"]) for one in built.facts)
        more = {"patch_px": PATCH_PX, "encoder": {**card.as_json(), "weights": ""}}
        facts = parts.finish(root, verb, built, sections, rejected=rejected, input="", **more)
        done[table] = {**facts, "rejected": rejected}
    return done


def _section(config: Published, encoder: str) -> dict[str, Any]:
    """What of the config the rows depend on."""
    section = plain(config)
    for name in ("source", "out", "tables", "bundle", "autoencoder", "workers"):
        section.pop(name)
    return {**section, "encoder": encoder}


def _of_table(unit: ItemsUnit, table: str, sections: Mapping[str, Any]) -> ItemsUnit:
    part = f"{table}/{unit.name}.parquet"
    return replace(unit, part=part, stamp=parts.stamp(sections, table, unit.ids))


def _tables(config: Published, unit: ItemsUnit) -> list[str]:
    """The tables to make: those asked for, or those that the first item has files for."""
    layout, first = LAYOUTS[config.format], int(_ids(unit)[0])
    names = config.table_names
    for table in names:
        if not layout.file(table):
            raise UserError(f"tables={config.tables}: the set {config.format} has no {table}.")
    for table in () if names else ("examples", "latents"):
        name = layout.file(table)
        if name and storage.exists(storage.join(unit.folder, name.format(i=first))):
            names.append(table)
    if not names:
        raise UserError(f"item {first} in {unit.folder} has neither an image nor a latent.")
    return [f"latents-{_digest(config)}" if table == "latents" else table for table in names]


def _digest(config: Published) -> str:
    if config.autoencoder:
        return config.autoencoder
    if not config.bundle:
        raise UserError(
            "whose latents are these? Give bundle=, a folder with their autoencoder, "
            "autoencoder=, a name for it, or tables=examples to leave them."
        )
    from raylarge.models.bundle import load_autoencoder  # diffusers takes seconds to import

    return str(load_autoencoder(storage.absolute(config.bundle)).digest)


def _units(config: Published) -> list[ItemsUnit]:
    """Units of items, scale by scale and folder by folder."""
    layout, source = LAYOUTS[config.format], storage.absolute(config.source)
    units = []
    for scale, mag in enumerate(layout.mags):
        for part in layout.parts(source, mag):
            folder = storage.join(source, layout.folder.format(mag=mag, part=part))
            ids = _listed(folder, layout.grid)
            count = -(-len(ids) // config.unit_items)
            for number in range(count):
                name = f"{scale}-{part:04d}-{number:05d}-of-{count:05d}"
                mine = ids[ids % count == number]
                if len(mine):
                    units.append(
                        ItemsUnit(
                            folder=folder,
                            scale=scale,
                            name=name,
                            tiles=len(mine),
                            ids=_spelled(mine, count),
                        )
                    )
    if not units:
        example = layout.folder.format(mag=layout.mags[0], part=0) + "/" + layout.grid.format(i=0)
        raise UserError(f"there is no set {config.format} at {source}: no file such as {example}.")
    return units


def _listed(folder: str, name: str) -> Ids:
    """Indices of the items whose file stands in a folder, ascending."""
    ending = name.removeprefix("{i}")
    names = (one.name for one in storage.entries(folder))
    stems = (name.removesuffix(ending) for name in names if name.endswith(ending))
    return np.sort(np.array([int(stem) for stem in stems if stem.isdigit()], np.int64))


def _spelled(ids: Ids, step: int) -> dict[str, Any]:
    """Indices in few words: units travel to workers, and a set has millions."""
    every = np.arange(ids[0], ids[-1] + 1, step)
    return {
        "range": [int(ids[0]), int(ids[-1]) + 1, step],
        "but": np.setdiff1d(every, ids).tolist(),
    }


def _ids(unit: ItemsUnit) -> Ids:
    every = np.arange(*unit.ids["range"], dtype=np.int64)
    return np.setdiff1d(every, np.array(unit.ids["but"], np.int64))


class Publishing(Stage):
    """Makes a part of EXAMPLES or LATENTS out of the items of one unit."""

    def __init__(self, config: Published, table: str, width: int) -> None:
        """Hold what to make of the files, and how wide an embedding is."""
        self.kind = getattr(schema, table.upper())
        self._config, self._table, self._width = config, table, width
        self._layout = LAYOUTS[config.format]

    def make(self, unit: ItemsUnit) -> tuple[pa.Table, Facts]:
        """The unit's items by split and key; those that do not fit are named in `rejected`."""
        ids = _ids(unit).tolist()
        with ThreadPoolExecutor(_READERS) as pool:
            items = list(pool.map(partial(self._row, unit), ids))
        rows = [row for row in items if isinstance(row, dict)]
        rejected = [[i, row] for i, row in zip(ids, items, strict=True) if isinstance(row, str)]
        if not rows:
            raise UserError(f"no item of {unit.folder} fits; item {ids[0]}: {items[0]}.")
        table = _as_table(sorted(rows, key=lambda row: (row["split"], row["key"])), self.kind)
        groups = bucket.groups(table, self._config.group_rows)
        shape = {"shape": list(layouts.LATENT)} if self._table == "latents" else {}
        return table, {"groups": groups, "rejected": rejected, **shape}

    def _row(self, unit: ItemsUnit, i: int) -> dict[str, Any] | str:
        """An item's row, or why there is none."""
        folder, scale = unit.folder, unit.scale
        try:
            grid = layouts.grid(self._layout, folder, i, scale, self._width)
            content = self._content(folder, i)
        except Unfit as error:
            return str(error)
        slide_id, split = self._block(scale, i // self._config.block_items)
        return {
            "key": shard.key(slide_id, scale, 0, i << scale),
            "slide_id": slide_id,
            "patient_id": slide_id,
            "split": split,
            "scale": scale,
            "row": 0,
            "column": i << scale,
            "labels": [],
            "grid": grid.ravel(),
            "grid_rows": grid.shape[0],
            "grid_columns": grid.shape[1],
            **content,
        }

    def _content(self, folder: str, i: int) -> dict[str, Any]:
        """What EXAMPLES and LATENTS do not share."""
        if self._table == "examples":
            return {"tissue": None, "image": layouts.image(self._layout, folder, i)}
        return {"flip": 0, "latent": layouts.latent(self._layout, folder, i).ravel()}

    def _block(self, scale: int, block: int) -> tuple[str, str]:
        """Pseudonym and split of a block of indices."""
        config = self._config
        slide_id = slide_index.pseudonym(_SALT, f"{config.format} {scale} {block}")
        split = slide_index.by_hash(slide_id, config.val_fraction, config.test_fraction)
        return slide_id, config.split if split == "train" else split


def _as_table(rows: Sequence[Mapping[str, Any]], kind: pa.Schema) -> pa.Table:
    """Rows as a table; lists of halves are laid end to end, which saves a Python float for each."""
    columns = {}
    for field in kind:
        values = [row[field.name] for row in rows]
        if field.type == pa.list_(pa.float16()):
            ends = np.cumsum([0, *map(len, values)]).astype(np.int32)
            columns[field.name] = pa.ListArray.from_arrays(ends, pa.array(np.concatenate(values)))
        else:
            columns[field.name] = pa.array(values, field.type)
    return pa.table(columns)
