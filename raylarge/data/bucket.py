"""Blocks of slides, mixed into hash buckets: the files of EXAMPLES, made for shuffled reading.

A block goes to the bucket that a hash of its name says, so a bucket holds blocks of many slides.
Inside, rows lie by scale and split and then by key, which is a hash too, in small row groups that
never mix scales or splits. Rows of blocks that did not change are taken over from the bucket that
stands, so slides may be added at little cost.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raylarge import schema, storage
from raylarge.data import parts
from raylarge.data.parts import BuildResult, Stage
from raylarge.data.pipeline import ExecutorConfig, Facts
from raylarge.data.units import BlockUnit, BucketUnit

_ORDER = [(name, "ascending") for name in ("scale", "split", "key")]


class BucketPlan:
    """Which block belongs to which bucket, and which of both are to be made."""

    def __init__(self, root: str, blocks: Sequence[BlockUnit], buckets: int) -> None:
        """Assign the blocks; nothing is read but the footers of buckets that stand."""
        self._root, self._blocks, self._buckets = root, list(blocks), buckets
        sorted_in: dict[int, list[BlockUnit]] = defaultdict(list)
        for block in blocks:
            sorted_in[_bucket(block.part, buckets)].append(block)
        self._units = [self._unit(number, sorted_in[number]) for number in sorted(sorted_in)]

    def _unit(self, number: int, blocks: Sequence[BlockUnit]) -> BucketUnit:
        return BucketUnit(
            part=f"examples/{number:05d}-of-{self._buckets:05d}.parquet",
            stamp=parts.stamp([block.stamp for block in blocks]),
            blocks=blocks,
        )

    def missing_blocks(self) -> list[BlockUnit]:
        """The blocks that no bucket holds as they should be."""
        stamps: dict[str, str] = {}
        with ThreadPoolExecutor(16) as pool:
            for facts in pool.map(lambda unit: parts.standing(self._root, unit.part), self._units):
                stamps.update(facts.get("blocks", {}))
        return [block for block in self._blocks if stamps.get(block.part) != block.stamp]

    def without(self, slides: Iterable[str]) -> BucketPlan:
        """The plan that leaves some slides out."""
        lost = set(slides)
        if not lost:
            return self
        rest = [block for block in self._blocks if block.slide_id not in lost]
        return BucketPlan(self._root, rest, self._buckets)

    def build(self, group_rows: int, executor: ExecutorConfig) -> BuildResult:
        """Make the buckets that are missing."""
        make_stage = partial(BucketStage, self._root, group_rows)
        return parts.build(self._root, self._units, make_stage, executor, "shard")

    def sweep(self) -> None:
        """Remove the blocks, whose rows are in the buckets, and buckets without blocks."""
        here = {storage.join(self._root, unit.part) for unit in self._units}
        there = storage.children(storage.join(self._root, "examples"), "*.parquet")
        storage.remove_all([path for path in there if path not in here])
        storage.remove_all(storage.children(storage.join(self._root, "blocks"), "*.parquet"))


class BucketStage(Stage):
    """Makes one bucket of EXAMPLES."""

    kind = schema.EXAMPLES

    def __init__(self, root: str, group_rows: int) -> None:
        """Hold where the data lies."""
        self._root, self._group_rows = root, group_rows

    def make(self, unit: BucketUnit) -> tuple[pa.Table, Facts]:
        """The rows of the bucket's blocks, in their order."""
        standing = parts.standing(self._root, unit.part).get("blocks", {})
        old = None
        if any(standing.get(block.part) == block.stamp for block in unit.blocks):
            old = storage.read_table(storage.join(self._root, unit.part))
        blocks = []
        for block in unit.blocks:
            path = storage.join(self._root, block.part)
            if old is not None and standing.get(block.part) == block.stamp:
                blocks.append(schema.check(_of_block(old, block), self.kind))
            else:
                blocks.append(schema.check(storage.read_table(path), self.kind))
        counted = groups(pa.concat_tables(blocks), self._group_rows)
        stamps = {block.part: block.stamp for block in unit.blocks}
        table = mixed(blocks, [rows for _, _, rows in counted])
        return table, {"blocks": stamps, "groups": counted}


def mixed(tables: Sequence[pa.Table], sizes: Sequence[int]) -> pa.Table:
    """The rows of several tables by scale, split and key, gathered row group by row group.

    A column of a bucket may hold more than the 2 GiB that Arrow sorts or gathers in one piece.
    """
    keys = pa.concat_tables([table.select([name for name, _ in _ORDER]) for table in tables])
    order = pc.sort_indices(keys, sort_keys=_ORDER).to_numpy().astype(np.int64)
    starts = np.cumsum([0, *map(len, tables)])
    which = np.searchsorted(starts[1:], order, side="right")
    gathered = [tables[0].slice(0, 0)]
    for group in np.split(np.arange(len(order)), np.cumsum(sizes, dtype=np.int64)[:-1]):
        pieces, came = [], []
        for i in np.unique(which[group]):
            mine = np.flatnonzero(which[group] == i)
            pieces.append(tables[i].take(pa.array(order[group][mine] - starts[i])))
            came.append(mine)
        if pieces:
            back = pa.array(np.argsort(np.concatenate(came)))
            gathered.append(pa.concat_tables(pieces).combine_chunks().take(back))
    return pa.concat_tables(gathered)


def groups(table: pa.Table, most: int) -> list[list[Any]]:
    """[scale, split, rows] of the row groups of a table's rows by scale and split."""
    counted = table.group_by(["scale", "split"]).aggregate([([], "count_all")])
    runs = counted.sort_by([("scale", "ascending"), ("split", "ascending")]).to_pylist()
    row_groups: list[list[Any]] = []
    for run in runs:
        left = run["count_all"]
        while left:
            row_groups.append([run["scale"], run["split"], min(most, left)])
            left -= min(most, left)
    return row_groups


def _bucket(name: str, buckets: int) -> int:
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % buckets


def _of_block(table: pa.Table, block: BlockUnit) -> pa.Table:
    top, bottom = block.rows
    row = table["row"]
    inside = pc.and_(pc.greater_equal(row, top), pc.less(row, bottom))
    return table.filter(pc.and_(inside, pc.equal(table["slide_id"], block.slide_id)))
