"""The file of `tile.split`: which slides or patients train, and which are held out.

train, val, test            names in the cells: HIPT's and CLAM's folds (splits_0.csv)
"", train, val, test        names in the first column, true or false in the others: CLAM's
                            splits_0_bool.csv
slide (or patient), split   a row for each
"""

from __future__ import annotations

from raylarge import storage
from raylarge.data import text_table
from raylarge.data.name_table import NameTable
from raylarge.data.text_table import TextTable
from raylarge.errors import UserError

SPLITS = ("train", "val", "test")
WORDS = (*SPLITS, "band")
"""What a cell may say: a split, or that the slide's own lowest rows are held out."""
_NAMES = ("slide", "patient", "slide_id", "case_id", "")
"""Columns that may name a slide or a patient; the last has no name itself."""
_TRUE, _FALSE = {"true", "1", "1.0"}, {"false", "0", "0.0", ""}


def read(path: str) -> tuple[NameTable[str], TextTable]:
    """The split of each name, and the table it comes from.

    Raises:
        UserError: no such file, columns of no known form, or a name in two splits.
    """
    if not storage.exists(storage.absolute(path)):
        raise UserError(f"tile.split={path}: it must be patient, band, or a file with the splits.")
    table = text_table.read(path)
    table.require_spelling((*SPLITS, *_NAMES, "split"))
    split: dict[str, str] = {}
    for name, word in _pairs(table):
        if word not in WORDS:
            raise UserError(
                f"tile.split={path}: '{word}' of '{name}' is no split; choose among train, val and "
                "test."
            )
        if split.setdefault(name, word) != word:
            raise UserError(
                f"tile.split={path} has '{name}' in {split[name]} and in {word}; keep one."
            )
    return NameTable("tile.split", path, split.items()), table


def _pairs(table: TextTable) -> list[tuple[str, str]]:
    """Name and split of each row (or cell) that has both."""
    who = next((name for name in _NAMES if name in table.columns), None)
    if who is not None and "split" in table.columns:
        return [(row[who], row["split"]) for row in table.rows if row[who] and row["split"]]
    splits = [name for name in SPLITS if name in table.columns]
    if not splits:
        shown = ", ".join(name or "(no name)" for name in table.columns)
        raise UserError(
            f"tile.split={table.path} has columns {shown}; give train, val and test, or slide (or "
            "patient) and split."
        )
    cells = {row[s].lower() for row in table.rows for s in splits}
    if cells - {""} and cells <= _TRUE | _FALSE:
        if who is None:
            raise UserError(
                f"tile.split={table.path} has true and false under {', '.join(splits)}, but no "
                "column that names the slides; add a first column with their names."
            )
        rows = [row for row in table.rows if row[who]]
        return [(row[who], s) for row in rows for s in splits if row[s].lower() in _TRUE]
    return [(row[s], s) for row in table.rows for s in splits if row[s]]
