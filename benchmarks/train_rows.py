"""Select rows of large tables into a small data folder, and train on them.

    EXAMPLES, LATENTS -few-> the same two tables with so many rows of each split and scale
    bundle -with_autoencoder_of-> a bundle to train into -Study.learned-> its trained parts

The source tables and bundle are only read.

Rows are spread evenly over the tables, unmirrored, and mixed, so that parts of few slides do not
come one after the other.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.presets import overrides
from raylarge import config as configuration
from raylarge import schema, storage
from raylarge.errors import UserError
from raylarge.models import bundle as bundles
from raylarge.models import bundle_parts
from raylarge.models.bundle import Bundle
from raylarge.train.ingest import latents_table
from raylarge.train.launch import Train, train
from raylarge.train.rows import RowGroup, Table, manifest_groups

GROUP = 64  # rows of a row group
Counts = Mapping[str, Mapping[int, int]]
"""Rows by split and scale."""


@dataclass(frozen=True)
class Study:
    """Small trainings on the same rows.

    Attributes:
        data: the folder of the rows.
        bundle: whose autoencoder made their latents.
        work: folder of the trainings; one that is there already is not done again.
        recipe: what all share, over the preset `tiny`.
    """

    data: str
    bundle: str
    work: str
    recipe: Mapping[str, Any] = field(default_factory=dict)

    @property
    def latents(self) -> str:
        """The name of the table of LATENTS."""
        return latents_table(self.data, self.bundle)

    def learned(self, name: str, model: str = "ldm", **more: Any) -> str:
        """Train a model in the bundle of that name; its folder."""
        out = with_autoencoder_of(self.bundle, str(Path(self.work, name)))
        where = {"model": model, "data": self.data, "out": out, "track": "none", "validate": 0}
        layers = (overrides(model, "tiny"), where, self.recipe, more)
        train(configuration.build(Train, *layers))
        return out

    def trained(self, name: str, **more: Any) -> Bundle:
        """Train a latent diffusion model and load it."""
        return bundles.load(self.learned(name, "ldm", **more))


def few(data: str, bundle: str, out: str, counts: Counts) -> None:
    """Write a small data folder, unless it stands already.

    Args:
        data: the tables.
        bundle: whose autoencoder made the latents.
        out: the folder to write.
        counts: of rows to select.

    Raises:
        UserError: no such tables, or fewer rows than are asked for.
    """
    name = latents_table(data, bundle)
    listed = {split: {str(k): n for k, n in some.items()} for split, some in counts.items()}
    latents = storage.join(out, f"encode-{name.removeprefix('latents-')}.json")
    if storage.exists(latents):
        if storage.read_json(latents)["counts"] != listed:
            raise UserError(f"{out} contains other rows; give another work=, or remove it.")
        return
    tables = [Table(data, "examples", ("image",)), Table(data, name, ("latent",))]
    groups = [
        rows
        for split, some in sorted(counts.items())
        for k, n in sorted(some.items())
        for rows in _take(tables, split, k, n)
    ]
    for i, table in enumerate(tables):
        _write(table, out, [pair[i] for pair in groups], listed)


def with_autoencoder_of(bundle: str, out: str) -> str:
    """Create a bundle with the autoencoder of another, unless it exists; return its folder."""
    bundle = bundle_parts.resolve(bundle)
    if not Path(out, bundle_parts.INDEX).exists():
        shutil.copytree(Path(bundle, "vae"), Path(out, "vae"), dirs_exist_ok=True)
        index = storage.read_json(storage.join(bundle, bundle_parts.INDEX))
        source = index["raylarge"]
        facts = {name: source[name] for name in ("format", "patch_px") if name in source}
        facts["digests"] = {"vae": source["digests"]["vae"]}
        entries = {name: value for name, value in index.items() if name[0] == "_" or name == "vae"}
        storage.write_json(storage.join(out, bundle_parts.INDEX), entries | {"raylarge": facts})
    return out


def _take(tables_: Sequence[Table], split: str, k: int, count: int) -> list[tuple[pa.Table, ...]]:
    """Select shuffled rows of one split and scale of both tables, in row groups.

    Raises:
        UserError: the tables hold fewer.
    """
    groups = manifest_groups(tables_, split, (k,))[k]
    edges = np.cumsum([0, *(group.rows for group in groups)])
    if count > edges[-1]:
        raise UserError(f"{tables_[0].root} has {edges[-1]} rows of {split} at scale {k}: {count}?")
    places = np.arange(count) * edges[-1] // count
    at = np.searchsorted(edges, places, side="right") - 1
    parts = [
        _read(tables_, groups[i], places[at == i] - edges[i]) for i in np.unique(at)
    ]  # fmt: skip
    order = np.random.default_rng(0).permutation(count)
    whole = [pa.concat_tables(rows).take(order) for rows in zip(*parts, strict=True)]
    starts = range(0, count, GROUP)
    return [tuple(table.slice(start, GROUP) for table in whole) for start in starts]


def _read(tables_: Sequence[Table], group: RowGroup, rows: np.ndarray) -> tuple[pa.Table, ...]:
    """Read some rows of a row group of EXAMPLES, and their unmirrored latents."""
    examples, latents = tables_
    lead = _rows(examples, group.part, [group.number]).take(rows)
    others = _rows(latents, group.part, latents.like(group.part, group))
    others = others.filter(pc.equal(others["flip"], 0))
    return lead, others.take(pc.index_in(lead["key"], value_set=others["key"]))


def _rows(table: Table, part: int, groups: Sequence[int]) -> pa.Table:
    path = storage.join(table.root, table.parts[part]["part"])
    return storage.read_rows(path, groups, table.kind.names)


def _write(table: Table, out: str, groups: Sequence[pa.Table], counts: dict[str, Any]) -> None:
    """Write one part, and its manifest."""
    rows = pa.concat_tables(groups).cast(table.kind).replace_schema_metadata(table.kind.metadata)
    part = f"{table.name}/00000-of-00001.parquet"
    storage.write_table(storage.join(out, part), rows, [len(group) for group in groups])
    listed = [[group[name][0].as_py() for name in ("scale", "split")] for group in groups]
    facts = {
        "part": part,
        "rows": len(rows),
        "counts": {k: {s: counts[s].get(k, 0) for s in counts} for s in counts for k in counts[s]},
        "groups": [[*one, len(group)] for one, group in zip(listed, groups, strict=True)],
    }
    facts |= {name: table.parts[0][name] for name in ("shape",) if name in table.parts[0]}
    source = table.made
    tile = source.get("config", {}).get("tile", {})
    manifest = {
        "verb": source["verb"],
        "version": schema.VERSION,
        "parts": [facts],
        "rows": len(rows),
        "counts": counts,
        "digest": storage.digest(str(rows["key"].to_pylist()).encode(), table.digest.encode()),
        "patch_px": source["patch_px"],
        "encoder": source["encoder"],
        "config": {"tile": {"base_mpp": tile.get("base_mpp")}},
    }
    name = "shard" if table.name == "examples" else table.name.replace("latents", "encode")
    storage.write_json(storage.join(out, f"{name}.json"), manifest)
