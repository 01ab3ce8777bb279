"""Small tables of a user (CSV or parquet) as rows of text.

CSV: UTF-8 (or UTF-16 with its mark), fields separated by commas, semicolons or tabs, quoted where
they need it. Text is in Unicode's composed form (NFC), without spaces at its ends. A cell that
says one of `MISSING`, in any case of letters, is empty, and it is counted that it did.

No thread of Arrow reads here: one that still lets go of a Python buffer while the interpreter
ends aborts the process.
"""

from __future__ import annotations

import csv
import io
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raylarge import storage
from raylarge.errors import UserError

MISSING = frozenset(
    {
        *("", "na", "n/a", "n.a.", "nan", "-nan", "nat", "null", "none", "nil", "<na>", "missing"),
        *("#n/a", "#na", "#n/a n/a", "-", "--", "'--", "–", "—", "?", "."),
        *("[not available]", "[not applicable]", "[unknown]", "[not evaluated]"),
    }
)
"""What stands for no value, in lower case."""
_SEPARATORS = (",", ";", "\t")
_PARQUET = b"PAR1"
_EDGES = " \t\r\n\f\v\xa0\ufeff\u200b"


@dataclass(frozen=True)
class TextTable:
    """A table whose cells are text.

    Attributes:
        path: where it comes from.
        columns: their names, in order; "" is one without a name.
        rows: a cell for each column; "" where there is no value.
        missing: per column the words that stood for no value (not: empty cells), with counts.
    """

    path: str
    columns: tuple[str, ...]
    rows: list[dict[str, str]]
    missing: dict[str, Counter[str]]

    def missing_words(self, columns: Sequence[str]) -> list[str]:
        """A line for each of some columns in which words stand for no value."""
        return [
            missing_line(self.path, name, self.missing[name], len(self.rows))
            for name in dict.fromkeys(columns)
            if self.missing.get(name)
        ]

    def require_spelling(self, names: Sequence[str], besides: Sequence[str] = ()) -> None:
        """Refuse a column that differs from one of some names only in the case of letters.

        Such a column would be ignored, and with it the patients or the splits that it lists.

        Args:
            names: columns that are read, as they must be spelt.
            besides: columns that are read under the names that they have.

        Raises:
            UserError: naming the column and its right spelling.
        """
        spelling = {name.casefold(): name for name in names if name}
        for column in self.columns:
            name = spelling.get(column.casefold(), column)
            if column != name and column not in besides:
                cure = "remove one of them" if name in self.columns else f"rename it to '{name}'"
                raise UserError(
                    f"{self.path} has a column '{column}', which differs from '{name}' only in the "
                    f"case of letters and would not be read; {cure}."
                )


def read(path: str) -> TextTable:
    """Read a user's table.

    Raises:
        UserError: no such file, no such table, a column named twice, a row of another length.
    """
    content = storage.read_bytes(storage.absolute(path))
    is_parquet = path.endswith(".parquet") or content.startswith(_PARQUET)
    header, lines = _parquet(path, content) if is_parquet else _csv(path, content)
    columns = tuple(tidy(name) for name in header)
    refuse_doubled(path, columns)
    missing: dict[str, Counter[str]] = {}
    rows = []
    for line in lines:
        row: dict[str, str] = {}
        for name, cell in zip(columns, line, strict=True):
            text = tidy(cell)
            if text.lower() in MISSING:
                missing.setdefault(name, Counter()).update([text] if text else [])
                text = ""
            row[name] = row.get(name) or text  # several columns may have no name
        rows.append(row)
    return TextTable(path, columns, rows, {k: words for k, words in missing.items() if words})


def missing_line(path: str, column: str, words: Counter[str], count: int) -> str:
    """Return a line that says which words stood for no value in a column of `count` cells."""
    return (
        f"{path}: {words.total()} of {count} cells of '{column}' say {', '.join(sorted(words))} "
        "and count as empty"
    )


def refuse_doubled(path: str, columns: Sequence[str]) -> None:
    """Refuse a table with two columns of one name.

    Raises:
        UserError: naming the first of them.
    """
    twice = [name for name, count in Counter(columns).items() if name and count > 1]
    if twice:
        raise UserError(f"{path} has the column '{twice[0]}' twice; keep one.")


def broken(path: str, error: csv.Error, line: int) -> UserError:
    """Return what to raise for a table that is no CSV, from a line on."""
    return UserError(
        f"{path} is no CSV table ({error} in line {line}); save it as CSV in UTF-8, or as .parquet."
    )


def tidy(text: str) -> str:
    """Text as names are compared: in Unicode's form NFC, without spaces at its ends."""
    return unicodedata.normalize("NFC", text).strip(_EDGES).strip()


def _csv(path: str, content: bytes) -> tuple[list[str], list[list[str]]]:
    """Header and lines of a CSV table; lines without any text are left out."""
    text = _decoded(path, content)
    first, _, rest = text.partition("\n")
    hint = ""
    if first.lower().startswith("sep=") and len(first.strip()) == 5:  # Excel's own hint
        hint, text = first[4], rest
    separator = hint or max(_SEPARATORS, key=lambda mark: _width(text, mark))
    header, *lines = _lines(path, text, separator)
    for number, line in lines:
        if len(line) != len(header[1]):
            raise UserError(
                f"{path}, line {number}: {len(line)} cells under {len(header[1])} columns "
                f"(separated by {_shown(separator)}); put quotes around a cell that holds the "
                "separator, and give every row all its cells."
            )
    return header[1], [line for _, line in lines]


def _shown(separator: str) -> str:
    return "tabs" if separator == "\t" else f"'{separator}'"


def _width(text: str, separator: str) -> int:
    """How many columns the first line that is not empty has under a separator."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    try:
        return next((len(cells) for cells in reader if cells), 0)
    except csv.Error:
        return 0


def _lines(path: str, text: str, separator: str) -> list[tuple[int, list[str]]]:
    """Line number and cells of the lines that say something, the header first."""
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True
    )
    lines: list[tuple[int, list[str]]] = []
    try:
        for cells in reader:
            if any(map(tidy, cells)) or (cells and not lines):
                lines.append((reader.line_num, cells))
    except csv.Error as error:
        raise broken(path, error, reader.line_num) from error
    if not lines:
        raise UserError(f"{path} is empty; give a table with a header.")
    return lines


def _decoded(path: str, content: bytes) -> str:
    marks = (b"\xff\xfe", b"\xfe\xff")
    encoding = "utf-16" if content.startswith(marks) else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is no CSV or parquet table: byte {error.start} is not {encoding[:5].upper()}; "
            "save it as CSV in UTF-8, or as .parquet."
        ) from error
    if "\0" in text:
        raise UserError(f"{path} is no CSV or parquet table; save it as CSV in UTF-8.")
    return text


def _parquet(path: str, content: bytes) -> tuple[list[str], list[list[str]]]:
    try:
        with pq.ParquetFile(pa.BufferReader(content), pre_buffer=False) as file:
            table = file.read(use_threads=False)
    except (pa.ArrowException, OSError) as error:
        first = str(error).split("\n", 1)[0]
        raise UserError(f"{path} is no CSV or parquet table: {first}.") from error
    cells = [
        _texts(path, name, column)
        for name, column in zip(table.column_names, table.columns, strict=True)
    ]
    lines = [list(line) for line in zip(*cells, strict=True)]
    return table.column_names, [line for line in lines if any(line)]


def _texts(path: str, name: str, column: pa.ChunkedArray) -> list[str]:
    """The cells of a parquet column as text; whole numbers without a fraction."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_nested(kind):
        raise UserError(f"{path}: column '{name}' holds {kind}; give text or numbers.")
    if pa.types.is_float16(kind) or pa.types.is_float32(kind):
        return [_number(None if v is None else np.float32(v)) for v in column.to_pylist()]
    try:
        return [_text(value) for value in column.to_pylist()]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: column '{name}' holds bytes that are no text.") from error


def _text(value: Any) -> str:
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, bytes):
        return value.decode()
    return "" if value is None else str(value)


def _number(value: Any) -> str:
    """A floating-point number as one writes it: 12 and not 12.0; "" where there is none."""
    if value is None or np.isnan(value):
        return ""
    return str(int(value)) if np.isfinite(value) and value == int(value) else str(value)
