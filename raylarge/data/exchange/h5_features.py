"""FEATURES as TRIDENT and CLAM lay them out: one HDF5 file per slide, for their MIL code.

    FEATURES of one scale -> FOLDER/<slide_id>.h5:  features float32 [N, D], coords int64 [N, 2]

`coords` are (x, y) of the upper left corners in level-0 pixels; its attributes bear the names that
TRIDENT reads. Files are named by pseudonyms: `names.json` of the data folder says whose they are.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from omegaconf import MISSING

from raylarge import storage, tables
from raylarge.data.exchange import h5
from raylarge.data.pipeline import Facts
from raylarge.errors import UserError
from raylarge.geometry import Scale
from raylarge.slides.mpp import zoom


@dataclass(frozen=True)
class Features:
    """What `jobs/exchange.py export=features` understands.

    Attributes:
        data: the data folder.
        table: `features-<digest>`.
        out: where the files go; a path or a URL.
        scale: whose examples; another scale goes to another folder.
    """

    data: str = MISSING
    table: str = MISSING
    out: str = MISSING
    scale: int = 0


def run(config: Features) -> Facts:
    """Write one file per slide that has features of a scale.

    Returns:
        `slides`, `rows` and `output`: the folder.

    Raises:
        UserError: no such table, no row of the scale in it, or h5py is not installed.
    """
    root, table, scale = storage.absolute(config.data), config.table, config.scale
    folder = storage.absolute(config.out)
    h5py = h5.library()
    made = tables.manifest(root, table)
    if str(scale) not in made["counts"]:
        there = ", ".join(made["counts"]) or "none"
        raise UserError(f"{table} has no features of scale {scale}; its scales: {there}.")
    rows = tables.rows(root, table)
    rows = rows.filter(pc.equal(rows["scale"], scale))
    slides = storage.read_json(storage.join(root, "slides.json"))["slides"]
    known = {slide["slide_id"]: slide for slide in slides}
    runs = rows["slide_id"].combine_chunks().dictionary_encode()
    names, counts = runs.dictionary.to_pylist(), np.bincount(runs.indices.to_numpy())
    start = 0
    for name, count in zip(names, counts.tolist(), strict=True):  # rows are sorted by slide
        content = _file(h5py, rows.slice(start, count), known[name], made, scale)
        storage.write_bytes(storage.join(folder, f"{name}.h5"), content)
        start += count
    return {"slides": len(names), "rows": rows.num_rows, "output": folder}


def _file(
    h5py: Any, rows: pa.Table, slide: dict[str, Any], made: dict[str, Any], scale: int
) -> bytes:
    """One slide's file."""
    values, starts = tables.lists(rows["feature"])
    features = values[starts[0] : starts[-1]].reshape(rows.num_rows, -1).astype(np.float32)
    base_mpp, side = made["config"]["tile"]["base_mpp"], made["patch_px"]
    per_px = zoom(slide["mpp"], base_mpp)
    cells = np.stack([rows["column"].to_numpy(), rows["row"].to_numpy()], axis=1)
    coords = np.rint(cells.astype(np.float64) * (side * per_px)).astype(np.int64)
    told = {
        "patch_size": side,
        "patch_size_level0": round(side * Scale(scale).factor * per_px),
        "overlap": 0,
        "name": slide["slide_id"],
        "scale": scale,
        "mpp": Scale(scale).mpp(base_mpp),
        "level0_mpp": slide["mpp"],
    }
    taken = {key: made["config"]["features"][key] for key in ("blocks", "t", "condition", "seed")}
    sink = io.BytesIO()
    with h5py.File(sink, "w") as file:
        file.create_dataset("features", data=features).attrs.update({**taken, "name": told["name"]})
        file.create_dataset("coords", data=coords).attrs.update(told)
        file.attrs.update({"patient_id": slide["patient_id"], "table": made["verb"]})
    return sink.getvalue()
