"""encode: EXAMPLES in, LATENTS out, one set per autoencoder.

A new autoencoder means new latents, never new examples: the folder's name carries the digest of
the weights. Batches have one fixed size inside a part, so their bits do not depend on who
computes them.
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
from raylarge.data import parts
from raylarge.data.parts import Maker
from raylarge.data.pipeline import Facts, Unit
from raylarge.errors import UserError
from raylarge.geometry import batches


@dataclass(frozen=True)
class Encode:
    """How the autoencoder is fed."""

    batch: int = 32


def run(root: str, bundle: str, config: Encode, workers: int | None) -> Facts:
    """Encode all examples with a bundle's autoencoder; write `encode-<digest>.json`.

    Returns:
        What a report wants, and `latents`: the folder of the table.

    Raises:
        UserError: `shard` has not run, or there is no autoencoder in the bundle.
    """
    from raylarge.models.bundle import load_autoencoder  # diffusers takes seconds to import

    sharded = parts.manifest(root, "shard", "encode")
    digest = load_autoencoder(bundle).digest
    sections = {"encode": plain(config)}
    folder = f"latents-{digest}"
    units = [
        {
            "part": f"{folder}/{one['part'].rsplit('/', 1)[-1]}",
            "stamp": parts.stamp(sections, digest, one["stamp"]),
            "examples": one["part"],
        }
        for one in sharded["parts"]
    ]
    verb = f"encode-{digest}"
    facts = parts.build(root, units, partial(Encoding, root, bundle, digest, config), workers, verb)
    more = {name: sharded[name] for name in ("encoder", "patch_px")}
    done = parts.finish(
        root, verb, facts, {**sharded["config"], **sections}, input=sharded["digest"], **more
    )
    return {**done, "latents": storage.join(root, folder)}


class Encoding(Maker):
    """Makes the LATENTS of one part of the examples."""

    kind = schema.LATENTS

    def __init__(self, root: str, bundle: str, digest: str, config: Encode) -> None:
        """Load the autoencoder.

        Raises:
            UserError: the bundle's autoencoder is not the one that the run began with.
        """
        from raylarge.models.bundle import load_autoencoder

        self._root = root
        self._batch = config.batch
        self._autoencoder = load_autoencoder(bundle)
        if self._autoencoder.digest != digest:
            raise UserError(
                f"the autoencoder of {bundle} changed while its latents were made; "
                "run the same command again."
            )

    def make(self, unit: Unit) -> tuple[pa.Table, Facts]:
        """A latent for every example of the part, in its order."""
        table = storage.read_table(storage.join(self._root, unit["examples"]))
        latents = self._encode(table["image"].to_pylist())
        lengths = np.arange(len(latents) + 1, dtype=np.int32) * int(np.prod(latents.shape[1:]))
        column = pa.ListArray.from_arrays(lengths, pa.array(latents.ravel()))
        return table.append_column("latent", column), {"shape": list(latents.shape[1:])}

    def _encode(self, pngs: list[bytes]) -> Float16[np.ndarray, "n c h w"]:
        found: list[np.ndarray] = []
        for batch in batches(len(pngs), self._batch) if pngs else []:
            pixels = np.stack([images.from_bytes(pngs[i]) for i in batch])
            with torch.inference_mode():
                latents = self._autoencoder.encode(images.to_float(pixels))
            found.append(latents.numpy().astype(np.float16))
        if not found:
            return np.empty((0, 0, 0, 0), np.float16)
        return np.concatenate(found)[: len(pngs)]
