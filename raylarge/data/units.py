"""Units: one per part that a verb writes, with all that the part is made of.

A stage (`parts.Stage`) makes the part of a unit; units travel to Ray workers by pickle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One part to make.

    Attributes:
        part: its path below the data folder.
        stamp: digest of all that its content depends on.
        slide_id: pseudonym of its slide; empty for parts that mix slides.
        tiles: tiles (or rows) in it, for progress; None: unknown, then parts are counted.
    """

    part: str = ""
    stamp: str = ""
    slide_id: str = ""
    tiles: int | None = None


@dataclass(frozen=True, kw_only=True)
class TileUnit(Unit):
    """A slide whose candidates become TILES.

    Attributes:
        path, patient_id, split, mpp, labels, view, mask: see `slide_index.Entry`; `mask` is a path.
        tiling_digest: of the settings and files that decide its candidates.
        fingerprint: of the slide's bytes.
    """

    path: str
    patient_id: str
    split: str
    mpp: float | None
    labels: dict[str, str]
    view: int
    mask: str
    tiling_digest: str
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class BlockUnit(Unit):
    """A block of rows of a slide's base grid: a part of EMBEDDINGS or of examples.

    Attributes:
        path, mpp_override, view: how the slide is opened.
        rows: first and last (excluded) row.
        columns: of the whole grid.
        labels: of the slide.
        blocks: the rows of all blocks of the slide.
    """

    path: str
    mpp_override: float | None
    view: int
    rows: tuple[int, int]
    columns: int = 0
    labels: dict[str, str] = field(default_factory=dict)
    blocks: Sequence[tuple[int, int]] = ()


@dataclass(frozen=True, kw_only=True)
class BucketUnit(Unit):
    """A bucket of EXAMPLES and the blocks that it mixes."""

    blocks: Sequence[BlockUnit]


@dataclass(frozen=True, kw_only=True)
class DerivedUnit(Unit):
    """A part made from one part of EXAMPLES or of a table derived from them.

    Attributes:
        source: path of the part that is read.
        groups: [scale, split, rows] of its row groups.
    """

    source: str
    groups: Sequence[Sequence[Any]]


_STORED_KEYS = {"tiling_digest": "cells", "coverage_digest": "covers"}
"""Fields of `SlideFacts` whose key in `slides.json` and in footers is another."""


@dataclass(frozen=True, kw_only=True)
class SlideFacts:
    """A tiled slide, as `slides.json` and the footer of its TILES store it.

    Attributes:
        tiling_digest: of the settings and files that decided its candidates.
        size_px: (rows, columns) in base pixels; `size_l0` in the file's own.
        grid: (rows, columns) of base tiles.
        covered: how many tiles of each row some kept example covers.
        coverage_digest: which tiles those are.
        mpp: µm per pixel of the file; `mpp_override` where the user gave it.
        view: number of the view (`slides/view.py`); 0 is the slide as it is.
        notes: what the reader chose among several.
        path: of the file; not stored with the others (`names.json` has it).
    """

    slide_id: str
    patient_id: str
    split: str
    labels: dict[str, str]
    fingerprint: str
    tiling_digest: str
    stamp: str
    size_px: Sequence[int]
    grid: Sequence[int]
    covered: Sequence[int]
    coverage_digest: str
    size_l0: Sequence[int]
    mpp: float
    georeference: Any
    mpp_override: float | None
    view: int = 0
    notes: Sequence[str] = ()
    path: str = ""

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], path: str = "") -> SlideFacts:
        """Return a stored slide with its path; keys of other versions are left out."""
        names = {one.name: _STORED_KEYS.get(one.name, one.name) for one in fields(cls)}
        values = {name: stored[key] for name, key in names.items() if key in stored}
        return cls(**{**values, "path": path})

    def as_json(self) -> dict[str, Any]:
        """Return what is stored."""
        values = {_STORED_KEYS.get(name, name): value for name, value in asdict(self).items()}
        del values["path"]
        return values
