"""A task small enough to train in milliseconds, and tables of random rows for it.

Its loss draws noise at the address (seed, sample), like the real ones. Its hooks record which
process saw which sample, and can kill that process, once.
"""

import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from raylarge import images, schema, storage
from raylarge.diffusion import noise

CHANNELS = 4
GROUP = 5  # rows of a row group


@dataclass(frozen=True)
class Toy:
    """How to build the task; a callable that travels to the workers."""

    seed: int = 0
    seen: str = ""  # folder: one line per sample and process
    fatal_sample: int = -1  # whose step kills the process that computes it ...
    fatal_once: str = ""  # ... unless this file exists; "raise" instead of a path: always raise
    fatal: str = "SIGKILL"  # what it is killed with
    poison: tuple[int, ...] = ()  # samples whose loss is NaN
    loud: tuple[int, ...] = ()  # samples whose loss is a hundred times as large
    before: dict = field(default_factory=dict)  # sample -> what is called when it comes
    pictures: bool = False  # draws sheets
    pause: float = 0.0  # seconds of every pass
    local: str = ""  # folder for the weights, where the bundle is far

    def __call__(self, config, facts):
        return ToyTask(self, facts)


class ToyTask:
    def __init__(self, toy, facts):
        self.network = ToyNetwork(toy, facts)
        self.averaged = self.network.body
        self.local, self.pictures = toy.local, toy.pictures

    def draw(self, batch):
        return batch

    def sheet(self, batch):
        return np.zeros((4, 4, 3), np.uint8) if self.pictures else None

    def finish(self, bundle, averaged, facts, batch):
        folder = Path(self.local or bundle, "toy")
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(
            {"network": self.network.state_dict(), "averaged": averaged, "n": len(batch["sample"])},
            folder / "weights.pt",
        )


class ToyNetwork(nn.Module):
    def __init__(self, toy, facts):
        super().__init__()
        self.toy = toy
        size = int(np.prod(facts.latent or facts.image))
        self.body = nn.Sequential(
            nn.Linear(size + facts.channels, 32), nn.SiLU(), nn.Linear(32, size)
        )
        self.head = nn.Parameter(torch.zeros(size))

    def forward(self, batch):
        x = batch.get("latent", batch.get("image")).flatten(1)
        samples = batch["sample"].tolist()
        self.record(samples)
        time.sleep(self.toy.pause)
        addresses = [(sample,) for sample in samples]
        eps = noise.normal(x.shape[1:], self.toy.seed, "toy", addresses).to(x.device)
        condition = batch["grid"].mean(dim=1)
        guess = self.body(torch.cat([x + eps, condition], dim=1)) + self.head
        loss = (guess.float() - eps).square().mean(dim=1)
        bad = torch.tensor([sample in self.toy.poison for sample in samples], device=x.device)
        loud = torch.tensor([sample in self.toy.loud for sample in samples], device=x.device)
        return torch.where(bad, torch.nan, torch.where(loud, 100 * loss, loss))

    def record(self, samples):
        if self.toy.seen:
            with Path(self.toy.seen, f"{os.getpid()}.txt").open("a") as file:
                file.writelines(f"{sample}\n" for sample in samples)
        for sample in self.toy.before.keys() & set(samples):
            self.toy.before[sample]()
        if self.toy.fatal_sample in samples:
            if self.toy.fatal_once == "raise":
                raise RuntimeError("the toy was told to fail")
            if not Path(self.toy.fatal_once).exists():
                Path(self.toy.fatal_once).touch()
                os.kill(os.getpid(), getattr(signal, self.toy.fatal))


def write_latents(folder, counts=(24, 12, 6), split="train", name="latents-0", seed=0):
    """A table of latents [3, 4, 4], so many rows at each scale, in two parts."""
    rng = np.random.default_rng(seed)
    rows = [row | {"latent": half(rng, 48)} for row in keys(rng, counts, split)]
    return write(str(folder), name, rows, schema.LATENTS, split)


def write_flipped(folder):
    """Eight 8 px images, and latents that tell which of them they are of, under which flip."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)
    examples = [
        row | {"key": i, "tissue": 1.0, "image": images.png_bytes(pictures[i])}
        for i, row in enumerate(keys(rng, (8,), "train"))
    ]
    write(str(folder), "examples", examples, schema.EXAMPLES, "train")
    latents = []
    for row in examples:
        for flip in range(4):
            latent = np.repeat(np.array([row["key"], flip, 0], np.float16), 16)
            latents.append(row | {"flip": flip, "latent": latent})
    # Parts and row groups are those of the examples, each row four times.
    mixed = [[row for row in latents if row["key"] % 2 == odd] for odd in (0, 1)]
    write_parts(str(folder), "latents-0", mixed, schema.LATENTS, "train", 4 * GROUP)
    return pictures


def write_examples(folder, counts=(6, 4), split="train", seed=0, labels=lambda i: []):
    """A table of 8 px images."""
    rng = np.random.default_rng(seed)
    rows = [
        row
        | {
            "labels": labels(row["row"]),
            "tissue": 1.0,
            "image": images.png_bytes(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)),
        }
        for row in keys(rng, counts, split)
    ]
    return write(str(folder), "examples", rows, schema.EXAMPLES, split)


def keys(rng, counts, split):
    for k, count in enumerate(counts):
        side = min(8, 2**k)
        for i in range(count):
            yield {
                "key": 1000 * k + i,
                "labels": [],
                "flip": 0,
                "slide_id": f"slide-{i % 3}",
                "patient_id": "p",
                "split": split,
                "scale": k,
                "row": i,
                "column": 2 * i,
                "grid": half(rng, side * side * CHANNELS),
                "grid_rows": side,
                "grid_columns": side,
            }


def half(rng, size):
    return rng.standard_normal(size).astype(np.float16)


def write(root, name, rows, kind, split):
    """A table in two parts of small row groups."""
    return write_parts(root, name, (rows[::2], rows[1::2]), kind, split, GROUP)


def write_parts(root, name, mixed, kind, split, group):
    """Parts of small row groups, and the manifest that names them beside those there."""
    path = f"{root}/{'shard' if name == 'examples' else name.replace('latents', 'encode')}.json"
    parts = storage.read_json(path)["parts"] if storage.exists(path) else []
    for i, some in enumerate(mixed):
        table = pa.table({name: [row[name] for row in some] for name in kind.names}, schema=kind)
        part = f"{name}/{split}-{i}.parquet"
        runs = [(k, sum(row["scale"] == k for row in some)) for k in range(8)]
        groups = [
            [k, split, min(group, rows - start)]
            for k, rows in runs
            for start in range(0, rows, group)
        ]
        storage.write_table(f"{root}/{part}", table, [rows for _, _, rows in groups])
        told = {"counts": {"0": {split: len(some)}}, "groups": groups, "shape": [3, 4, 4]}
        parts.append({"part": part, **told})
    manifest = {
        "verb": name,
        "parts": parts,
        "rows": sum(map(len, mixed)),
        "digest": storage.digest(repr(mixed).encode()),
        "patch_px": 8,
        "encoder": {"name": "toy", "width": CHANNELS},
    }
    storage.write_json(path, manifest)
    return root
