"""Which row of a user's table is about which slide.

A row names a slide by its file name, with or without what follows the last dot or the first.
Names are compared in Unicode's form NFC, so that an accent written in two ways is one name.
A row is of the slides that it names most fully: `S-1` is no row of `S-1.5.svs` beside `S-1.svs`.
Anything less alike, such as another case of letters, is no match; it becomes a hint.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from typing import Generic, TypeVar

from raylarge import storage
from raylarge.data.text_table import tidy
from raylarge.errors import UserError

T = TypeVar("T")
SOME = 5
"""How many names a message lists."""


def file_name(path: str) -> str:
    """The last part of a path, in Unicode's form NFC."""
    return unicodedata.normalize("NFC", stems(path)[0])


def stems(path: str) -> tuple[str, str, str]:
    """The names of a file: whole, without its last ending, without all of them."""
    name = storage.name_of(path)
    return name, name.rsplit(".", 1)[0], name.split(".", 1)[0]


def some(names: Sequence[str]) -> str:
    """A few names for a message, and how many more there are."""
    more = f" and {len(names) - SOME:,} more" if len(names) > SOME else ""
    return ", ".join(f"'{name}'" for name in names[:SOME]) + more


class NameTable(Generic[T]):
    """Values by the names of slides (or patients)."""

    def __init__(self, key: str, path: str, pairs: Iterable[tuple[str, T]]) -> None:
        """Read pairs of a name and a value.

        Args:
            key: what the configuration calls the table, such as `tile.table`.
            path: of the table, for messages.
            pairs: names as `text_table` has them, and their values.

        Raises:
            UserError: a name with two values.
        """
        self.title = f"{key}={path}"
        self._values: dict[str, T] = {}
        self._used: set[str] = set()
        self._matches: dict[str, str] = {}
        for name, value in pairs:
            if self._values.setdefault(name, value) != value:
                raise UserError(
                    f"{self.title} has two rows for slide '{name}' that differ ("
                    f"{_difference(self._values[name], value)}); keep one."
                )

    def match(self, paths: Sequence[str]) -> dict[str, T]:
        """The value of each slide that has one, by its path.

        Raises:
            UserError: two rows that differ mean one slide.
        """
        matches = self._candidates(paths)
        best = {path: names[0] for path, names in matches.items() if names}
        exact = set(best.values())
        for path, name in best.items():
            for other in matches[path][1:]:
                if other not in exact and self._values[other] != self._values[name]:
                    raise UserError(
                        f"{self.title} has rows '{name}' and '{other}', both for slide "
                        f"{file_name(path)}, and they differ ("
                        f"{_difference(self._values[name], self._values[other])}); keep one."
                    )
            self._used.update(matches[path])
        self._matches = best
        return {path: self._values[name] for path, name in best.items()}

    def _candidates(self, paths: Sequence[str]) -> dict[str, list[str]]:
        """The rows that each slide may mean, the fullest name first."""
        forms = {path: stems(file_name(path)) for path in paths}
        nearest: dict[str, int] = {}
        for names in forms.values():
            for name in names:
                nearest[name] = min(names.index(name), nearest.get(name, len(names)))
        return {
            path: [
                name
                for name in dict.fromkeys(names)
                if name in self._values and names.index(name) == nearest[name]
            ]
            for path, names in forms.items()
        }

    def find(self, name: str) -> T | None:
        """The value of a patient."""
        if name in self._values:
            self._used.add(name)
        return self._values.get(name)

    def shared(self) -> list[str]:
        """A line for each row that stands for several slides, whose names go on differently."""
        slides: dict[str, list[str]] = {}
        for path, name in self._matches.items():
            slides.setdefault(name, []).append(file_name(path))
        return [
            f"{self.title}: row '{name}' stands for {len(names):,} slides: {some(sorted(names))}"
            for name, names in sorted(slides.items())
            if len(names) > 1
        ]

    def unused(self) -> list[str]:
        """The names that meant no slide (and no patient) so far, in the table's order."""
        return [name for name in self._values if name not in self._used]

    def hint(self, paths: Sequence[str]) -> str:
        """What the first unused name may have meant among slides without a row; "" for nothing."""
        near = {_loosely(path): file_name(path) for path in reversed(paths)}
        for name in self.unused():
            slide = near.get(_loosely(name))
            if slide is not None:
                folded = {one.casefold() for one in stems(slide)}
                how = "the case of letters" if name.casefold() in folded else "folder or ending"
                return f"row '{name}' and slide '{slide}' differ in {how}: write them alike"
        return ""


def _loosely(name: str) -> str:
    """A name without folder, endings and case of letters."""
    text = tidy(unicodedata.normalize("NFKC", name)).replace("\\", "/")
    return stems(text)[2].casefold()


def _difference(one: object, other: object) -> str:
    """The first thing in which two values differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        column = next(key for key in one if one[key] != other.get(key))
        return f"{column} is '{one[column]}' and '{other.get(column)}'"
    return f"'{one}' and '{other}'"
