"""The slides of a data folder and their kept examples, for the verbs after `tile`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from raylarge import storage
from raylarge.config import plain
from raylarge.data import name_table, slide_index
from raylarge.data.tile_candidates import TileConfig
from raylarge.data.units import SlideFacts
from raylarge.errors import UserError
from raylarge.storage import web


def section(config: TileConfig) -> dict[str, Any]:
    """What of the config all slides depend on: no salt, and no file that may grow."""
    values = plain(config)
    for name in ("table", "labels", "mpp", "unlisted"):
        values.pop(name)
    for name in ("scene", "bands", "value_range"):  # unset, they leave older folders as they are
        if not values[name]:
            values.pop(name)
    values["salt"] = slide_index.trace(config.salt)
    if config.views == 1:  # tables of before there were views stay valid
        values.pop("views")
    if not config.base_crops:
        values.pop("base_crops")
    values["split"] = "file" if slide_index.is_file(config.split) else config.split
    values["mask"] = "file" if "{name}" in config.mask else config.mask
    return values


def slides_of(root: str) -> list[SlideFacts]:
    """Return the tiled slides of a data folder.

    Raises:
        UserError: it is not known which files they are.
    """
    names = _names(root)
    slides: list[dict[str, Any]] = storage.read_json(storage.join(root, "slides.json"))["slides"]
    unknown = {slide["slide_id"] for slide in slides} - names.keys()
    if unknown:
        raise UserError(
            f"{root}/names.json does not say which files {len(unknown)} of {len(slides)} slides "
            "are; run verbs=tile with slides= and the same tile.salt= again."
        )
    return [SlideFacts.from_json(one, web.full_url(names[one["slide_id"]])) for one in slides]


def file_names(root: str) -> dict[str, str]:
    """The file name of each slide by its pseudonym."""
    return {slide_id: name_table.file_name(path) for slide_id, path in _names(root).items()}


def _names(root: str) -> dict[str, str]:
    """Which file each slide is; nothing where nobody has said."""
    path = storage.join(root, "names.json")
    names: dict[str, str] = storage.read_json(path) if storage.exists(path) else {}
    return names


def remember(root: str, entries: Sequence[slide_index.Entry]) -> None:
    """Add to what is known of the files: a slide that is left out may come back."""
    names = {**_names(root), **{entry.slide_id: web.remember_url(entry.path) for entry in entries}}
    storage.write_json(storage.join(root, "names.json"), names)


def kept(root: str, slide_id: str) -> pa.Table:
    """The kept examples of a slide among its TILES."""
    table = storage.read_table(storage.join(root, "tiles", f"{slide_id}.parquet"))
    return table.filter(table["kept"])


def scale_and_cells(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """The columns of TILES as arrays: scale [n], (row, column) [n, 2]."""
    cells = np.stack([table[name].to_numpy() for name in ("row", "column")], axis=1)
    return table["scale"].to_numpy(), cells.astype(np.int64)
