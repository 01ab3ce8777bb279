"""features: LATENTS in, FEATURES out: what the U-Net's blocks make of an example's latent.

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps(seed, key)    -U-Net-> blocks -mean-> vector

One x_t at one timestep, noise at the address of the example's key, conditioned on the example's
own embeddings; each block's output is averaged over its cells, several blocks stand end to end.
Source: ZoomLDM, section 4.4 (t = 100, "output block 3", MIL); its code was never published, and
how it pools is not said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Float16, Int, UInt64

from raylarge import schema, tables
from raylarge.data import derive, parts, row_selection
from raylarge.data.embed_config import DTYPES
from raylarge.data.parts import Stage
from raylarge.data.pipeline import ActorConfig, ExecutorConfig, Facts, without_actors
from raylarge.data.units import DerivedUnit
from raylarge.diffusion import noise
from raylarge.errors import UserError
from raylarge.geometry import batches

if TYPE_CHECKING:
    from raylarge.models.bundle import Bundle

MIDDLE = -1
_SLOTS = 64  # cells of a grid as EXAMPLES store it: pooled to 8 x 8 where larger
_PARTS = ("vae", "unet", "summarizer", "scheduler")


@dataclass(frozen=True)
class FeatureConfig(ActorConfig):
    """Which features are taken, and by what means."""

    blocks: list[int] = field(default_factory=lambda: [3])
    """Output blocks in the published numbering, 0 to 11 at full size; -1 is the middle block."""
    t: int = 100  # the diffusion timestep, 0 to 999
    scales: list[int] | None = None
    """Of which examples; absent: all."""
    condition: str = "own"
    """`own`: the example's embeddings through the Summarizer; `null`: none."""
    seed: int = 0  # of the noise
    batch: int = 32  # latents of one pass
    dtype: str = "float32"
    """The networks' precision: float32, bfloat16 or float16."""

    def check(self) -> None:
        """Refuse values that make no sense with any bundle.

        Raises:
            UserError: naming the key, its value and what it may be.
        """
        for key, fine, wish in (
            ("blocks", bool(self.blocks) and min(self.blocks) >= MIDDLE, "a list of -1 and above"),
            ("t", self.t >= 0, "0 or more"),
            ("condition", self.condition in ("own", "null"), "own or null"),
            ("seed", 0 <= self.seed < 1 << 64, "0 or more"),
            ("dtype", self.dtype in DTYPES, f"one of {', '.join(DTYPES)}"),
        ):
            if not fine:
                raise UserError(f"features.{key}={getattr(self, key)}: it must be {wish}.")


def run(root: str, bundle: str, config: FeatureConfig, executor: ExecutorConfig) -> Facts:
    """Take features of all latents of a bundle's autoencoder; write `features-<digest>.json`.

    Returns:
        What a report wants, and `table`: the folder of the FEATURES.

    Raises:
        UserError: `encode` has not run with this bundle, parts of it are missing, or it has no
            such block, timestep or scale.
    """
    from raylarge.models import bundle as bundles  # diffusers takes seconds to import

    config.check()
    latents = f"latents-{bundles.digest(bundle, ('vae',))}"
    manifest = tables.manifest(root, latents)
    row_selection.require(manifest, config.scales, "features.scales")
    digest = bundles.digest(bundle, _PARTS)
    scales = None if config.scales is None else sorted(set(config.scales))
    used = {**without_actors(config), "scales": scales}
    what = {key: value for key, value in used.items() if key != "batch"}
    table = f"features-{parts.stamp(digest, what)}"
    make_stage = partial(FeatureStage, root, bundle, digest, config)
    sections = {"features": used}
    return derive.run(root, table, make_stage, config.of(executor), sections, tables.verb(latents))


class FeatureStage(Stage):
    """Makes the FEATURES of one part of the latents."""

    kind = schema.FEATURES

    def __init__(self, root: str, bundle: str, digest: str, config: FeatureConfig) -> None:
        """Load the bundle.

        Raises:
            UserError: it is not the one that the run began with, or has no such block or timestep.
        """
        from raylarge.models import bundle as bundles

        self._root, self._config = root, config
        if bundles.digest(bundle, _PARTS) != digest:
            raise UserError(
                f"the bundle {bundle} changed while features were taken; run the same command "
                "again."
            )
        dtype, rest = DTYPES[config.dtype], bundles.PARTS.keys() - set(_PARTS)
        self._bundle = bundles.load(bundle, config.device, dtype, without=rest)
        length, count = self._bundle.schedule.length, _blocks(self._bundle.unet)
        if config.t >= length:
            raise UserError(f"features.t={config.t}: {bundle} has timesteps 0 to {length - 1}.")
        if max(config.blocks) >= count:
            raise UserError(
                f"features.blocks={list(config.blocks)}: the U-Net of {bundle} has output blocks "
                f"0 to {count - 1}, and -1 for the middle."
            )

    def make(self, unit: DerivedUnit) -> tuple[pa.Table, Facts]:
        """Features of every example of the wanted scales, unflipped, in the part's order."""
        columns = [*derive.WHERE, "flip", "latent", "grid", "grid_rows", "grid_columns"]
        table, groups = row_selection.read(self._root, unit, columns, self._config.scales)
        upright = table["flip"].to_numpy() == 0
        table, groups = table.filter(pa.array(upright)), row_selection.kept(groups, upright)
        samples = Samples(table, self._bundle.patch.latent)
        self._refuse(samples)
        vectors: list[Float16[np.ndarray, "B width"]] = []
        for batch in batches(len(samples), self._config.batch) if len(samples) else []:
            raw = pooled_features(self._bundle, *samples.batch(batch), self._config)
            vectors.append(raw.cpu().numpy().astype(np.float16))
        values = (
            np.concatenate(vectors)[: len(samples)] if vectors else np.zeros((0, 0), np.float16)
        )
        if not np.isfinite(values).all():
            raise UserError("features do not fit into float16; take other features.blocks=.")
        offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
        column = pa.ListArray.from_arrays(offsets, pa.array(values.ravel()))
        return pa.table({**derive.where(table), "feature": column}), {"groups": groups}

    def _refuse(self, samples: Samples) -> None:
        scales = self._bundle.patch.scales
        if self._config.condition == "own" and samples.scale.max(initial=0) >= scales:
            raise UserError(
                f"the bundle knows scales 0 to {scales - 1}, and there are latents of scale "
                f"{samples.scale.max()}; give features.scales=, or features.condition=null."
            )


class Samples:
    """Rows of LATENTS as arrays."""

    def __init__(self, table: pa.Table, latent: tuple[int, int, int]) -> None:
        """Read the columns.

        Raises:
            UserError: latents of another shape than the bundle's.
        """
        self.key: UInt64[np.ndarray, " n"] = table["key"].to_numpy()
        self.scale = table["scale"].to_numpy().astype(np.int64)
        sides = [table[name].to_numpy() for name in ("grid_rows", "grid_columns")]
        self.size = np.stack(sides, axis=1).astype(np.int64)
        self._grid, self._start = tables.lists(table["grid"])
        values, starts = tables.lists(table["latent"])
        if (np.diff(starts) != np.prod(latent)).any():
            raise UserError(
                f"the latents have {int(starts[1] - starts[0])} values, those of the bundle are "
                f"{latent}; give the bundle that they are made for."
            )
        self._latent = values[starts[0] : starts[-1]].reshape(-1, *latent)

    def __len__(self) -> int:
        return len(self.key)

    def batch(
        self, rows: Sequence[int]
    ) -> tuple[Float[torch.Tensor, "B c h w"], UInt64[np.ndarray, " B"], GridCondition]:
        """Latents, keys and what conditions them."""
        order = list(rows)
        x_0 = torch.from_numpy(self._latent[order].astype(np.float32))
        return x_0, self.key[order], self._condition(order)

    def _condition(self, rows: list[int]) -> GridCondition:
        """Cells row by row, zeros after them, as a conditioner reads them."""
        grids = [self._grid[self._start[row] : self._start[row + 1]] for row in rows]
        channels = len(grids[0]) // int(self.size[rows[0]].prod())
        cells = np.zeros((len(rows), _SLOTS, channels), np.float32)
        for i, grid in enumerate(grids):
            cells[i, : len(grid) // channels] = grid.reshape(-1, channels)
        return GridCondition(*map(torch.from_numpy, (cells, self.scale[rows], self.size[rows])))


@dataclass(frozen=True)
class GridCondition:
    """What a conditioner makes tokens of."""

    cells: Float[torch.Tensor, "B 64 C"]
    scale: Int[torch.Tensor, " B"]
    size: Int[torch.Tensor, "B 2"]


def pooled_features(
    bundle: Bundle,
    x_0: Float[torch.Tensor, "B c h w"],
    key: UInt64[np.ndarray, " B"],
    condition: GridCondition,
    config: FeatureConfig,
) -> Float[torch.Tensor, "B width"]:
    """Spatial means of the blocks' outputs, end to end, as float32.

    Args:
        bundle: whose U-Net and Summarizer.
        x_0: clean latents.
        key: the examples' keys: where their noise stands.
        condition: their embeddings.
        config: blocks, t, condition and seed.
    """
    addresses = [noise.split_64(int(k)) for k in key]
    eps = noise.normal(x_0.shape[1:], config.seed, "features", addresses)
    x_t = bundle.schedule.noised(x_0, eps, config.t).to(bundle.device, bundle.unet.dtype)
    inputs = [one.to(bundle.device) for one in (condition.cells, condition.scale, condition.size)]
    with torch.inference_mode():
        own = config.condition == "own"
        tokens = bundle.summarizer(*inputs) if own else bundle.summarizer.null(len(x_0))
        _, outputs = bundle.unet.features(x_t, config.t, tokens)
    means = [outputs[block - MIDDLE].float().mean(dim=(2, 3)) for block in config.blocks]
    return torch.cat(means, dim=1)


def _blocks(unet: Any) -> int:
    """How many output blocks a U-Net has: one per residual layer on the way up."""
    return sum(len(block.resnets) for block in unet.up_blocks)
