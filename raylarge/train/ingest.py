"""From tables on a disk or in S3 to batches, by row groups: never a whole table in memory.

    sample -`sequence`-> row group, row      manifests -> which row groups there are
    row group -> arrays, read ahead by threads, kept while its super-block is in use

The first table leads: its rows are the samples. The others hold the same rows in the same
parts and row groups (`data/derive.py`); LATENTS may repeat each for its flips. What a batch
holds does not depend on who asks: the world size only divides the work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from raylarge import images, storage, tables
from raylarge.errors import UserError
from raylarge.images import Pixels
from raylarge.models import bundle as bundles
from raylarge.models.conditioner import SLOTS
from raylarge.pixels import mirrored
from raylarge.train.rows import Group, RowGroup, Table, manifest_groups
from raylarge.train.sequence import Place, Sequencer
from raylarge.train.task import Batch, DataFacts, Recipe

CACHE_BYTES = 1 << 30  # of row groups that no super-block needs at present
READERS = 4  # threads


class Label(NamedTuple):
    """A label of slides, and its values in the order of their indices."""

    name: str
    classes: tuple[str, ...]

    def of(self, group: Group, row: int) -> int:
        """Which of its values a row has.

        Raises:
            UserError: none of them.
        """
        value = (group.labels or [])[row].get(self.name, "")
        if value not in self.classes:
            raise UserError(
                f"a row has {self.name}='{value}', which is none of {', '.join(self.classes)}; "
                f"prepare the data again with this label for all slides."
            )
        return self.classes.index(value)


class Ingest:
    """The rows of one split of some tables that go together."""

    def __init__(
        self,
        root: str,
        columns: Mapping[str, Sequence[str]],
        recipe: Recipe,
        split: str = "train",
        scales: Sequence[int] | None = None,
        label: Label | None = None,
    ) -> None:
        """Find the row groups of a split; no row is read but those of one row group.

        Args:
            root: the data folder; a path or an `s3://` URL.
            columns: what is read of each table (`examples`, `latents-<digest>`, …): `image`,
                `latent`, `grid`, `vector`; the first table leads.
            recipe: gives seed, scale_weights and super_block.
            split: rows of other splits are left out.
            scales: rows of other scales are left out; None keeps all.
            label: of the slides' labels, the one that becomes `label` of a batch.

        Raises:
            UserError: no table, one of another version, no row of the split or of a scale, unfit
                weights, tables that do not go together.
        """
        lead = next(iter(columns))
        wanted = {**columns, lead: (*columns[lead], "labels")} if label else columns
        self._tables = [Table(root, name, some) for name, some in wanted.items()]
        groups = manifest_groups(self._tables, split, scales)
        self._groups: dict[int, list[RowGroup]] = groups
        sizes = {k: [group.rows for group in found] for k, found in groups.items()}
        weights = recipe.scale_weights if split == "train" else ()
        self._sequence = Sequencer(sizes, weights, recipe.seed, recipe.super_block)
        self._turn = Lock()  # sheets are drawn while batches are made
        self.digest = self._tables[0].digest if len(columns) == 1 else _joined(self._tables)
        self._cache = _Cache(self._tables)
        self._label = label
        self.facts = self._facts(label.classes if label else ())

    def place(self, sample: int) -> Place:
        """Which row a global sample index stands for."""
        return self._sequence.place(sample)

    def batch(self, samples: Sequence[int]) -> Batch:
        """Some samples; the row groups that come next are fetched meanwhile.

        Returns:
            sample, scale: int64 [b]. By columns: grid float32 [b, 64, C], cells row by row and
            zeros after them, with grid_rows and grid_columns int64 [b]; image float32
            [b, 3, P, P] in [-1, 1]; latent float32 [b, c, h, w]; vector float32 [b, V]; label
            int64 [b], an index into `facts.classes`.
        """
        with self._turn:
            places = [self._sequence.place(sample) for sample in samples]
            self._fetch(places)
            found = [(self._cache[self._groups[p.block.scale][p.group]], p.row) for p in places]
        batch = {
            "sample": torch.tensor(list(samples), dtype=torch.int64),
            "scale": torch.tensor([place.block.scale for place in places], dtype=torch.int64),
        }
        group = found[0][0]
        if group.grid is not None:
            batch |= _grids(found, self.facts.channels)
        if group.image is not None:
            both = zip(places, found, strict=True)
            pixels = [self._image(place, one) for place, (one, _) in both]
            batch["image"] = images.to_float(np.stack(pixels))
        if group.latent is not None:
            batch["latent"] = _stack([one.latent[row] for one, row in found])  # type: ignore[index]
        if group.vector is not None:
            batch["vector"] = _stack([one.vector[row] for one, row in found])  # type: ignore[index]
        if self._label:
            batch["label"] = torch.tensor([self._label.of(one, row) for one, row in found])
        return batch

    def close(self) -> None:
        """Read no further."""
        self._cache.close()

    def _image(self, place: Place, group: Group) -> Pixels:
        """The image of a row, under its flip.

        Raises:
            UserError: it is no image, or of another size.
        """
        assert group.image is not None
        side = self.facts.image[-1]
        try:
            image = images.from_bytes(group.image[place.row])
            if image.shape != (side, side, 3):
                raise ValueError(f"{image.shape[1]}x{image.shape[0]} pixels, not {side}x{side}")
        except (OSError, ValueError, SyntaxError) as error:
            at, lead = self._groups[place.block.scale][place.group], self._tables[0]
            part = storage.join(lead.root, lead.parts[at.part]["part"])
            raise UserError(
                f"the image of row {place.row} in row group {at.number} of {part} is damaged "
                f"({error}); prepare the data again."
            ) from error
        return image if group.flip is None else mirrored(image, int(group.flip[place.row]))

    def _fetch(self, places: Sequence[Place]) -> None:
        """Have row groups read: of some rows, of their super-blocks, of those that come next."""
        blocks = {place.block for place in places}
        ahead = {self._sequence.after(block) for block in blocks}
        wanted = [self._groups[place.block.scale][place.group] for place in places] + [
            self._groups[block.scale][group]
            for some in (sorted(blocks), sorted(ahead))
            for block in some
            for group in self._sequence.groups(block)
        ]
        self._cache.want(list(dict.fromkeys(wanted)))

    def _facts(self, classes: tuple[str, ...]) -> DataFacts:
        made = self._tables[0].made
        shapes = {str(part.get("shape")) for part in self._tables[0].parts if part["groups"]}
        if len(shapes) > 1:
            raise UserError(
                f"{self._tables[0].name} has latents of several shapes ({', '.join(shapes)}); "
                f"encode the examples again with one autoencoder."
            )
        first = self._cache[next(iter(self._groups.values()))[0]]
        side = int(made["patch_px"])
        return DataFacts(
            channels=first.channels,
            counts={k: sum(one.rows for one in found) for k, found in self._groups.items()},
            image=(3, side, side),
            latent=None if first.latent is None else tuple(first.latent.shape[1:]),  # type: ignore[arg-type]
            base_mpp=made.get("config", {}).get("tile", {}).get("base_mpp"),
            encoder=dict(made["encoder"]),
            vector=0 if first.vector is None else first.vector.shape[1],
            classes=classes,
        )


class _Cache:
    """Row groups as arrays: those wanted last, and others as far as memory allows."""

    def __init__(self, found: Sequence[Table]) -> None:
        self._tables = found
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="ingest")
        self._found: dict[RowGroup, Future[Group]] = {}
        self._wanted: frozenset[RowGroup] = frozenset()

    def __getitem__(self, group: RowGroup) -> Group:
        return self._ask(group).result()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def want(self, groups: Sequence[RowGroup]) -> None:
        """Begin to read some row groups, in this order, and forget others that lie too heavy."""
        if self._wanted == (now := frozenset(groups)):
            return
        self._wanted = now
        for group in groups:
            self._ask(group)
        others = [group for group in self._found if group not in now]
        spare = sum(self._bytes(group) for group in others) - CACHE_BYTES
        for group in others:
            if spare <= 0:
                break
            spare -= self._bytes(group)
            self._found.pop(group).cancel()

    def _ask(self, group: RowGroup) -> Future[Group]:
        """The read of a row group; one that failed is tried again by whoever asks next."""
        future = self._found.pop(group, None)
        if future is None or future.cancelled() or (future.done() and future.exception()):
            future = self._pool.submit(group.read, self._tables)
        self._found[group] = future  # the last one asked for is the last one forgotten
        return future

    def _bytes(self, group: RowGroup) -> int:
        future = self._found[group]
        return future.result().bytes if future.done() and not future.exception() else 0


def latents_table(root: str, bundle: str) -> str:
    """The LATENTS of a bundle's autoencoder; where it has none yet, the only ones there are.

    Raises:
        UserError: no autoencoder, and no telling which latents.
    """
    if storage.exists(storage.join(bundle, "vae", "config.json")):
        return f"latents-{bundles.digest(bundle, ('vae',))}"
    found = storage.children(root, "encode-*.json")
    if not found:
        tables.manifest(root, "examples")  # says so where there are no data at all
    if len(found) != 1:
        raise UserError(
            f"there is no autoencoder in {bundle}; train one with python jobs/train.py model=vae "
            f"out={bundle} or import one with python jobs/import_weights.py, then encode the "
            f"examples with it."
        )
    return "latents-" + found[0].rsplit("encode-")[-1].removesuffix(".json")


def check_batch(recipe: Recipe, world_size: int) -> None:
    """Refuse a global batch that leaves a worker without work.

    Raises:
        UserError: with the smallest batch that does not.
    """
    if recipe.batch < world_size:
        raise UserError(
            f"batch={recipe.batch} leaves some of {world_size} workers without a sample; give "
            f"batch={world_size} or more, or fewer workers."
        )


def share(step: int, batch: int, rank: int, world_size: int) -> range:
    """The global sample indices of a step that are one rank's; sizes differ by at most one."""
    start, stop = (step * batch + batch * r // world_size for r in (rank, rank + 1))
    return range(start, stop)


def _joined(found: Sequence[Table]) -> str:
    return storage.digest(*(table.digest.encode() for table in found))


def _grids(found: Sequence[tuple[Group, int]], channels: int) -> Batch:
    cells = np.zeros((len(found), SLOTS, channels), np.float32)
    sizes = np.empty((len(found), 2), np.int64)
    for i, (group, row) in enumerate(found):
        grid, sizes[i] = group.grid_of(row)
        if grid.shape[1] != channels:
            raise UserError(
                f"embeddings have {channels} values in some rows, {grid.shape[1]} in others; make "
                f"the data anew with one encoder."
            )
        cells[i, : len(grid)] = grid
    rows, columns = torch.from_numpy(sizes).unbind(1)
    return {"grid": torch.from_numpy(cells), "grid_rows": rows, "grid_columns": columns}


def _stack(values: Sequence[Any]) -> Tensor:
    return torch.from_numpy(np.stack(values).astype(np.float32))
