"""encode: EXAMPLES in, LATENTS out, one set per autoencoder.

A new autoencoder means new latents, never new examples: the folder's name carries the digest of
the weights. Batches have one fixed size inside a part, so their bits do not depend on who
computes them. With flips an example becomes four rows, and its grid turns with its image
(Graikos et al. flip images alone: there the grid is one cell, which no flip changes).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float16

from raylarge import images, schema, storage
from raylarge.config import plain
from raylarge.data import derive, parts
from raylarge.data.parts import Maker
from raylarge.data.pipeline import Crew, Facts, Unit
from raylarge.errors import UserError
from raylarge.geometry import batches


@dataclass(frozen=True)
class Encode:
    """How the autoencoder is fed."""

    batch: int = 32
    flips: bool = False
    """Rows for the image mirrored left to right, upside down, and both, too."""


def run(root: str, bundle: str, config: Encode, crew: Crew) -> Facts:
    """Encode all examples with a bundle's autoencoder; write `encode-<digest>.json`.

    Returns:
        What a report wants, and `table`: the folder of the LATENTS.

    Raises:
        UserError: `shard` has not run, there is no autoencoder in the bundle, or its latents were
            made with another config.
    """
    from raylarge.models.bundle import load_autoencoder  # diffusers takes seconds to import

    parts.manifest(root, "shard", "encode")
    digest = load_autoencoder(bundle).digest
    maker = partial(Encoding, root, bundle, digest, config)
    return derive.run(root, f"latents-{digest}", maker, crew, {"encode": plain(config)})


class Encoding(Maker):
    """Makes the LATENTS of one part of the examples."""

    kind = schema.LATENTS

    def __init__(self, root: str, bundle: str, digest: str, config: Encode) -> None:
        """Load the autoencoder.

        Raises:
            UserError: the bundle's autoencoder is not the one that the run began with.
        """
        from raylarge.models.bundle import load_autoencoder

        self._root, self._config = root, config
        self._autoencoder = load_autoencoder(bundle)
        if self._autoencoder.digest != digest:
            raise UserError(
                f"the autoencoder of {bundle} changed while its latents were made; "
                "run the same command again."
            )

    def make(self, unit: Unit) -> tuple[pa.Table, Facts]:
        """A latent for every example of the part, in its order; flips follow their example."""
        table = storage.read_table(storage.join(self._root, unit["source"]))
        flips = range(4 if self._config.flips else 1)
        latents = self._encode(table["image"].to_pylist(), flips)
        lengths = np.arange(len(latents) + 1, dtype=np.int32) * int(np.prod(latents.shape[1:]))
        rows = np.repeat(np.arange(table.num_rows), len(flips))
        table = table.drop_columns(["image"]).take(pa.array(rows))
        flip = np.tile(np.arange(len(flips), dtype=np.int8), len(rows) // len(flips))
        table = table.append_column("flip", pa.array(flip))
        table = table.append_column(
            "latent", pa.ListArray.from_arrays(lengths, pa.array(latents.ravel()))
        )
        if len(flips) > 1:
            grids = pa.array([_flipped(row) for row in table.to_pylist()], pa.list_(pa.float16()))
            table = table.set_column(table.column_names.index("grid"), "grid", grids)
        groups = [[scale, split, rows * len(flips)] for scale, split, rows in unit["groups"]]
        return table, {"shape": list(latents.shape[1:]), "groups": groups}

    def _encode(self, files: list[bytes], flips: range) -> Float16[np.ndarray, "n c h w"]:
        found: list[np.ndarray] = []
        count = len(files) * len(flips)
        for batch in batches(count, self._config.batch) if count else []:
            pixels = [
                mirrored(images.from_bytes(files[i // len(flips)]), i % len(flips)) for i in batch
            ]
            with torch.inference_mode():
                latents = self._autoencoder.encode(images.to_float(np.stack(pixels)))
            found.append(latents.numpy().astype(np.float16))
        if not found:
            return np.empty((0, 0, 0, 0), np.float16)
        return np.concatenate(found)[:count]


def mirrored(image: np.ndarray, flip: int) -> np.ndarray:
    """[rows, columns, ...] under a flip: 1 reverses the columns, 2 the rows, 3 both."""
    return image[:: -1 if flip & 2 else 1, :: -1 if flip & 1 else 1]


def _flipped(row: dict[str, object]) -> np.ndarray:
    """A row's grid, turned as its flip says."""
    grid = np.array(row["grid"], np.float16)
    return mirrored(
        grid.reshape(int(str(row["grid_rows"])), int(str(row["grid_columns"])), -1),
        int(str(row["flip"])),
    ).ravel()
