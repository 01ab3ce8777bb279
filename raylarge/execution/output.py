"""The folder that a sampling job writes: the result of one order, and of no other.

Files of another order, and files that raylarge did not write, stay unless `overwrite=true`
says that they may go. Pictures carry the digests of their order and bundle, and so do
`report.json` and the names of ledgers.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tifffile
from PIL import Image

from raylarge import storage
from raylarge.errors import UserError
from raylarge.execution import reply_store
from raylarge.execution.reply_store import PREFIX, ReplyStore
from raylarge.order import Order
from raylarge.storage import objects

PICTURES = ("image.png", "image.tif", "guide.png")
_STAGES = {"start", "sample", "write"}
"""Stages in the report of a sampling job."""
_USUAL = "float32"
"""What the empty name of a computation stands for."""
_EARLIER_NAMES = {
    "corrections": "inner",
    "correction_lr": "rate",
    "normalize": "unit",
    "correct_every": "every",
    "fd_epsilon": "step",
    "small_autoencoder": "small",
}
"""Settings of the sampler by their names in folders of earlier versions."""
_SHOWN = 3
"""How many settings a message names in which two orders differ."""


@dataclass(frozen=True)
class Output:
    """The folder of one result, and what decides the bytes of that result.

    Attributes:
        folder: a path or URL.
        order: the order.
        bundle: the digest of the bundle.
        compute: the name of precision and compilation; "" for the usual ones.
    """

    folder: str
    order: Order
    bundle: str
    compute: str

    @property
    def facts(self) -> dict[str, str]:
        """Whose result it is, as `report.json` says it from the start of the job."""
        return {"order": self.order.digest, "bundle": self.bundle, "means": self.compute}

    @property
    def ledger(self) -> ReplyStore:
        """The replies of this order."""
        return ReplyStore(self.folder, self.order, self.bundle + self.compute)

    def finished(self, report: Mapping[str, Any]) -> dict[str, str]:
        """Return name and path of the files of a whole result of this order, else nothing."""
        names = report.get("files", ()) if self._reports(report) else ()
        files = {name: storage.join(self.folder, name) for name in names}
        return files if all(storage.exists(path) for path in files.values()) else {}

    def replaced(self, report: Mapping[str, Any], overwrite: bool) -> list[str]:
        """Return the names of files and ledgers of other results, which this one replaces.

        Raises:
            UserError: there are some, and `overwrite` is not set.
        """
        names = self._others(report)
        if names and not overwrite:
            unfinished = any(name.startswith(PREFIX) for name in names)
            files = [name for name in names if not name.startswith(PREFIX)]
            if unfinished:  # whose report this is
                files = ["an unfinished result", *(name for name in files if name != "report.json")]
            difference = self._difference(report)
            raise UserError(
                f"{self.folder} holds {', '.join(files)} of another order or origin{difference}; "
                "choose another out=, or give overwrite=true to replace it."
            )
        return names

    def remove(self, names: list[str]) -> None:
        """Remove files and ledgers of other results."""
        ledgers = [name for name in names if name.startswith(PREFIX)]
        for name in ledgers:
            reply_store.remove(storage.join(self.folder, name))
        files = [name for name in names if name not in ledgers]
        storage.remove_all(storage.join(self.folder, name) for name in files)

    def _others(self, report: Mapping[str, Any]) -> list[str]:
        names = {entry.name for entry in storage.entries(self.folder)}
        mine = self.ledger.folder.rsplit("/", 1)[-1]
        others = sorted(name for name in names if name.startswith(PREFIX) and name != mine)
        others += [name for name in PICTURES if name in names and not self._marks(name)]
        if "order.json" in names and self._document() != self.order.as_json():
            others.append("order.json")
        unmarked = report.keys() <= {"stages"} and report["stages"].keys() <= _STAGES
        if "report.json" in names and not unmarked and not self._reports(report):
            others.append("report.json")
        return others

    def _reports(self, report: Mapping[str, Any]) -> bool:
        """Whether a report is of this result."""
        return {"means": "", **report}.items() >= self.facts.items()

    def _marks(self, name: str) -> bool:
        """Whether a picture says that it shows this order, drawn by this bundle."""
        marks = _marks_of(storage.join(self.folder, name))
        return (marks.get("OrderDigest"), marks.get("Bundle")) == (self.order.digest, self.bundle)

    def _document(self) -> Any:
        try:
            return storage.read_json(storage.join(self.folder, "order.json"))
        except UserError:  # no JSON
            return None

    def _difference(self, report: Mapping[str, Any]) -> str:
        """Return how the result of the folder differs, for a message."""
        if report.get("order") == _earlier_digest(self.order):
            return (
                " (this order as an earlier version of raylarge began it: some settings of "
                "order.sampler had other names, such as inner for corrections)"
            )
        there = _flat(document) if isinstance(document := self._document(), dict) else {}
        here = _flat(self.order.as_json())
        keys = [key for key in sorted(here) if key in there and there[key] != here[key]]
        shown = [f"{key}={_brief(there[key])}, not {_brief(here[key])}" for key in keys[:_SHOWN]]
        more = f", and {len(keys) - _SHOWN} more settings" if len(keys) > _SHOWN else ""
        unknown = sorted(there.keys() - here.keys())
        if unknown and here.keys() - there.keys():
            names = ", order.".join(unknown[:_SHOWN])
            return f" (of another version of raylarge: order.json has order.{names})"
        if shown:
            return f" (order.{', order.'.join(shown)}{more})"
        if report.get("bundle", self.bundle) != self.bundle:
            return " (of another bundle)"
        there, here = report.get("means", self.compute) or _USUAL, self.compute or _USUAL
        return f" (computed in {there}, not {here})" if there != here else ""


def _earlier_digest(order: Order) -> str:
    """Return the digest that earlier versions gave to an order."""
    document = order.as_json()
    sampler = document["sampler"].items()
    document["sampler"] = {_EARLIER_NAMES.get(key, key): value for key, value in sampler}
    return storage.digest(json.dumps(document, sort_keys=True).encode())


def _marks_of(path: str) -> dict[Any, Any]:
    """The text fields of a picture, without its pixels; none where it has none."""
    stream = io.BufferedReader(objects.Ranges(path))
    try:
        if path.endswith(".tif"):
            with tifffile.TiffFile(stream) as file:
                fields: Any = json.loads(file.pages.first.description.partition("\n")[2])
        else:
            with Image.open(stream) as picture:
                fields = dict(picture.info)
    except (OSError, ValueError, SyntaxError, KeyError, IndexError, struct.error):
        return {}
    return fields if isinstance(fields, dict) else {}


def _flat(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested document by dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in document.items():
        nested = isinstance(value, Mapping)
        flat |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 20 else f"{text[:17]}..."
