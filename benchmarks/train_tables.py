"""Write random LATENTS with grids of random embeddings, of any nominal size.

The manifest may list the one file many times, so that a table of millions of rows is shuffled and
read as such from a fraction of the disk space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from raylarge import schema, storage

GROUP = 64
"""Rows of a row group, as in `shard`."""
LATENT = (3, 64, 64)
"""Latent of patches of 256 px with f4."""
BRCA = (12_509_760, 3_036_288, 752_000, 187_280, 57_090, 20_679, 7_923, 2_489)
"""Examples by scale of ZoomLDM's larger data set."""
BRCA_GROUPS = (32, 8, 2, 2, 2, 2, 2, 2)
"""Row groups by scale of the one file."""


def write(
    root: str,
    groups: Sequence[int],
    rows: Sequence[int] = (),
    latent: tuple[int, int, int] = LATENT,
    channels: int = 1280,
) -> int:
    """Write a table.

    Args:
        root: the data folder.
        groups: row groups of each scale in the file.
        rows: of each scale by the manifest; left out, those of the file.
        latent: shape of a latent.
        channels: of an embedding.

    Returns:
        Bytes of the file.
    """
    rng = np.random.default_rng(0)
    groups_ = [
        _group(rng, k, latent, channels) for k, count in enumerate(groups) for _ in range(count)
    ]
    table = pa.concat_tables(groups_)
    path = storage.join(root, "latents-0", "part.parquet")
    storage.write_table(path, table, [GROUP] * len(groups_))
    parts = [_part(listed, latent) for listed in _listed(groups, rows)]
    manifest = {
        "verb": "encode-0",
        "parts": parts,
        "rows": sum(size for part in parts for _, _, size in part["groups"]),
        "digest": storage.digest(repr((groups, rows, latent, channels)).encode()),
        "patch_px": 4 * latent[1],
        "encoder": {"name": "random", "width": channels},
    }
    storage.write_json(storage.join(root, "encode-0.json"), manifest)
    return storage.sizes(storage.join(root, "latents-0"))["part.parquet"]


def _listed(groups: Sequence[int], rows: Sequence[int]) -> list[list[int]]:
    """Return the scales of the row groups for each listing of the file."""
    rows = rows or [GROUP * own for own in groups]
    often = [-(-count // (GROUP * own)) for count, own in zip(rows, groups, strict=True)]
    if often != sorted(often, reverse=True):
        raise ValueError(f"{often}: a mention lists the first row groups of the file or all")
    return [
        [k for k, own in enumerate(groups) for _ in range(own) if i < often[k]]
        for i in range(often[0])
    ]


def _part(scales: Sequence[int], latent: Sequence[int]) -> dict[str, Any]:
    groups = [[k, "train", GROUP] for k in scales]
    facts = {"counts": {}, "groups": groups, "shape": list(latent)}
    return {"part": "latents-0/part.parquet", **facts}


def _group(rng: np.random.Generator, k: int, latent: Sequence[int], channels: int) -> pa.Table:
    side = min(8, 2**k)
    columns = {
        "key": rng.integers(1 << 62, size=GROUP, dtype=np.uint64),
        "labels": [[]] * GROUP,
        "flip": [0] * GROUP,
        "slide_id": [f"slide-{i % 4}" for i in range(GROUP)],
        "patient_id": ["p"] * GROUP,
        "split": ["train"] * GROUP,
        "scale": [k] * GROUP,
        "row": list(range(GROUP)),
        "column": list(range(GROUP)),
        "latent": _halves(rng, int(np.prod(latent))),
        "grid": _halves(rng, side * side * channels),
        "grid_rows": [side] * GROUP,
        "grid_columns": [side] * GROUP,
    }
    kind = schema.LATENTS
    arrays = [pa.array(columns[field.name], field.type) for field in kind]
    return pa.Table.from_arrays(arrays, schema=kind)


def _halves(rng: np.random.Generator, size: int) -> list[np.ndarray]:
    return list(rng.standard_normal((GROUP, size), dtype=np.float32).astype(np.float16))
