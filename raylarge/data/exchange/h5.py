"""Write EMBEDDINGS as CLAM and TRIDENT lay them out (`h5_read.py` reads theirs).

    clam       FOLDER/patches/<slide>.h5, h5_files/<slide>.h5, pt_files/<slide>.pt
    trident    FOLDER/20x_256px_0px_overlap/patches/<slide>_patches.h5
                                            features_<encoder>/<slide>.h5

`coords` are (x, y) of upper left corners in level-0 pixels, whatever the scale of the patches, and
their attributes give the width of a patch. Slides are named by pseudonym. Source: save_h5 and
coords_to_h5 of github.com/mahmoodlab/TRIDENT, extract_features_fp.py of mahmoodlab/CLAM.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int64
from omegaconf import MISSING

from raylarge import config as configs
from raylarge import storage, tables
from raylarge.data import parts, pipeline
from raylarge.data.exchange.h5_read import Cells, Patches, Vectors, library, opened, patches
from raylarge.data.pipeline import ExecutorConfig, Facts
from raylarge.data.tile_candidates import TileConfig
from raylarge.data.tile_table import kept, scale_and_cells, slides_of
from raylarge.data.units import Unit
from raylarge.errors import UserError
from raylarge.slides.mpp import zoom

FORMATS = ("clam", "trident")
_INSET = 1 / 32
"""Of a patch: a mask's polygons own the pixels that their edges touch (`slides/masks.py`)."""


@dataclass(frozen=True)
class Export:
    """Configuration of an export of EMBEDDINGS."""

    data: str = MISSING  # the data folder. Example: data
    out: str = MISSING  # where the files go. Example: trident
    format: str = "trident"  # trident or clam
    cells: str = "valid"
    """`valid`: every tile with an embedding; `kept`: those that are examples of scale 0."""
    workers: int | None = None  # Ray workers; null: this process

    def check(self) -> None:
        """Refuse values that make no sense.

        Raises:
            UserError: naming the key, its value and what it may be.
        """
        if self.format not in FORMATS:
            raise UserError(f"export={self.format}: it must be one of {', '.join(FORMATS)}.")
        if self.cells not in ("valid", "kept"):
            raise UserError(f"cells={self.cells}: it must be valid or kept.")


@dataclass(frozen=True, kw_only=True)
class ExportUnit(Unit):
    """A slide whose files are written, and the parts of EMBEDDINGS that they come from."""

    mpp: float
    size_l0: Sequence[int]
    parts: Sequence[str]


def run(config: Export) -> Facts:
    """Write one set of files per slide; skip slides whose files are up to date.

    Returns:
        `slides`, `cells`, `made` (number of slides written in this run) and `output`.

    Raises:
        UserError: `embed` has not run, or h5py is not installed.
    """
    config.check()
    library()
    root, out = storage.absolute(config.data), storage.absolute(config.out)
    tiles, embedded = (parts.manifest(root, verb, "export") for verb in ("tile", "embed"))
    tile = tile_of(tiles)
    named = [one["part"] for one in embedded["parts"]]
    units = [
        ExportUnit(
            slide_id=slide.slide_id,
            mpp=slide.mpp,
            size_l0=slide.size_l0,
            part=f"h5 of {slide.slide_id}",
            parts=[part for part in named if f"/{slide.slide_id}-" in part],
            stamp=parts.stamp(config.format, config.cells, slide.stamp, embedded["digest"]),
        )
        for slide in slides_of(root)
        if slide.slide_id not in embedded["lost"]
    ]
    work = partial(Exporting, (root, out), config, tile, embedded["encoder"])
    facts = pipeline.run(units, work, ExecutorConfig(workers=config.workers), "export")
    totals = {key: sum(one[key] for one in facts) for key in ("cells", "made")}
    return {"slides": len(facts), **totals, "output": out}


def tile_of(manifest: Mapping[str, Any]) -> TileConfig:
    """The config that made TILES, as far as their place and size go (its salt is a digest)."""
    return configs.build(TileConfig, manifest["config"]["tile"]).require_one_view()


class Exporting:
    """Writes the files of one slide; the one with the features last, with a stamp in it."""

    def __init__(
        self, folders: tuple[str, str], config: Export, tile: TileConfig, encoder: Mapping[str, Any]
    ) -> None:
        """Store (data folder, output folder), the config, and how tiles and vectors were made."""
        self._root, self._out = folders
        self._config, self._tile, self._encoder = config, tile, encoder

    def __call__(self, unit: ExportUnit) -> Facts:
        """Write the files of a slide; return its number of `cells` and `made` (0 if up to date)."""
        name = unit.slide_id
        of_coords, of_features = self._paths(name)
        standing = _standing(storage.join(self._out, of_features), unit.stamp)
        if standing is not None:
            return {"cells": standing, "made": 0}
        cells, vectors = self._content(unit)
        per_px = zoom(unit.mpp, self._tile.base_mpp)
        xy = np.rint(cells[:, ::-1] * (self._tile.patch_px * per_px)).astype(np.int64)
        features, stamp = vectors.astype(np.float32), {"raylarge": unit.stamp}
        attributes = {"coords": self._attributes(name, per_px, unit.size_l0)}
        self._write(of_coords, {"coords": xy}, attributes)
        if self._config.format == "clam":
            sink = io.BytesIO()
            torch.save(torch.from_numpy(features), sink)
            storage.write_bytes(storage.join(self._out, "pt_files", f"{name}.pt"), sink.getvalue())
            attributes, xy = {}, xy.astype(np.int32)
        else:
            attributes["features"] = {"name": name, "savetodir": of_features.rsplit("/", 1)[0]}
        self._write(of_features, {"features": features, "coords": xy}, attributes, stamp)
        return {"cells": len(cells), "made": 1}

    def _paths(self, name: str) -> tuple[str, str]:
        """Return the paths of the coords and the features files, relative to the folder."""
        if self._config.format == "clam":
            return f"patches/{name}.h5", f"h5_files/{name}.h5"
        folder = f"{self._magnification:g}x_{self._tile.patch_px}px_0px_overlap"
        encoder = str(self._encoder["name"]).replace(":", "_")
        return f"{folder}/patches/{name}_patches.h5", f"{folder}/features_{encoder}/{name}.h5"

    @property
    def _magnification(self) -> int | float:
        """20 at 0.5 um/px: both tools count in objectives."""
        return _whole(10 / self._tile.base_mpp)

    def _attributes(self, name: str, per_px: float, size_l0: Sequence[int]) -> dict[str, Any]:
        """Return the attributes of coords under the names that each tool reads."""
        side, side_l0 = self._tile.patch_px, round(self._tile.patch_px * per_px)
        if self._config.format == "clam":
            size = np.array(size_l0[::-1])
            level = {"patch_level": 0, "downsample": np.array([1.0, 1.0]), "level_dim": size}
            more = {"downsampled_level_dim": size, "name": name, "save_path": "patches"}
            return {"patch_size": side_l0, **level, **more}
        return {
            "patch_size": side,
            "patch_size_level0": side_l0,
            "level0_magnification": _whole(self._magnification * per_px),
            "target_magnification": self._magnification,
            "overlap": 0,
            "name": name,
            "savetodir": self._paths(name)[0].split("/", 1)[0],
            "level0_width": size_l0[1],
            "level0_height": size_l0[0],
        }

    def _content(self, unit: ExportUnit) -> tuple[Cells, Vectors]:
        """Return (row, column) of the slide's cells and their vectors, row by row."""
        selected = None
        if self._config.cells == "kept":
            scale, cells = scale_and_cells(kept(self._root, unit.slide_id))
            selected = cells[scale == 0]
        blocks = [_of_block(storage.join(self._root, part), selected) for part in unit.parts]
        if not blocks:
            width = self._encoder["width"]
            return np.empty((0, 2), np.int64), np.empty((0, width), np.float16)
        return np.concatenate([c for c, _ in blocks]), np.concatenate([v for _, v in blocks])

    def _write(
        self,
        path: str,
        content: Mapping[str, np.ndarray],
        attributes: Mapping[str, Mapping[str, Any]],
        stamp: Mapping[str, str] | None = None,
    ) -> None:
        sink = io.BytesIO()
        with library().File(sink, "w") as file:
            file.attrs.update(stamp or {})
            for name, values in content.items():
                file.create_dataset(name, data=values).attrs.update(attributes.get(name, {}))
        storage.write_bytes(storage.join(self._out, path), sink.getvalue())


def _whole(value: float) -> int | float:
    """Return a magnification as the tools write it: an integer where it is one."""
    near = round(value)
    return near if near and abs(value / near - 1) < 1e-6 else value


def _of_block(path: str, selected: Int64[np.ndarray, "selected 2"] | None) -> tuple[Cells, Vectors]:
    """Return (row, column) and vectors of a part's valid cells, or of those in `selected`."""
    table = storage.read_table(path)
    rows, columns = table["row"].to_numpy(), table["columns"][0].as_py()
    chosen: Bool[np.ndarray, "rows columns"] = tables.lists(table["valid"])[0].reshape(-1, columns)
    if selected is not None:
        inside = selected[np.isin(selected[:, 0], rows)]
        marks = np.zeros(chosen.shape, bool)
        marks[inside[:, 0] - int(rows[0]), inside[:, 1]] = True
        chosen = chosen & marks
    vectors = tables.lists(table["embedding"])[0].reshape(*chosen.shape, -1)[chosen]
    return np.argwhere(chosen).astype(np.int64) + np.array([int(rows[0]), 0]), vectors


def _standing(path: str, stamp: str) -> int | None:
    """Return the number of rows of a features file, or None if its stamp differs."""
    if not storage.exists(path):
        return None
    with opened(path) as file:
        return len(file["coords"]) if file.attrs.get("raylarge") == stamp else None


@dataclass(frozen=True)
class Outlines:
    """Configuration of an export of tissue masks."""

    source: str = MISSING
    """A folder of h5 files with coords, such as TRIDENT's `patches`. Example: trident/patches."""
    out: str = MISSING  # where the masks go. Example: masks


def outlines(config: Outlines) -> Facts:
    """Write the area of each file's patches as GeoJSON that `tile.mask='OUT/{name}.geojson'` reads.

    Returns:
        `slides`, `patches` and `output`.

    Raises:
        UserError: no file there, or one without coords.
    """
    paths = storage.children(storage.absolute(config.source), "*.h5")
    if not paths:
        raise UserError(f"source={config.source}: there is no .h5 file in it.")
    count = 0
    for path in paths:
        name = path.rsplit("/", 1)[-1].removesuffix(".h5").removesuffix("_patches")
        try:
            covered = patches([path])
        except UserError as error:
            raise UserError(f"{path}: {error}.") from error
        shape = {"type": "MultiPolygon", "coordinates": [[ring] for ring in _rings(covered)]}
        feature = {"type": "Feature", "properties": {}, "geometry": shape}
        document = {"type": "FeatureCollection", "features": [feature]}
        storage.write_json(storage.join(config.out, f"{name}.geojson"), document)
        count += len(covered.xy)
    return {"slides": len(paths), "patches": count, "output": config.out}


def _rings(covered: Patches) -> Iterator[list[list[float]]]:
    """Yield a rectangle around each run of adjacent patches, inset by `_INSET` of a side."""
    inset, side = covered.side_l0 * _INSET, covered.side_l0
    xy = covered.xy[np.lexsort((covered.xy[:, 0], covered.xy[:, 1]))]
    gaps = (np.diff(xy[:, 1]) != 0) | (np.diff(xy[:, 0]) > side + 1)
    for run in np.split(xy, np.flatnonzero(gaps) + 1) if len(xy) else []:
        left, top = (run[0] + inset).tolist()
        right, bottom = (run[-1] + side - inset).tolist()
        yield [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
