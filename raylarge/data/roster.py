"""Who is who among the slides: pseudonyms, patients, splits, labels, fingerprints.

A user's table (CSV or parquet) may say more of a slide: `slide` is its file name, with or without
what follows the first dot or the last; `patient`, `split` and `mpp` are known, and `tile.labels`
names the columns that go into the examples. A split file lists slides or patients: in the form of
HIPT's and CLAM's folds (columns train, val, test), or in columns `slide` (or `patient`) and
`split`. A patient never crosses splits.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from raylarge import storage
from raylarge.data.candidates import Tile
from raylarge.errors import SlideError, UserError
from raylarge.slides.fetch import companions

_PEEK_BYTES = 1 << 20
_T = TypeVar("_T")
_SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Entry:
    """What is known of a slide before it is opened."""

    path: str
    slide_id: str
    patient_id: str
    split: str
    mpp: float | None
    labels: dict[str, str] = field(default_factory=dict)
    view: int = 0

    @property
    def stem(self) -> str:
        """The file name without its last ending: what files about the slide are called."""
        return stems(self.path)[1]


def entries(paths: Sequence[str], config: Tile) -> list[Entry]:
    """The slides by pseudonym.

    Raises:
        UserError: two slides of one file name, a table or split file that does not fit, a patient
            in two splits.
    """
    table = _by_slide(config.table, config.labels) if config.table else {}
    listed = _split_file(config.split) if is_file(config.split) else {}
    if config.table and not any(_match(path, table) for path in paths):
        raise UserError(f"tile.table={config.table} names none of the slides.")
    found: dict[str, Entry] = {}
    for path in paths:
        entry = _entry(path, config, _match(path, table) or {}, listed)
        if entry.slide_id in found:
            raise UserError(
                f"{found[entry.slide_id].path} and {path} have one file name, and with it one "
                "pseudonym; rename one of them."
            )
        found[entry.slide_id] = entry
    if listed and all(entry.split == "unlisted" for entry in found.values()):
        raise UserError(f"tile.split={config.split} names none of the slides and patients.")
    _one_split_per_patient(found.values())
    views = [view for entry in found.values() for view in _views(entry, config)]
    return sorted(views, key=lambda entry: entry.slide_id)


def _views(entry: Entry, config: Tile) -> list[Entry]:
    """Return a slide and, if it trains, its further views, each under a pseudonym of its own."""
    numbers = range(1, config.views if entry.split in ("train", "band") else 1)
    names = [f"{stems(entry.path)[0]} view {number}" for number in numbers]
    return [
        entry,
        *(
            replace(entry, slide_id=pseudonym(config.salt, name), view=number)
            for number, name in zip(numbers, names, strict=True)
        ),
    ]


def _entry(path: str, config: Tile, row: Mapping[str, str], listed: Mapping[str, str]) -> Entry:
    name = path.rstrip("/").rsplit("/", 1)[-1]
    patient = row.get("patient") or _patient(name, config.patient)
    patient_id = pseudonym(config.salt, patient)
    split = row.get("split") or config.split
    if listed:
        split = _match(path, listed) or listed.get(patient) or "unlisted"
    elif split == "patient":
        split = by_hash(patient_id, config.val_fraction, config.test_fraction)
    if split not in (*_SPLITS, "band", "unlisted"):
        raise UserError(f"'{split}' of slide {name} is no split; choose among train, val and test.")
    return Entry(
        path=path,
        slide_id=pseudonym(config.salt, name),
        patient_id=patient_id,
        split=split,
        mpp=_mpp(row.get("mpp", ""), name) or config.mpp,
        labels={key: row[key] for key in config.labels if key in row},
    )


def is_file(split: str) -> bool:
    """Whether `tile.split` names a file."""
    return split not in ("patient", "band")


def stems(path: str) -> tuple[str, str, str]:
    """The names by which a table may know a slide, the most exact first."""
    name = path.rstrip("/").rsplit("/", 1)[-1]
    return name, name.rsplit(".", 1)[0], name.split(".", 1)[0]


def pseudonym(salt: str, name: str) -> str:
    """A salted name: the same for the same file name, and no way back without the salt."""
    return hashlib.blake2b(os.fsencode(name), key=salt.encode()[:64], digest_size=8).hexdigest()


def trace(salt: str) -> str:
    """What may be told of a salt: enough to notice another one, too slow to guess by."""
    return hashlib.scrypt(salt.encode(), salt=b"raylarge", n=1 << 14, r=8, p=1, dklen=8).hex()


def fingerprint(path: str) -> str:
    """A short name for a slide's bytes: sizes, first and last MiB of its files.

    Raises:
        SlideError: nothing stands at the path, or a file on a disk cannot be read.
        UserError: the store fails.
    """
    beside = companions(path)
    own = [path] if not beside or path.endswith(".mrxs") else []
    return storage.digest(*(_ends(one) for one in [*own, *beside]))


def _ends(path: str) -> bytes:
    try:
        size = storage.patiently(path, lambda fs, root: int(fs.size(root)))
        ends = [(0, min(size, _PEEK_BYTES)), (max(0, size - _PEEK_BYTES), size)]
        content = [storage.read_range(path, *end) if size else b"" for end in ends]
    except FileNotFoundError as error:
        raise SlideError(f"slide {path} does not exist; check the path.") from error
    except UserError as error:
        raise (SlideError(str(error)) if storage.is_local(path) else error) from error
    return f"{size} ".encode() + b"".join(content)


def by_hash(patient_id: str, val: float, test: float) -> str:
    """The split by the patient's pseudonym alone."""
    at = int(patient_id, 16) / 2.0**64
    return "val" if at < val else "test" if at < val + test else "train"


def _patient(name: str, pattern: str) -> str:
    if not pattern:
        return name
    try:
        found = re.search(pattern, name)
    except re.error as error:
        raise UserError(f"tile.patient={pattern} is no regular expression: {error}.") from error
    if found is None or not any(found.groups()):
        raise UserError(
            f"tile.patient={pattern} finds no patient in '{name}'; give a regular expression "
            "with one group, such as '^(TCGA-..-....)'."
        )
    return str(next(group for group in found.groups() if group))


def _mpp(text: str, name: str) -> float | None:
    try:
        mpp = float(text) if text else None
    except ValueError:
        mpp = 0.0
    if mpp is not None and not mpp > 0:
        raise UserError(f"tile.table says mpp={text} of '{name}'; it must be a number above 0.")
    return mpp


def _match(path: str, table: Mapping[str, _T]) -> _T | None:
    return next((table[name] for name in stems(path) if name in table), None)


def _by_slide(path: str, labels: Sequence[str]) -> dict[str, dict[str, str]]:
    rows = read_rows(path)
    for name in labels:
        if rows and name not in rows[0]:
            there = ", ".join(rows[0])
            raise UserError(f"tile.labels: {path} has no column '{name}', but {there}.")
    if rows and "slide" not in rows[0]:
        raise UserError(f"tile.table={path} has no column 'slide', but {', '.join(rows[0])}.")
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        if found.setdefault(row["slide"], row) != row:
            raise UserError(f"tile.table={path} has two rows for slide '{row['slide']}'.")
    return found


def _split_file(path: str) -> dict[str, str]:
    """Split by slide name or patient."""
    if not storage.exists(storage.absolute(path)):
        raise UserError(f"tile.split={path}: it must be patient, band, or a file with the splits.")
    rows = read_rows(path)
    columns = set(rows[0]) if rows else set()
    who = next((name for name in ("slide", "patient") if name in columns), None)
    if who and "split" in columns:
        pairs = [(row[who], row["split"]) for row in rows]
    elif columns & set(_SPLITS):
        pairs = [(row[s], s) for row in rows for s in _SPLITS if row.get(s)]
    else:
        raise UserError(
            f"tile.split={path} has columns {', '.join(sorted(columns)) or '(none)'}; give "
            "train, val and test, or slide (or patient) and split."
        )
    found: dict[str, str] = {}
    for name, split in pairs:
        if found.setdefault(name, split) != split:
            raise UserError(f"tile.split={path} has '{name}' in {found[name]} and in {split}.")
    return found


def read_rows(path: str) -> list[dict[str, str]]:
    """A user's CSV or parquet table as rows of text; empty cells are "".

    Raises:
        UserError: no such file, or no such table.
    """
    content = storage.read_bytes(storage.absolute(path))
    try:
        if path.endswith(".parquet"):
            table = pa.parquet.read_table(pa.BufferReader(content))
        else:
            names = pyarrow.csv.read_csv(pa.BufferReader(content)).column_names
            text = pyarrow.csv.ConvertOptions(column_types={name: pa.string() for name in names})
            table = pyarrow.csv.read_csv(pa.BufferReader(content), convert_options=text)
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no CSV or parquet table: {error}") from error
    return [
        {key.strip(): "" if value is None else str(value).strip() for key, value in row.items()}
        for row in table.to_pylist()
    ]


def _one_split_per_patient(found: Iterable[Entry]) -> None:
    split: dict[str, Entry] = {}
    for entry in found:
        other = split.setdefault(entry.patient_id, entry)
        if other.split != entry.split:
            raise UserError(
                f"{other.path} is in {other.split} and {entry.path} in {entry.split}, but they are "
                "of one patient; put both into one split."
            )
