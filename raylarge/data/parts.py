"""How a data folder is laid out, and when a part of it counts as done.

    DATA/slides.json                      the slides: path, pseudonym, patient, split, size
    DATA/tiles/<slide_id>.parquet         one part per slide
    DATA/embeddings|examples|latents-<digest>/<slide_id>-<block>.parquet
    DATA/<verb>.json                      written last: config, counts, parts

A part is written whole under a name that follows from its unit, and carries a stamp of all
that it depends on. A rerun skips parts whose stamp is right and makes the others anew, so
no two configurations mix, and any number of workers makes the same bytes.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from raylarge import schema, storage
from raylarge.data import pipeline
from raylarge.data.pipeline import Facts, Unit
from raylarge.errors import UserError


class Maker(ABC):
    """Makes the parts of one verb; made once per process, before its first missing part."""

    kind: pa.Schema

    @abstractmethod
    def make(self, unit: Unit) -> tuple[pa.Table, Facts]:
        """A unit's table, and what is worth saying about it."""


class PartWork:
    """The work of a unit: skip a part that stands, else make and write it."""

    def __init__(self, root: str, make_maker: Callable[[], Maker]) -> None:
        """Nothing heavy is loaded until a part is missing."""
        self._root = root
        self._make_maker = make_maker
        self._maker: Maker | None = None

    def __call__(self, unit: Unit) -> Facts:
        """The facts of the unit's part, with `made` telling whether it was made just now."""
        path = storage.join(self._root, unit["part"])
        standing = _facts_of(path) if storage.exists(path) else {}
        if standing.get("stamp") == unit["stamp"]:
            return {**standing, "made": False}
        if self._maker is None:
            self._maker = self._make_maker()
        table, facts = self._maker.make(unit)
        table = schema.check(table, self._maker.kind)
        facts = {**facts, "part": unit["part"], "stamp": unit["stamp"], **_counts(table)}
        metadata = {**table.schema.metadata, "facts": json.dumps(facts, sort_keys=True)}
        storage.write_table(path, table.replace_schema_metadata(metadata))
        return {**facts, "made": True}


def build(
    root: str, units: Sequence[Unit], maker: Callable[[], Maker], workers: int | None, verb: str
) -> list[Facts]:
    """Make what is missing of a verb's parts; the facts of all of them, in order of the units.

    Args:
        root: the data folder.
        units: each with `part` (its path below the folder), `stamp`, and what the maker wants.
        maker: makes the maker; picklable.
        workers: see `pipeline.run`.
        verb: whose manifest, where it exists, tells without a look which parts are done.
    """
    done = _listed(root, verb, units)
    rest = [unit for unit in units if unit["part"] not in done]
    made = pipeline.run(rest, partial(PartWork, root, maker), workers, verb.split("-")[0])
    done.update({facts["part"]: facts for facts in made})
    return [done[unit["part"]] for unit in units]


def stamp(*inputs: Any) -> str:
    """A short name for everything that a part depends on (JSON), the schema's version included."""
    return storage.digest(json.dumps([schema.VERSION, *inputs], sort_keys=True).encode())


def refuse_mixing(root: str, sections: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a folder whose finished verbs were made with another config.

    Raises:
        UserError: naming the first key that differs, and the cure.
    """
    for verb in ("tile", "embed", "shard"):
        path = storage.join(root, f"{verb}.json")
        begun = storage.read_json(path)["config"] if storage.exists(path) else {}
        for section in sections.keys() & begun.keys():
            old, new = begun[section], json.loads(json.dumps(sections[section]))
            for key in sorted(old.keys() | new.keys()):
                if old.get(key) != new.get(key):
                    raise UserError(
                        f"{root} was made with {section}.{key}={old.get(key)}, not {new.get(key)}; "
                        f"choose another out= or delete {root}."
                    )


def finish(
    root: str,
    verb: str,
    facts: Sequence[Facts],
    config: Mapping[str, Mapping[str, Any]],
    **more: Any,
) -> Facts:
    """Write a verb's manifest, the last thing it does; what a report wants to know of it."""
    parts = [{key: value for key, value in one.items() if key != "made"} for one in facts]
    counts = _sum([one["counts"] for one in facts])
    document = {
        "verb": verb,
        "version": schema.VERSION,
        "config": config,
        "rows": sum(one["rows"] for one in facts),
        "counts": counts,
        "digest": stamp(parts),
        "parts": parts,
        **more,
    }
    path = storage.join(root, f"{verb}.json")
    storage.write_json(path, document)
    made = sum(one["made"] for one in facts)
    rows = {"rows": document["rows"], "counts": counts}
    return {**rows, "parts": len(parts), "made": made, "output": path}


def manifest(root: str, verb: str, wanted_by: str) -> dict[str, Any]:
    """The manifest of a verb that another one builds on.

    Raises:
        UserError: the verb has not finished in this folder.
    """
    path = storage.join(root, f"{verb}.json")
    if not storage.exists(path):
        raise UserError(f"{wanted_by} needs {path}; run verbs={verb} with this out= first.")
    found: dict[str, Any] = storage.read_json(path)
    return found


def _listed(root: str, verb: str, units: Sequence[Unit]) -> dict[str, Facts]:
    """Facts of the parts that the manifest lists, as far as they stand."""
    path = storage.join(root, f"{verb}.json")
    if not units or not storage.exists(path):
        return {}
    folder = units[0]["part"].rsplit("/", 1)[0]
    standing = {
        f"{folder}/{name.rsplit('/', 1)[-1]}"
        for name in storage.listing(storage.join(root, folder, "*.parquet"))
    }
    stamps = {unit["part"]: unit["stamp"] for unit in units}
    return {
        one["part"]: {**one, "made": False}
        for one in storage.read_json(path)["parts"]
        if one["part"] in standing and one["stamp"] == stamps.get(one["part"])
    }


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


def _facts_of(path: str) -> Facts:
    """The facts in a part's metadata; only its footer is read."""
    fs, root = fsspec.core.url_to_fs(path)
    with fs.open(root, "rb") as stream:
        facts: Facts = json.loads(pq.read_schema(stream).metadata[b"facts"])
    return facts
