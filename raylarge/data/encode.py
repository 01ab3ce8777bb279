"""encode: EXAMPLES in, LATENTS out, one set per autoencoder.

A new autoencoder means new latents, never new examples: the folder's name carries the digest of
the weights. Batches have one fixed size inside a part, so their bits do not depend on who
computes them. With flips an example becomes four rows, and its grid turns with its image
(Graikos et al. flip images alone: there the grid is one cell, which no flip changes).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float16

from raylarge import images, schema, storage, tables
from raylarge.data import derive, parts
from raylarge.data.parts import Stage
from raylarge.data.pipeline import ActorConfig, ExecutorConfig, Facts, without_actors
from raylarge.data.units import DerivedUnit
from raylarge.errors import UserError
from raylarge.geometry import batches
from raylarge.pixels import mirrored


@dataclass(frozen=True)
class EncodeConfig(ActorConfig):
    """How the autoencoder is fed."""

    batch: int = 32  # images of one pass
    flips: bool = False
    """Rows for the image mirrored left to right, upside down, and both, too."""


def run(root: str, bundle: str, config: EncodeConfig, executor: ExecutorConfig) -> Facts:
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
    make_stage = partial(EncodeStage, root, bundle, digest, config)
    sections = {"encode": without_actors(config)}
    return derive.run(root, f"latents-{digest}", make_stage, config.of(executor), sections)


class EncodeStage(Stage):
    """Makes the LATENTS of one part of the examples."""

    kind = schema.LATENTS

    def __init__(self, root: str, bundle: str, digest: str, config: EncodeConfig) -> None:
        """Load the autoencoder.

        Raises:
            UserError: the bundle's autoencoder is not the one that the run began with.
        """
        from raylarge.models.bundle import load_autoencoder

        self._root, self._config = root, config
        self._autoencoder = load_autoencoder(bundle).to(config.device)
        if self._autoencoder.digest != digest:
            raise UserError(
                f"the autoencoder of {bundle} changed while its latents were made; "
                "run the same command again."
            )

    def make(self, unit: DerivedUnit) -> tuple[pa.Table, Facts]:
        """A latent for every example of the part, in its order; flips follow their example."""
        table = storage.read_table(storage.join(self._root, unit.source))
        flips = 4 if self._config.flips else 1
        latents = self._encode(table["image"].to_pylist(), flips, unit.source)
        table = table.drop_columns(["image"]).take(np.repeat(np.arange(table.num_rows), flips))
        flip = np.tile(np.arange(flips, dtype=np.int8), table.num_rows // flips)
        table = table.append_column("flip", pa.array(flip))
        flat = latents.reshape(len(latents), math.prod(latents.shape[1:]))
        table = table.append_column("latent", _lists(flat))
        if flips > 1:
            where = table.column_names.index("grid")
            table = table.set_column(where, "grid", _flipped(table))
        groups = [[scale, split, rows * flips] for scale, split, rows in unit.groups]
        return table, {"shape": list(latents.shape[1:]), "groups": groups}

    def _encode(
        self, files: list[bytes], flips: int, source: str
    ) -> Float16[np.ndarray, "n c h w"]:
        """Return the latents of image files, each under all flips.

        Raises:
            UserError: latents that float16 cannot hold; `source` names the part of the examples.
        """
        encoded: list[np.ndarray] = []
        count = len(files) * flips
        for batch in batches(count, self._config.batch) if count else []:
            pixels = [mirrored(images.from_bytes(files[i // flips]), i % flips) for i in batch]
            x = images.to_float(np.stack(pixels)).to(self._config.device)
            with torch.inference_mode():
                latents = self._autoencoder.encode(x).to(torch.float16).cpu().numpy()
            if not np.isfinite(latents).all():
                raise UserError(
                    f"encode: the autoencoder's latents hold NaN or values beyond float16 among "
                    f"rows {batch[0] // flips} to {max(batch) // flips} of {source}; train the "
                    f"autoencoder again: its latents should have a deviation of about 1."
                )
            encoded.append(latents)
        if not encoded:
            return np.empty((0, 0, 0, 0), np.float16)
        return np.concatenate(encoded)[:count]


def _lists(values: Float16[np.ndarray, "n m"]) -> pa.ListArray:
    if values.size >= 1 << 31:
        raise UserError(
            f"a part of {len(values)} latents is more than a parquet list holds; prepare with "
            "more shard.buckets=."
        )
    offsets = np.arange(len(values) + 1, dtype=np.int32) * np.int32(values.shape[-1])
    return pa.ListArray.from_arrays(offsets, pa.array(values.ravel()))


def _flipped(table: pa.Table) -> pa.ListArray:
    """The grids of rows, each turned as its flip says."""
    values, starts = tables.lists(table["grid"])
    turned = values.copy()
    shapes = zip(table["grid_rows"].to_pylist(), table["grid_columns"].to_pylist(), strict=True)
    for i, (shape, flip) in enumerate(zip(shapes, table["flip"].to_pylist(), strict=True)):
        if shape != (1, 1) and flip:
            grid = values[starts[i] : starts[i + 1]].reshape(*shape, -1)
            turned[starts[i] : starts[i + 1]] = mirrored(grid, flip).ravel()
    return pa.ListArray.from_arrays(pa.array(starts), pa.array(turned))
