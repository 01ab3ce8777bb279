"""Read the HDF5 files of CLAM and TRIDENT, and refuse what is not laid out as these tools do.

    FILE.h5: coords [N, 2] as (x, y), features [N, D]  ->  Patches, float16 [N, D]

Both tools store attributes as numbers or as arrays of one number, and features with or without a
leading axis of 1. The file is not named in messages, since a patient may be in its name.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float16, Int64

from raylarge import storage
from raylarge.errors import SlideError, UserError
from raylarge.storage.objects import Ranges
from raylarge.storage.retry import PreconditionFailed

Cells = Int64[np.ndarray, "n 2"]
Vectors = Float16[np.ndarray, "n width"]
_READ_BYTES = 256 << 10  # of a file of a store at a time; larger data come at one go
_SLAB = 8192  # vectors that are read together
_MOST_PATCHES = 1 << 24
"""Patches of one file: 64 times those of the largest scans, and 256 MB of coords."""
_FARTHEST_PX = 1 << 40
_UNEVEN = 0.01
"""By which the downsample factors of both axes may differ: levels are rounded to whole pixels."""
_DAMAGE = (OSError, RuntimeError, LookupError, ValueError, TypeError, MemoryError)
"""What h5py raises for files that are cut short or garbled."""


class Patches(NamedTuple):
    """What a file says about its patches, in level-0 pixels."""

    xy: Cells
    """Of the upper left corners: (x, y), not (row, column)."""
    side_l0: float
    features: tuple[int, ...]
    """Shape (N, D) of the vectors beside them; () where there are none."""
    size_l0: tuple[float, float] | None = None
    """(rows, columns) of the slide that was cut, where the file says so."""


def library() -> Any:
    """Return h5py, which only these formats need.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module("h5py")
    except ImportError as error:
        raise UserError("HDF5 files need the package h5py: pip install 'raylarge[h5]'.") from error


@contextmanager
def opened(path: str) -> Iterator[Any]:
    """Open an HDF5 file for reading; of one of a store only what is asked for is fetched.

    Raises:
        SlideError: it is no HDF5 file, or what is read of it is damaged.
        UserError: the store fails.
    """
    source: Any = path.removeprefix("file://")
    try:
        if not storage.is_local(path):
            source = io.BufferedReader(Ranges(path), _READ_BYTES)
        with library().File(source, "r") as file:
            yield file
    except UserError as error:
        raise type(error)(str(error).replace(path, "its h5")) from error
    except PreconditionFailed as error:
        raise UserError("its h5 changes while it is read; run again when it stands") from error
    except _DAMAGE as error:
        raise SlideError("its h5 is missing, damaged or no HDF5 file") from error


def patches(paths: Sequence[str]) -> Patches:
    """Return coords and features' shape of the first file; sizes by the first file that has them.

    Raises:
        SlideError: no coords [N, 2] in it, features that are not [N, D], no file that says how
            wide a patch is, or files whose coords differ.
    """
    with opened(paths[0]) as file:
        xy = _coords(file)
        shape = _features_shape(file)
        side_l0, size_l0 = _sizes(file["coords"].attrs)
    for path in () if side_l0 else paths[1:]:
        with opened(path) as file:
            others = _coords(file)
            side_l0, size_l0 = _sizes(file["coords"].attrs)
        if not np.array_equal(_ordered(others), _ordered(xy)):
            raise SlideError(
                f"its h5 in patches= has {len(others)} coords, not the {len(xy)} of the one with "
                "features; give the files that the features were computed from"
            )
    if not side_l0:
        raise SlideError(
            "its coords do not tell patch_size; give patches=, a folder of files that do"
        )
    return Patches(xy, side_l0, shape, size_l0)


def vectors(path: str, layout: Patches) -> Vectors:
    """Return all features of a file as half-precision numbers, in the order of its coords.

    Raises:
        SlideError: features that are NaN, infinite, or beyond half precision.
    """
    array = np.empty(layout.features, np.float16)
    with opened(path) as file, np.errstate(over="ignore"):
        dataset = file["features"]
        for start in range(0, len(array), _SLAB):
            rows = slice(start, start + _SLAB)
            array[rows] = dataset[0, rows] if len(dataset.shape) == 3 else dataset[rows]
    bad: Bool[np.ndarray, " n"] = np.logical_not(np.isfinite(array).all(axis=1))
    if bad.any():
        x, y = layout.xy[bad][0].tolist()
        raise SlideError(
            f"its h5 holds features that are no finite half-precision numbers in {int(bad.sum())} "
            f"of {len(array)} patches, the first at x={x}, y={y}; compute them again (NaN or "
            "infinity), or scale them below 65504"
        )
    return array


def _coords(file: Any) -> Cells:
    dataset, (count, width) = _matrix(file, "coords")
    if width != 2 or dataset.dtype.kind not in "iuf":
        raise SlideError(
            f"its h5 holds coords of shape {dataset.shape} and type {dataset.dtype}, not the "
            "numbers (x, y) of each patch [N, 2]"
        )
    if count > _MOST_PATCHES:
        raise SlideError(f"its h5 claims {count} patches; at most {_MOST_PATCHES} are read")
    values = np.asarray(dataset[...]).reshape(count, 2)
    bad = ~(np.abs(values.astype(np.float64)) < _FARTHEST_PX).all(axis=1)
    if bad.any():
        raise SlideError(
            f"its h5 has coords that no slide has in {int(bad.sum())} of {count} patches, the "
            f"first {values[bad][0].tolist()} in row {int(bad.argmax())}"
        )
    return np.rint(values).astype(np.int64)


def _features_shape(file: Any) -> tuple[int, ...]:
    """Return (N, D) of the features; () where the file has none, as files of coords alone."""
    if "features" not in file:
        return ()
    dataset, shape = _matrix(file, "features")
    if dataset.dtype.kind != "f":
        raise SlideError(
            f"its h5 holds features of type {dataset.dtype}; floating-point ones are read"
        )
    return shape


def _matrix(file: Any, name: str) -> tuple[Any, tuple[int, int]]:
    """Return a dataset and its shape [N, D], without a leading axis of 1 before those two."""
    entry = file.get(name)
    shape = getattr(entry, "shape", None)
    if shape is None:
        content = ", ".join(repr(str(key)) for key in list(file)[:8]) or "nothing"
        raise SlideError(f"its h5 holds no '{name}' with values; it holds {content}")
    if len(shape) == 3 and shape[0] == 1:
        shape = shape[1:]
    if len(shape) != 2:
        raise SlideError(
            f"its h5 holds {name} of shape {entry.shape}, not one row per patch "
            f"[N, {2 if name == 'coords' else 'D'}]"
        )
    return entry, (int(shape[0]), int(shape[1]))


def _ordered(xy: Cells) -> Cells:
    return xy[np.lexsort((xy[:, 0], xy[:, 1]))]


def _sizes(attributes: Mapping[str, Any]) -> tuple[float, tuple[float, float] | None]:
    """Return a patch's side in level-0 pixels (0: unknown) and the slide's (rows, columns)."""
    size_l0 = None
    if "level0_width" in attributes and "level0_height" in attributes:
        columns, rows = (_number(attributes, f"level0_{side}") for side in ("width", "height"))
        size_l0 = (rows, columns)
    if "patch_size_level0" in attributes:
        return _above_0(attributes, "patch_size_level0"), size_l0
    level = _number(attributes, "patch_level") if "patch_level" in attributes else 1
    if "patch_size" not in attributes or ("downsample" not in attributes and level):
        return 0.0, size_l0
    side = _above_0(attributes, "patch_size")
    for key in ("downsample", "custom_downsample"):
        side *= _above_0(attributes, key) if key in attributes else 1
    return side, size_l0


def _above_0(attributes: Mapping[str, Any], key: str) -> float:
    value = _number(attributes, key)
    if value <= 0:
        raise SlideError(f"its coords have {key}={value:g}; it must be above 0")
    return value


def _number(attributes: Mapping[str, Any], key: str) -> float:
    """Return an attribute that is a number, or an array of one number for both axes.

    Raises:
        SlideError: it is none.
    """
    value = attributes[key]
    try:
        numbers = np.ravel(np.asarray(value)).astype(np.float64)
    except (TypeError, ValueError):
        numbers = np.empty(0)
    first = float(numbers[0]) if len(numbers) else np.nan
    if not (np.abs(numbers - first) <= _UNEVEN * abs(first)).all() or not np.isfinite(first):
        raise SlideError(f"its coords have {key}={str(value)[:40]}, which is not one number")
    return first
