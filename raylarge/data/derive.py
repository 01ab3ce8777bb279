"""What verbs after `shard` share: one part of EXAMPLES in, one part of another table out.

The parts bear the names of the buckets they come from, with the same rows in the same order and
the same row groups (of LATENTS: as often as there are flips), so tables can be read side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa

from raylarge import storage, tables
from raylarge.data import parts
from raylarge.data.parts import Stage
from raylarge.data.pipeline import ExecutorConfig, Facts
from raylarge.data.units import DerivedUnit

WHERE = ("key", "slide_id", "patient_id", "split", "scale", "row", "column")


def run(
    root: str,
    table: str,
    make_stage: Callable[[], Stage],
    executor: ExecutorConfig,
    config: Mapping[str, Mapping[str, Any]],
    source: str = "shard",
) -> Facts:
    """Derive a table from EXAMPLES (or from another table made like this) and write `<verb>.json`.

    Args:
        root, table: the data folder, and the table's, `<name>-<digest of what makes it>`.
        make_stage: makes the stage; `unit.source` is the part that it reads.
        executor: see `pipeline.run`.
        config: sections of the verb, for its manifest and its stamps.
        source: whose parts are read: `shard`, or another verb's manifest.

    Returns:
        What a report wants, and `table`: the folder.

    Raises:
        UserError: the source has not run.
    """
    verb = tables.verb(table)
    manifest = parts.manifest(root, source, verb.split("-")[0])
    parts.refuse_mixing(root, config, [verb])
    units = [
        DerivedUnit(
            part=f"{table}/{one['part'].rsplit('/', 1)[-1]}",
            stamp=parts.stamp(config, table, one["stamp"]),
            tiles=one["rows"],
            source=one["part"],
            groups=one["groups"],
        )
        for one in manifest["parts"]
    ]
    built = parts.build(root, units, make_stage, executor, verb)
    more = {"input": manifest["digest"], **{key: manifest[key] for key in ("encoder", "patch_px")}}
    done = parts.finish(root, verb, built, {**manifest["config"], **config}, **more)
    return {**done, "table": storage.join(root, table)}


def where(table: pa.Table) -> dict[str, pa.ChunkedArray]:
    """The columns of a row that say which example it is."""
    return {name: table[name] for name in WHERE}
