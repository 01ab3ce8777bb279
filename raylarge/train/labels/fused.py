"""FEATURES of several scales as one array, slide by slide: what multiple-instance learning reads.

    where each patch is -> order of the finest scale's, who covers whom   (at once)
    features -> their places in one array, part by part                   (on first use)

A patch stands with its own feature and, end to end with it, that of the patch of each coarser
scale that covers it; of several (`tile.crops`) the one whose centre is nearest. Two readings, so
that memory holds the array once, and only where it is used.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float16, Int
from scipy.spatial import KDTree

from raylarge import tables
from raylarge.errors import UserError
from raylarge.train.labels import labelled

_SPLITS = ("train", "val", "test")
NOBODY = -1


@dataclass(frozen=True)
class Fused:
    """The patches of some slides, those of one slide together, row by row.

    Attributes:
        slides, patients: the pseudonyms, slides sorted.
        test: whether a slide is of the split `test`.
        starts: where each slide's patches begin; and the end.
        source: the row, among those taken, of a patch's feature at each scale; `NOBODY` where no
            patch of that scale covers it.
        width: of one feature.
        root, where, taken: which rows of which table are read.
    """

    slides: tuple[str, ...]
    patients: tuple[str, ...]
    test: Bool[np.ndarray, " slides"]
    starts: Int[np.ndarray, " edges"]
    source: Int[np.ndarray, "n scales"]
    width: int
    root: str
    where: labelled.Where
    taken: Bool[np.ndarray, " rows"]

    def __len__(self) -> int:
        return len(self.source)

    @property
    def channels(self) -> int:
        """Of the features of all scales together."""
        return self.width * self.source.shape[1]

    @cached_property
    def lacking(self) -> Bool[np.ndarray, "n scales"]:
        """Where there is no feature."""
        return self.source == NOBODY

    @cached_property
    def features(self) -> Float16[np.ndarray, "n F"]:
        """Of each patch, scale by scale, raw; zeros where there is none.

        Raises:
            UserError: features that are no numbers, or not of one width.
        """
        gathered = np.zeros((len(self), self.source.shape[1], self.width), np.float16)
        orders = [np.argsort(rows, kind="stable") for rows in self.source.T]
        ordered = [rows[order] for rows, order in zip(self.source.T, orders, strict=True)]
        start = read = 0
        for table in labelled.pieces(self.root, self.where, ["feature"]):
            found = _values(table, self.width)
            if not np.isfinite(found).all():
                raise UserError(f"{self.where[0]} in {self.root} has features that are no numbers.")
            found, read = found[self.taken[read : read + len(found)]], read + len(found)
            for i, (order, rows) in enumerate(zip(orders, ordered, strict=True)):
                mine = slice(*np.searchsorted(rows, [start, start + len(found)]))
                gathered[order[mine], i] = found[rows[mine] - start]
            start += len(found)
        return gathered.reshape(len(self), -1)


def read(root: str, name: str, scales: Sequence[int], slides: Collection[str], gib: float) -> Fused:
    """Find the patches of a table of FEATURES.

    Args:
        root, name: the data folder and the table.
        scales: the finest, whose patches count, and those that go with it.
        slides: others are left out.
        gib: the most memory, in GiB, that the features may take.

    Raises:
        UserError: no such scale, none of the slides, or too much for the memory.
    """
    where = (name, tuple(scales), _SPLITS)
    found = _Places.read(root, where, slides)
    fine = found.ordered(np.flatnonzero(found.scale == scales[0]))
    if not len(fine):
        raise UserError(
            f"{name} in {root} has no patch of scale {scales[0]} of a labelled slide; choose other "
            f"mil.scales=, or take features at that scale."
        )
    source = np.stack([fine, *(found.covering(fine, k, scales[0]) for k in scales[1:])], axis=1)
    # Slides that have patches at coarser scales alone make no bag.
    present, starts = np.unique(found.slide[fine], return_index=True)
    return Fused(
        slides=tuple(found.slides[i] for i in present),
        patients=tuple(found.patients[i] for i in present),
        test=np.array([found.test[i] for i in present]),
        starts=np.append(starts, len(fine)),
        source=source,
        width=_width(root, where, source.size, gib),
        root=root,
        where=where,
        taken=found.taken,
    )


@dataclass(frozen=True)
class _Places:
    """Where the rows are that are read, in the table's order."""

    slides: list[str]
    patients: list[str]
    test: list[bool]
    taken: Bool[np.ndarray, " rows"]
    slide: Int[np.ndarray, " n"]
    scale: Int[np.ndarray, " n"]
    row: Int[np.ndarray, " n"]
    column: Int[np.ndarray, " n"]

    @staticmethod
    def read(root: str, where: labelled.Where, slides: Collection[str]) -> _Places:
        """All but the features."""
        columns = ("slide_id", "patient_id", "split", "scale", "row", "column")
        order = sorted(slides)
        wanted = pa.array(order, pa.string())
        who: dict[str, tuple[str, bool]] = {}
        blocks: list[list[np.ndarray]] = []
        for table in labelled.pieces(root, where, columns):
            index = pc.index_in(table["slide_id"], wanted).fill_null(NOBODY).to_numpy()
            names = table.select(["slide_id", "patient_id", "split"])
            for slide, patient, split in zip(*_distinct(names), strict=True):
                before = who.get(slide, ("", False))[1]
                who[slide] = (patient, before or split == "test")
            numbers = [table[name].to_numpy().astype(np.int64) for name in columns[3:]]
            blocks.append([index, *numbers])
        slide, *numbers = [np.concatenate(one) for one in zip(*blocks, strict=True)] or [
            np.zeros(0, np.int64)
        ] * 4
        taken = slide != NOBODY
        told = [who.get(name, ("", False)) for name in order]
        return _Places(
            order,
            [patient for patient, _ in told],
            [test for _, test in told],
            taken,
            slide[taken],
            *(one[taken] for one in numbers),
        )

    def ordered(self, rows: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Some rows by slide, row and column."""
        return rows[np.lexsort((self.column[rows], self.row[rows], self.slide[rows]))]

    def covering(
        self, fine: Int[np.ndarray, " fine"], k: int, finest: int
    ) -> Int[np.ndarray, " fine"]:
        """The row of the patch of scale k that covers each of some; `NOBODY` where none does.

        A square covers another if and only if their centres are, row by row and column by
        column, no farther apart than half of the difference of their sides. So the nearest
        centre in that metric covers, if any does.
        """
        found = np.full(len(fine), NOBODY)
        coarse = np.flatnonzero(self.scale == k)
        coarse = self.ordered(coarse)  # so that ties do not hang on how the parts were cut
        edges = np.arange(len(self.slides) + 1)
        ours = np.searchsorted(self.slide[fine], edges)
        theirs = np.searchsorted(self.slide[coarse], edges)
        reach = ((1 << k) - (1 << finest)) / 2
        for i in range(len(self.slides)):
            few, many = coarse[theirs[i] : theirs[i + 1]], slice(ours[i], ours[i + 1])
            if len(few) and len(fine[many]):
                tree = KDTree(self._centres(few, k))
                far, near = tree.query(self._centres(fine[many], finest), p=np.inf)
                found[many] = np.where(far <= reach, few[near], NOBODY)
        return found

    def _centres(self, rows: Int[np.ndarray, " n"], k: int) -> np.ndarray:
        return np.stack([self.row[rows], self.column[rows]], axis=1) + (1 << k) / 2


def _distinct(table: pa.Table) -> list[list[str]]:
    """The distinct rows of some columns, column by column."""
    few = table.group_by(table.column_names).aggregate([])
    return [few[name].to_pylist() for name in table.column_names]


def _width(root: str, where: labelled.Where, count: int, gib: float) -> int:
    """The width of a feature.

    Raises:
        UserError: so many of them do not fit into the memory.
    """
    first = next(labelled.pieces(root, where, ["feature"], at_once=1))
    width = len(_values(first.slice(0, 1), None)[0])
    needed = count * width * np.dtype(np.float16).itemsize / 2**30
    if needed > gib:
        raise UserError(
            f"{count} features of {width} values take {needed:.3g} GiB in each worker, and "
            f"mil.memory_gib={gib:g}; raise it, take fewer blocks, or begin mil.scales= at a "
            f"coarser scale."
        )
    return width


def _values(table: pa.Table, width: int | None) -> Float16[np.ndarray, "n width"]:
    """The features of some rows.

    Raises:
        UserError: they are not all of that width.
    """
    values, starts = tables.lists(table["feature"])
    lengths = np.diff(starts)
    if width is not None and (lengths != width).any():
        other = lengths[lengths != width][0]
        raise UserError(f"some features have {width} values and others {other}; take them anew.")
    return values[starts[0] : starts[-1]].reshape(len(lengths), -1)
