"""FEATURES as TRIDENT and CLAM lay them out: one HDF5 file per slide, for their MIL code.

    FEATURES of one scale -> FOLDER/<slide_id>.h5:  features float32 [N, D], coords int64 [N, 2]

Parts are read one by one; their rows are collected in a temporary file per slide ($TMPDIR).
`coords` are (x, y) of the upper left corners in level-0 pixels; its attributes have the names
that TRIDENT reads. Files are named by pseudonyms: `names.json` of the data folder maps them
to file names.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
from jaxtyping import Float16, Int64
from omegaconf import MISSING

from raylarge import report, storage, tables
from raylarge.data import row_selection
from raylarge.data.exchange import h5_read
from raylarge.data.pipeline import Facts
from raylarge.data.units import DerivedUnit
from raylarge.errors import UserError
from raylarge.geometry import Scale
from raylarge.slides.mpp import zoom


@dataclass(frozen=True)
class Features:
    """Configuration of `jobs/exchange.py export=features`.

    Attributes:
        data: the data folder. Example: data.
        table: `features-<digest>`. Example: features-0123abcd.
        out: where the files go; a path or a URL. Example: features.
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
    h5py = h5_read.library()
    manifest = tables.manifest(root, table)
    if str(scale) not in manifest["counts"]:
        there = ", ".join(manifest["counts"]) or "none"
        raise UserError(f"{table} has no features of scale {scale}; its scales: {there}.")
    slides = storage.read_json(storage.join(root, "slides.json"))["slides"]
    slide_by_id = {slide["slide_id"]: slide for slide in slides}
    with tempfile.TemporaryDirectory() as spool:
        counts = _spool(root, manifest, scale, spool)
        for name in report.progress(sorted(counts), "slides", unit="slide"):
            content = _file(
                h5py, _Rows.of(spool, name, counts[name]), slide_by_id[name], manifest, scale
            )
            storage.write_bytes(storage.join(folder, f"{name}.h5"), content)
    return {"slides": len(counts), "rows": sum(counts.values()), "output": folder}


def _spool(root: str, manifest: Mapping[str, Any], scale: int, folder: str) -> dict[str, int]:
    """Append the rows of a scale to a pair of files per slide; return their number by slide."""
    counts: dict[str, int] = {}
    mine = [part for part in manifest["parts"] if str(scale) in part["counts"]]
    for part in report.progress(mine, "parts", unit="part"):
        unit = DerivedUnit(source=part["part"], groups=part["groups"])
        table, _ = row_selection.read(root, unit, ["slide_id", "row", "column", "feature"], [scale])
        for name in table["slide_id"].unique().to_pylist():
            rows = table.filter(pc.equal(table["slide_id"], name))
            cells = np.stack([rows["row"].to_numpy(), rows["column"].to_numpy()], axis=1)
            values, starts = tables.lists(rows["feature"])
            for kind, array in (
                ("cells", cells.astype(np.int64)),
                ("features", values[starts[0] : starts[-1]]),
            ):
                with Path(folder, f"{name}.{kind}").open("ab") as sink:
                    sink.write(array.tobytes())
            counts[name] = counts.get(name, 0) + len(cells)
    return counts


class _Rows(NamedTuple):
    """The rows of a slide's file, sorted by row and column."""

    cells: Int64[np.ndarray, "n 2"]
    features: Float16[np.ndarray, "n width"]

    @classmethod
    def of(cls, folder: str, name: str, count: int) -> _Rows:
        """Read and remove the temporary files of a slide."""
        paths = [Path(folder, f"{name}.{kind}") for kind in ("cells", "features")]
        cells = np.fromfile(paths[0], np.int64).reshape(count, 2)
        features = np.fromfile(paths[1], np.float16).reshape(count, -1)
        for path in paths:
            path.unlink()
        order = np.lexsort((cells[:, 1], cells[:, 0]))
        return cls(cells[order], features[order])


def _file(
    h5py: Any, rows: _Rows, slide: Mapping[str, Any], manifest: Mapping[str, Any], scale: int
) -> bytes:
    """Return the bytes of one slide's HDF5 file."""
    base_mpp, side = manifest["config"]["tile"]["base_mpp"], manifest["patch_px"]
    per_px = zoom(slide["mpp"], base_mpp)
    coords = np.rint(rows.cells[:, ::-1] * (side * per_px)).astype(np.int64)
    attributes = {
        "patch_size": side,
        "patch_size_level0": round(side * Scale(scale).factor * per_px),
        "overlap": 0,
        "name": slide["slide_id"],
        "scale": scale,
        "mpp": Scale(scale).mpp(base_mpp),
        "level0_mpp": slide["mpp"],
    }
    settings = {
        key: manifest["config"]["features"][key] for key in ("blocks", "t", "condition", "seed")
    }
    sink = io.BytesIO()
    with h5py.File(sink, "w") as file:
        vectors = rows.features.astype(np.float32)
        file.create_dataset("features", data=vectors).attrs.update(
            {**settings, "name": attributes["name"]}
        )
        file.create_dataset("coords", data=coords).attrs.update(attributes)
        file.attrs.update({"patient_id": slide["patient_id"], "table": manifest["verb"]})
    return sink.getvalue()
