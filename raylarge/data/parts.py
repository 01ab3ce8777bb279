"""How a data folder is laid out, and when a part of it counts as done.

    DATA/slides.json   names.json        the slides by pseudonym; which file each one is (private)
    DATA/tiles/<slide_id>.parquet        one part per slide; qc/<slide_id>.png beside it
    DATA/embeddings|blocks/<slide_id>-<block>.parquet     one part per block of rows of a slide
    DATA/examples|latents-<digest>|.../<bucket>.parquet   one part per hash bucket of blocks
    DATA/<verb>.json                     written last: config, counts, parts
    DATA/failed.parquet                  what could not be made, and why

A part is one object, whole or absent; its name follows from its unit, and its footer holds a
stamp of all that it depends on. A rerun makes only parts whose stamp differs.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from raylarge import schema, storage, tables
from raylarge.data import pipeline
from raylarge.data.pipeline import ExecutorConfig, Facts
from raylarge.data.units import Unit
from raylarge.errors import UserError


class Stage(ABC):
    """Makes the parts of one verb; made once per process, before its first missing part."""

    kind: pa.Schema

    @abstractmethod
    def make(self, unit: Any) -> tuple[pa.Table, Facts]:
        """A unit's table, and what is worth saying about it.

        `groups`, where it is said, is [scale, split, rows] of each row group to be written.
        """


@dataclass(frozen=True)
class BuildResult:
    """What became of a verb's units: facts of the parts that stand, and what failed."""

    facts: list[Facts]
    failed: list[dict[str, str]]

    @property
    def lost(self) -> set[str]:
        """The slides of which a part failed."""
        return {one["slide_id"] for one in self.failed}


class PartBuilder:
    """The work of a unit: skip a part that stands, else make and write it."""

    def __init__(self, root: str, make_stage: Callable[[], Stage]) -> None:
        """Nothing heavy is loaded until a part is missing."""
        self._root = root
        self._make_stage = make_stage
        self._stage: Stage | None = None

    def __call__(self, unit: Unit) -> Facts:
        """The facts of the unit's part, with `made` telling whether it was made just now."""
        stored = standing(self._root, unit.part)
        if stored.get("stamp") == unit.stamp:
            return {**stored, "made": False}
        if self._stage is None:
            self._stage = self._make_stage()
        table, facts = self._stage.make(unit)
        table = schema.check(table, self._stage.kind)
        common: Facts = {"part": unit.part, "stamp": unit.stamp}
        if unit.tiles is not None:
            common["tiles"] = unit.tiles
        facts = {**facts, **common, **_counts(table)}
        metadata = {**table.schema.metadata, "facts": storage.as_json(facts)}
        table = table.replace_schema_metadata(metadata)
        groups = [rows for _, _, rows in facts["groups"]] if "groups" in facts else None
        storage.write_table(storage.join(self._root, unit.part), table, groups)
        return {**facts, "made": True}


def build(
    root: str,
    units: Sequence[Unit],
    make_stage: Callable[[], Stage],
    executor: ExecutorConfig,
    verb: str,
) -> BuildResult:
    """Make what is missing of a verb's parts.

    Args:
        root: the data folder.
        units: the parts.
        make_stage: makes the stage; picklable.
        executor: who makes them.
        verb: whose manifest, where it exists, tells without a look which parts are done.
    """
    before = tables.read_manifest(root, verb)
    done = _listed(root, before, units)
    rest = [unit for unit in units if unit.part not in done]
    if {unit.part for unit in rest} & {one["part"] for one in before.get("parts", [])}:
        # The table is not whole from now on, but its settings still bind who runs next.
        storage.write_json(_unfinished(root, verb), {"config": before["config"]})
        storage.remove(storage.join(root, f"{verb}.json"))
    answers = pipeline.run(
        rest, partial(PartBuilder, root, make_stage), executor, verb.split("-")[0]
    )
    failed = []
    for unit, facts in zip(rest, answers, strict=True):
        if "failed" in facts:
            failed.append({"slide_id": unit.slide_id, "part": unit.part, "reason": facts["failed"]})
        else:
            done[unit.part] = facts
    return BuildResult([done[unit.part] for unit in units if unit.part in done], failed)


def standing(root: str, part: str) -> Facts:
    """The facts in the footer of a part; nothing where it does not stand."""
    path = storage.join(root, part)
    if not storage.exists(path):
        return {}
    facts: Facts = json.loads(storage.read_metadata(path)[b"facts"])
    return facts


def stamp(*inputs: Any) -> str:
    """A short name for everything that a part depends on (JSON), the schema's version included."""
    return storage.digest(json.dumps([schema.VERSION, *inputs], sort_keys=True).encode())


def refuse_mixing(
    root: str,
    sections: Mapping[str, Mapping[str, Any]],
    verbs: Sequence[str] = ("tile", "embed", "shard"),
) -> None:
    """Refuse a folder whose verbs were made with another config, be they finished or cut short.

    Raises:
        UserError: naming the first key that differs, and the cure.
    """
    for verb in verbs:
        before, file = tables.read_manifest(root, verb), f"{verb}.json"
        if not before and storage.exists(path := _unfinished(root, verb)):
            before, file = storage.read_json(path), path.rsplit("/", 1)[-1]
        begun = before.get("config", {})
        for section in sections.keys() & begun.keys():
            new = storage.without_folders(json.loads(json.dumps(sections[section])))
            old = storage.without_folders(begun[section])
            for key in sorted(old.keys() | new.keys()):
                if old.get(key) != new.get(key):
                    what = root if verb in ("tile", "embed") else f"{root}/{file}"
                    raise UserError(
                        f"{root} was made with {section}.{key}={old.get(key)}, not {new.get(key)}; "
                        f"choose another out= or delete {what}."
                    )


def finish(
    root: str, verb: str, built: BuildResult, config: Mapping[str, Mapping[str, Any]], **more: Any
) -> Facts:
    """Write a verb's manifest, the last thing it does; what a report wants to know of it."""
    facts = built.facts
    passing = ("made", "again")
    parts = [{key: value for key, value in one.items() if key not in passing} for one in facts]
    sizes = _sizes(root, [one["part"] for one in parts])
    parts = [{**one, "bytes": sizes.get(one["part"], 0)} for one in parts]
    counts = _sum([one["counts"] for one in facts])
    document = {
        "verb": verb,
        "version": schema.VERSION,
        "config": storage.without_folders(config),
        "rows": sum(one["rows"] for one in facts),
        "counts": counts,
        "digest": stamp(parts),
        "lost": sorted(built.lost),
        "parts": parts,
        **more,
    }
    _record(root, verb, built.failed)
    path = storage.join(root, f"{verb}.json")
    storage.write_json(path, document)
    storage.remove(_unfinished(root, verb))
    new_parts = sum(one["made"] for one in facts)
    rows = {"rows": document["rows"], "counts": counts, "failed": len(built.failed)}
    tiles = sum(one.get("tiles", 0) for one in facts if one["made"])
    again = sum(one.get("again", 0) for one in facts)
    more_work = {"parts": len(parts), "made": new_parts, "again": again, "tiles": tiles}
    return {**rows, **more_work, "output": path}


def _record(root: str, verb: str, failed: Sequence[Mapping[str, str]]) -> None:
    """Put a verb's failures into failed.parquet, in the place of those of its last run."""
    path = storage.join(root, "failed.parquet")
    before = storage.read_table(path).to_pylist() if storage.exists(path) else []
    rows = [row for row in before if row["verb"] != verb]
    rows += [{"verb": verb, **one} for one in failed]
    if rows != before:
        table = pa.Table.from_pylist(rows, schema=pa.schema(list(schema.FAILED)))
        storage.write_table(path, schema.check(table, schema.FAILED))


def manifest(root: str, verb: str, needed_by: str) -> dict[str, Any]:
    """Return the manifest of a verb that another one builds on.

    Raises:
        UserError: the verb has not finished in this folder, or its manifest is damaged.
    """
    if not (document := tables.read_manifest(root, verb)):
        path = storage.join(root, f"{verb}.json")
        raise UserError(f"{needed_by} needs {path}; run verbs={verb} with this out= first.")
    return document


def _unfinished(root: str, verb: str) -> str:
    """Where a table's settings stand while its parts are replaced and it has no manifest."""
    return storage.join(root, f"unfinished-{verb}.json")


def _listed(root: str, before: Facts, units: Sequence[Unit]) -> dict[str, Facts]:
    """Facts of the parts that a manifest lists, as far as they stand."""
    if not units or not before:
        return {}
    sizes = _sizes(root, [unit.part for unit in units])
    stamps = {unit.part: unit.stamp for unit in units}
    return {
        one["part"]: {**one, "made": False}
        for one in before["parts"]
        if sizes.get(one["part"]) == one.get("bytes") and one["stamp"] == stamps.get(one["part"])
    }


def _sizes(root: str, parts: Sequence[str]) -> dict[str, int]:
    """The sizes in bytes of all parts that stand beside some parts of a verb."""
    if not parts:
        return {}
    folder = parts[0].rsplit("/", 1)[0]
    sizes = storage.sizes(storage.join(root, folder))
    return {f"{folder}/{name}": size for name, size in sizes.items()}


def _sum(counts: Sequence[Mapping[str, Mapping[str, int]]]) -> dict[str, dict[str, int]]:
    """Rows per scale and split over all parts."""
    total: Counter[tuple[str, str]] = Counter()
    for one in counts:
        total.update({(scale, split): n for scale, by in one.items() for split, n in by.items()})
    out: dict[str, dict[str, int]] = {}
    for (scale, split), count in sorted(total.items()):
        out.setdefault(scale, {})[split] = count
    return out


def _counts(table: pa.Table) -> Facts:
    """Rows, and rows per scale and split (of TILES: of the kept ones)."""
    if "scale" not in table.column_names:
        return {"rows": table.num_rows, "counts": {}}
    kept = table.filter(table["kept"]) if "kept" in table.column_names else table
    counts: dict[str, dict[str, int]] = {}
    pairs = zip(kept["scale"].to_pylist(), kept["split"].to_pylist(), strict=True)
    for (scale, split), count in sorted(Counter(pairs).items()):
        counts.setdefault(str(scale), {})[split] = count
    return {"rows": table.num_rows, "counts": counts}
