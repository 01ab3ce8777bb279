"""Index of slides: pseudonym, patient, split, labels and fingerprint of each.

A user's table may add columns: `slide` (a file name), `patient`, `split`, `mpp` and those of
`tile.labels`. A split file lists slides or patients. All slides of a patient have one split.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from raylarge import storage
from raylarge.data import split_table, text_table
from raylarge.data.name_table import SOME, NameTable, file_name, some, stems
from raylarge.data.split_table import WORDS
from raylarge.data.tile_candidates import TileConfig
from raylarge.errors import SlideError, UserError, printable
from raylarge.slides.fetch import companions
from raylarge.storage import web

COLUMNS = ("slide", "patient", "split", "mpp")
"""Columns of `tile.table` that are read, besides those of `tile.labels`."""
_PEEK_BYTES = 1 << 20
_NUMBER = re.compile(r"\+?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_PSEUDONYM = re.compile(r"\b[0-9a-f]{16}\b")
_PRIVATE = re.compile(r" \(names\.json says which file [0-9a-f]{16} is\)")
Row = dict[str, str]


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
    patient: str = ""

    @property
    def stem(self) -> str:
        """The file name without its last ending: what files about the slide are called."""
        return stems(self.path)[1]


@dataclass
class SlideIndex:
    """The slides, and how the user's tables fit them.

    Attributes:
        entries: the slides by pseudonym.
        skipped: files without a split, which `tile.unlisted=skip` leaves out.
        lines: what the tables and the slides do not agree in, for the terminal.
        counts: the same in numbers, with a few names, for `report.json`.
        hint: what a name of a table may have meant.
    """

    entries: list[Entry]
    skipped: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)
    hint: str = ""


def index(paths: Sequence[str], config: TileConfig) -> SlideIndex:
    """The slides by pseudonym, with what the tables say of them.

    Raises:
        UserError: two slides of one file name, a table or split file that does not fit, slides
            without a split where a table gives splits, a patient in two splits.
    """
    _refuse_same_names(paths)
    result = SlideIndex([])
    rows, has_split = _rows(paths, config, result) if config.table else ({}, False)
    entries = {path: _entry(path, config, rows.get(path, {})) for path in paths}
    if has_split or is_file(config.split):
        by_row = {path: row["split"] for path, row in rows.items() if row.get("split")}
        by_file = _splits_by_file(entries, config, result) if is_file(config.split) else {}
        for path, split in by_row.items():
            if by_file.get(path, split) != split:
                raise UserError(
                    f"{file_name(path)} is in {split} by tile.table={config.table} and in "
                    f"{by_file[path]} by tile.split={config.split}; mend one of them."
                )
        for path, entry in entries.items():
            entries[path] = replace(entry, split={**by_row, **by_file}.get(path, ""))
        _place_unlisted(entries, config, result)
    _one_split_per_patient(entries.values())
    result.entries = sorted(entries.values(), key=lambda entry: entry.slide_id)
    return result


def account(index: SlideIndex, salt: str, names: bool) -> dict[str, Any]:
    """The counts of an index for a report: without `names` slides go by their pseudonyms."""
    if names:
        return index.counts
    return {
        what: {
            key: [pseudonym(salt, name) for name in value] if isinstance(value, list) else value
            for key, value in counts.items()
        }
        if isinstance(counts, dict)
        else counts
        for what, counts in index.counts.items()
    }


def with_names(text: str, names: Mapping[str, str]) -> str:
    """A text in which the name of the file follows each pseudonym of a slide.

    Args:
        text: a message or a reason.
        names: file names by pseudonym; empty changes nothing.
    """
    text = _PRIVATE.sub("", text) if names else text
    shown = {slide_id: f"{slide_id} ({printable(name)})" for slide_id, name in names.items()}
    return _PSEUDONYM.sub(lambda match: shown.get(match[0], match[0]), text)


def _refuse_same_names(paths: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for path in paths:
        other = seen.setdefault(file_name(path), path)
        if other != path:
            raise UserError(
                f"{other} and {path} have one file name, and with it one pseudonym; rename one of "
                "them."
            )


def _rows(
    paths: Sequence[str], config: TileConfig, index: SlideIndex
) -> tuple[dict[str, Row], bool]:
    """The row of each slide in `tile.table`, and whether the table gives splits."""
    table = text_table.read(config.table)
    table.require_spelling(COLUMNS, config.labels)
    shown = ", ".join(name or "(no name)" for name in table.columns)
    for name in config.labels:
        if name not in table.columns:
            raise UserError(f"tile.labels: {config.table} has no column '{name}', but {shown}.")
    if "slide" not in table.columns:
        raise UserError(f"tile.table={config.table} has no column 'slide', but {shown}.")
    pairs = (
        (row["slide"], {key: cell for key, cell in row.items() if key != "slide"})
        for row in table.rows
        if row["slide"]
    )
    named = NameTable("tile.table", config.table, pairs)
    rows = named.match(paths)
    _compare("table", named, paths, rows, index)
    columns = [name for name in COLUMNS if name in table.columns]
    index.lines += table.missing_words([*columns, *config.labels])
    index.counts["missing"] = {
        name: table.missing[name].total()
        for name in dict.fromkeys([*columns, *config.labels])
        if name in table.missing
    }
    return rows, "split" in table.columns


def _compare(
    what: str,
    named: NameTable[Any],
    paths: Sequence[str],
    rows: Mapping[str, Any],
    index: SlideIndex,
) -> None:
    """Note which rows mean no slide and which slides have no row.

    Raises:
        UserError: no row means any slide.
    """
    without = [path for path in paths if path not in rows]
    unused, hint = named.unused(), named.hint(without)
    index.hint = index.hint or hint
    if not rows:
        who = "slides" if what == "table" else "slides and patients"
        cure = hint or "write the names of the files there"
        raise UserError(f"{named.title} names none of the {who}; {cure}.")
    for who, names in (("rows without a slide", unused), ("slides without a row", without)):
        if names:
            listed = some([file_name(name) for name in names])
            index.lines.append(f"{named.title}: {who}: {len(names):,} ({listed})")
    index.lines += named.shared()
    if hint:
        index.lines.append(f"{named.title}: {hint}")
    index.counts[what] = {
        "rows_without_slide": len(unused),
        "slides_without_row": len(without),
        "unmatched_rows": unused[:SOME],
        "unmatched_slides": [stems(path)[0] for path in without[:SOME]],
    }


def _entry(path: str, config: TileConfig, row: Mapping[str, str]) -> Entry:
    """A slide with the split that `tile.split` gives where no file and no table does."""
    name = file_name(path)
    patient = row.get("patient") or _patient(name, config.patient)
    patient_id = pseudonym(config.salt, patient)
    split = config.split
    if split == "patient":
        split = by_hash(patient_id, config.val_fraction, config.test_fraction)
    if (word := row.get("split", "")) and word not in WORDS:
        raise UserError(f"'{word}' of slide {name} is no split; choose among train, val and test.")
    return Entry(
        path=path,
        slide_id=pseudonym(config.salt, stems(path)[0]),
        patient_id=patient_id,
        split=split,
        mpp=_mpp(row.get("mpp", ""), name) or config.mpp,
        labels={key: row[key] for key in config.labels if key in row},
        patient=patient,
    )


def _splits_by_file(
    entries: dict[str, Entry], config: TileConfig, index: SlideIndex
) -> dict[str, str]:
    """The split of each slide that the file of `tile.split` lists, by name or patient."""
    named, table = split_table.read(config.split)
    listed = named.match(list(entries))
    for path, entry in entries.items():
        if path not in listed and (split := named.find(entry.patient)):
            listed[path] = split
    _compare("split", named, list(entries), listed, index)
    index.lines += table.missing_words(table.columns)
    return listed


def _place_unlisted(entries: dict[str, Entry], config: TileConfig, index: SlideIndex) -> None:
    """Do with slides without a split as `tile.unlisted` says.

    Raises:
        UserError: there are some, and it says `refuse`.
    """
    without = [path for path, entry in entries.items() if not entry.split]
    source = f"tile.split={config.split}" if is_file(config.split) else f"tile.table={config.table}"
    if without and config.unlisted == "refuse":
        hint = f" ({index.hint})" if index.hint else ""
        raise UserError(
            f"{len(without):,} of {len(entries):,} slides have no split in {source}: "
            f"{some([file_name(path) for path in without])}{hint}; add them, or set "
            "tile.unlisted=skip (leave them out) or tile.unlisted=hash (split by hash of the "
            "patient)."
        )
    of_patient = {entry.patient_id: entry.split for entry in entries.values() if entry.split}
    for path in without:
        if config.unlisted == "skip":
            index.skipped.append(entries.pop(path).path)
            continue
        patient = entries[path].patient_id
        drawn = by_hash(patient, config.val_fraction, config.test_fraction)
        entries[path] = replace(entries[path], split=of_patient.get(patient, drawn))
    if without:
        how = "left out" if config.unlisted == "skip" else "split by hash of the patient"
        index.lines.append(f"{source}: slides without a split, {how}: {len(without):,}")
    index.counts["unlisted"] = len(without)


def is_file(split: str) -> bool:
    """Whether `tile.split` names a file."""
    return split not in ("patient", "band")


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
        if web.is_web_url(path):
            return storage.with_retries(
                path, lambda fs, root: web.edge_bytes(fs, root, _PEEK_BYTES)
            )
        size = storage.with_retries(path, lambda fs, root: int(fs.size(root)))
        ends = [(0, min(size, _PEEK_BYTES)), (max(0, size - _PEEK_BYTES), size)]
        content = [storage.read_range(path, *end) if size else b"" for end in ends]
    except FileNotFoundError as error:
        name = storage.redacted(path)
        raise SlideError(f"slide {name} does not exist; check the path.") from error
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
        match = re.search(pattern, name)
    except re.error as error:
        raise UserError(f"tile.patient={pattern} is no regular expression: {error}.") from error
    if match is None or not any(match.groups()):
        raise UserError(
            f"tile.patient={pattern} finds no patient in '{name}'; give a regular expression "
            "with one group, such as '^(TCGA-..-....)'."
        )
    return str(next(group for group in match.groups() if group))


def _mpp(text: str, name: str) -> float | None:
    mpp = float(text) if _NUMBER.fullmatch(text) else 0.0
    if text and not 0 < mpp < math.inf:
        raise UserError(
            f"tile.table says mpp={text} of '{name}'; it must be a number above 0, such as 0.25."
        )
    return mpp or None


def _one_split_per_patient(entries: Iterable[Entry]) -> None:
    split: dict[str, Entry] = {}
    for entry in entries:
        other = split.setdefault(entry.patient_id, entry)
        if other.split != entry.split:
            raise UserError(
                f"{other.path} is in {other.split} and {entry.path} in {entry.split}, but they are "
                "of one patient; put both into one split."
            )
